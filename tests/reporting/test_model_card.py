"""The model card: what it says, that users' words stay words in it, and that a person's page is never replaced."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from ambient_sd.audit.record import AuditRecord
from ambient_sd.audit.shares import RETURNED
from ambient_sd.reporting.model_card import Facts, given_settings, inline, is_ours, make_card, read_licence, write_card
from ambient_sd.reporting.report import show
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.validation import write_scores
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.weight_files import ADAPTER_NAME, adapter_files

UNKNOWN = {"license": "other", "license_name": "unknown-see-the-base"}
HOSTILE = {
    "backticks": "```\nimport os\n``` `code`",
    "pipes": "a | b || c |\n| --- |",
    "script": "</script><script>alert(1)</script><img src=x onerror=alert(1)>",
    "front matter": "\n---\nlicense: mit\nbase_model: evil/base\n---\n",
    "controls": "a\x00b\x1b[31mc\x07\x85\u2028d\r\ne",
    "right to left": "a \u202egnp.exe\u202c \u2066b\u2069 \u200f",
    "length": "x" * 10_000,
    "links": "![](http://evil/p.png) [a](javascript:alert(1)) <http://evil> http://evil www.evil.com a@evil.com",
    "structure": "# head\n\n- list\n\n1. one\n\n> quote\n\n***\n\n    code\n[x]: http://evil\n$$x$$ &lt;b&gt; \\",
    "comment": "--> <!-- ambient_sd card " + "0" * 64 + " -->",
    "markup": "*a* _b_ ~~c~~ **d** \\[e\\]",
    "surrogate": "a\ud800b",
}


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = dict(
        base="tiny-base", base_id=None, licence={"license": "openrail++"}, objective="ambient", prediction_type="v_prediction",
        level=1.0, timestep=353.4, timesteps=1000, gap_upper=None, distill_level=None, reweight=2, pipeline="AmbientSDPipeline", vae=None, lora=None, averaged=False, steps=20, batch=4,
        learning_rate=1e-4, lr_scheduler="constant", resolution=32, images=8, distinct=7, groups=1, grouped=3, captioned=6,
        fingerprint="ab" * 32, dataset=None, prompts=[], finished=0.0,
    )  # fmt: skip
    return Facts(**{**values, **changes})


LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "dora": False, "targets": ["to_q", "to_k"]}
UNET = "unet/diffusion_pytorch_model.safetensors"


def audited(folder: Path, base: Path, audit: Path, **changes: Any) -> Facts:
    """Lay weights and their audit, as the command wrote it, into a folder, and return facts of the same images."""
    (folder / "unet").mkdir(exist_ok=True)
    shutil.copy(base / UNET, folder / UNET)
    shutil.copy(audit / "audit.json", folder)
    return facts(fingerprint=AuditRecord.read(audit).images["training"]["fingerprint"], **changes)


def head(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("\n---\n", maxsplit=1)[0].removeprefix("---\n")))


def render(text: str) -> str:
    """Render the card's body as the hub does: GitHub's tables, HTML and bare addresses allowed."""
    return str(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text.split("\n---\n", 1)[1]))


def rendered_text(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def structure(page: str) -> list[str]:
    """Return the tags of a page with their attributes, but for the stamp of the card."""
    tags = re.findall(r"<[^>]*>", page)
    return tags[:-1] if tags[-1].startswith("<!-- ambient_sd card") else tags


def test_card_says_that_the_base_was_quantized(tmp_path: Path) -> None:
    said = "trained on the base's weights in nf4 (QLoRA)"
    assert said in rendered_text(render(make_card(facts(lora={**LORA, "quantized": "nf4"}), tmp_path)))
    assert "QLoRA" not in make_card(facts(lora=LORA), tmp_path)


def test_card_says_what_was_trained_on_what_and_how(tmp_path: Path) -> None:
    text = make_card(facts(lora=LORA, base_id="owner/base", base="owner/base", dataset="owner/set"), tmp_path)
    assert head(text) == {
        "license": "openrail++", "library_name": "diffusers", "pipeline_tag": "text-to-image", "base_model": "owner/base",
        "base_model_relation": "adapter", "datasets": ["owner/set"],
        "tags": ["stable-diffusion", "text-to-image", "diffusers", "ambient-sd", "lora"],
    }  # fmt: skip
    assert ModelCard(text).data.base_model == "owner/base"
    page = rendered_text(render(text))
    for said in ("LoRA, rank 4, alpha 8, on to_q to_k", "ambient, noise level s_n = 1 (timestep 353.4 of 1000", "weight a^2",
                 "20 steps of 4 samples at 32 px, learning rate 0.0001", "of which 1 are exact copies", "75%", "1, 3 images in all",
                 "ab" * 32, "measured, not proven: no privacy guarantee", "has not been measured here", "licence: openrail++"):  # fmt: skip
        assert said in page, said


def test_card_names_what_else_changes_the_loss(tmp_path: Path) -> None:
    config = TrainConfig(
        pretrained_model_name_or_path="base", train_data_dir="images", output_dir=str(tmp_path), objective="plain", snr_gamma=5.0,
        weighting_scheme="logit_normal", logit_mean=-0.5, caption_mitigation="rc", caption_dropout=0.0,
    )  # fmt: skip
    also = given_settings(config)
    assert set(also) == {
        "snr_gamma",
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "caption_mitigation",
        "caption_mitigation_p",
        "caption_dropout",
    }
    page = rendered_text(render(make_card(facts(also=also), tmp_path)))
    assert "Also: --caption_dropout 0.0, --snr_gamma 5.0, --weighting_scheme logit_normal, --logit_mean -0.5" in page
    assert "Also" not in rendered_text(render(make_card(facts(), tmp_path)))
    hostile = {"snr_gamma": "![](http://evil)\n\n# head", "unknown": 1}
    assert structure(render(make_card(facts(also=hostile), tmp_path))) == structure(
        render(make_card(facts(also={"snr_gamma": 1}), tmp_path))
    )


def test_card_of_a_local_base_of_unknown_licence_names_no_base_and_no_licence(tmp_path: Path) -> None:
    text = make_card(facts(licence=UNKNOWN), tmp_path)
    assert "base_model" not in head(text)
    assert "base_model_relation" not in head(text)
    assert head(text)["license"] == "other"
    assert "unknown, see the base" in rendered_text(render(text))


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: openrail++\n---\n# x", {"license": "openrail++"}),
        ("---\nlicense: other\nlicense_name: My Own Licence\nlicense_link: https://a.org/x\n---\n",
         {"license": "other", "license_name": "my-own-licence", "license_link": "https://a.org/x"}),
        ("---\nlicense: other\nlicense_name: a\nlicense_link: LICENSE.md\n---\n", {"license": "other", "license_name": "a"}),
        ("---\nlicense: other\n---\n", UNKNOWN),
        ("---\nlicense: 'mit\n\n  ---\n\n  x: y'\n---\n", UNKNOWN),
        ("---\nlicense: mit\nlicense_link: javascript:alert(1)\n---\n", {"license": "mit"}),
        ("---\n: [\n---\n", UNKNOWN),
        ("# A base without a head", UNKNOWN),
        (None, UNKNOWN),
    ],
)  # fmt: skip
def test_licence_is_what_the_base_states_or_unknown(tmp_path: Path, text: str | None, licence: dict[str, str]) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    base = SimpleNamespace(name=str(tmp_path), label="base", revision=None, cache_dir=None)
    assert read_licence(base) == licence
    assert head(make_card(facts(licence=licence), tmp_path))["license"] == licence["license"]


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_words_change_no_structure_and_no_front_matter(
    tmp_path: Path, tiny_base: Path, tiny_audit: Path, name: str, shown: bool
) -> None:
    """Where the audit is shown, and where it is left out."""
    words = HOSTILE[name]
    (tmp_path / "validation").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "validation" / "step-20.png")
    of = audited(tmp_path, tiny_base, tiny_audit)
    (tmp_path / ADAPTER_NAME).write_bytes(b"a LoRA")
    values = AuditRecord.read(tmp_path).as_dict()
    del values["format"]
    files = {**values["model"]["files"], "lora_weights": adapter_files(str(tmp_path))}

    def card(given: str) -> str:
        model = {**values["model"], "model": given, "lora_weights": given, "scheduler": given, "files": files}
        finding = {**values["finding"], "sentence": given, "detail": given}
        AuditRecord.of({**values, "model": model, "finding": finding, "notes": [given]}).write(tmp_path)
        said = dataclasses.replace(
            of, base=given, objective=given, prediction_type=given, lr_scheduler=given, prompts=[given], lora={**LORA, "targets": [given]},
            base_files=files["network"], fingerprint=of.fingerprint if shown else given,
        )  # fmt: skip
        text = make_card(said, tmp_path, repo="owner/name", revision=given.replace("\n", "") or None)
        assert ("Verdict: passed" in rendered_text(render(text))) == shown
        return text

    plain, hostile = card("words"), card(words)
    assert head(hostile) == head(plain)
    assert structure(render(hostile)) == structure(render(plain))
    assert is_ours(hostile)
    assert len(hostile) < 30_000 or name == "length"
    assert not [c for c in hostile if not c.isprintable() and c != "\n"]
    hostile.encode("utf-8")
    code = re.findall(r"```python\n(.*?)\n```", hostile, flags=re.S)
    assert len(code) == 1
    compile(code[0], "card", "exec")


def test_the_check_of_structure_sees_words_that_are_not_escaped() -> None:
    # Negative control of the test above: raw, nearly all of these words change the page.
    harmless = {"right to left", "length", "surrogate"}
    for name, words in HOSTILE.items():
        page = "\n---\n\n- {0}\n\nend\n\n| a | b | c |\n| --- | --- | --- |\n| {0} | b | c |\n"
        raw = render(page.format(words.encode("utf-8", "replace").decode()))
        changed = structure(raw) != structure(render(page.format("words"))) or "<td>b</td>\n<td>c</td>" not in raw
        assert changed == (name not in harmless), name
        assert inline(words) != words
    assert inline("a red-blue disc, v_prediction") == "a red-blue disc, v_prediction"
    assert inline("-a- _b_ -- __") == "&#45;a&#45; &#95;b&#95; &#45;&#45; &#95;&#95;"


def test_an_audit_of_these_weights_is_in_the_card_with_interval_count_and_held_out(
    tmp_path: Path, tiny_base: Path, tiny_audit: Path
) -> None:
    of = audited(tmp_path, tiny_base, tiny_audit)
    page = rendered_text(render(make_card(of, tmp_path)))
    record = AuditRecord.read(tiny_audit)
    for row in record.rows:
        assert show(row.generated) in page
        # Of the training images no held-out one can come back; an own image has the base's beside it, which is not here.
        if row.name != RETURNED and not row.name.startswith("own-"):
            assert row.heldout is not None and show(row.heldout) in page
    assert (
        "4 images for 2 training captions" in page
        and "6 held-out images" in page
        and record.finding["sentence"] in page
    )
    assert "has not been measured" not in page
    (tmp_path / UNET).write_bytes((tmp_path / UNET).read_bytes()[:-1] + b"x")  # negative control: other weights
    assert "it is of other weights" in rendered_text(render(make_card(of, tmp_path)))


def test_an_audit_is_known_by_the_weights_and_not_by_its_time(
    tmp_path: Path, tiny_base: Path, tiny_audit: Path
) -> None:
    """A copy of a folder has other times, in any order."""
    of = audited(tmp_path, tiny_base, tiny_audit, finished=2000.0)
    os.utime(tmp_path / "audit.json", (1000, 1000))
    assert "Verdict: passed" in rendered_text(render(make_card(of, tmp_path)))


def test_a_damaged_audit_is_one_line_and_does_not_end_a_training(
    tmp_path: Path, tiny_base: Path, tiny_audit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of = audited(tmp_path, tiny_base, tiny_audit)
    (tmp_path / "audit.json").write_text("{")
    with pytest.raises(UserError, match=r"audit\.json cannot be read"):
        make_card(of, tmp_path)
    write_card(tmp_path, of)
    assert "not been measured" in (tmp_path / "README.md").read_text() and "audit.json cannot be read" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null", "[" * 10**5, '{"level": NaN}'])
def test_damaged_facts_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(UserError, match=r"card\.json cannot be read"):
        Facts.read(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("steps", "</b>"), ("pipeline", "x; import os"), ("averaged", "no"), ("vae", 3), ("base_id", "../x"), ("dataset", "a b"), ("level", None),
                                            ("licence", {"license": "x\n---"}), ("prompts", [3]), ("lora", {}), ("base_files", []), ("base_files", {"a": 1}),
                                            ("level", float("nan")), ("images", 0), ("steps", 10**400),
                                            ("lora", {**LORA, "alpha": 10**400})])  # fmt: skip
def test_facts_of_other_kinds_are_refused_before_they_reach_a_card(tmp_path: Path, key: str, value: Any) -> None:
    facts().write(tmp_path)
    read = Facts.read(tmp_path)
    assert read is not None
    assert dataclasses.replace(read, finished=0.0) == facts()
    written = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**written, key: value}))
    with pytest.raises(UserError, match=r"card\.json cannot be read"):
        Facts.read(tmp_path)


def test_samples_and_the_guards_score_are_those_of_this_run(tmp_path: Path) -> None:
    folder = tmp_path / "validation"
    folder.mkdir()
    for step in (10, 20, 500):
        Image.new("RGB", (4, 4)).save(folder / f"step-{step}.png")
    assert "validation/" not in make_card(facts(), tmp_path)
    text = make_card(facts(prompts=["a red disc"]), tmp_path)
    assert "(validation/step-20.png)" in text
    assert "a red disc" in text
    assert "guard on them" not in text
    write_scores(folder, 20, [1.0, 3.0, float("nan")])
    assert "mean 2, highest 3 (n = 2)" in rendered_text(render(make_card(facts(prompts=["a red disc"]), tmp_path)))
    write_scores(folder, 10, [1.0, 3.0])  # of another sheet
    assert "guard on them" not in make_card(facts(prompts=["a red disc"]), tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 20}', '{"step": 20, "scores": ["x"]}', '{"step": 20, "scores": [NaN]}',
                                  '{"step": 20, "scores": [-1]}', '{"step": "20", "scores": []}'])  # fmt: skip
def test_damaged_scores_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "validation").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "validation" / "step-20.png")
    (tmp_path / "validation" / "scores.json").write_text(text)
    with pytest.raises(UserError, match=r"scores\.json cannot be read"):
        make_card(facts(prompts=["a red disc"]), tmp_path)


def test_a_page_edited_by_a_person_stays_and_an_untouched_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_card(tmp_path, facts())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as some editors and git settings do: no edit
    write_card(tmp_path, facts(steps=77))
    assert "77 steps" in path.read_text()
    for edited in (path.read_text() + "\nMy notes.\n", path.read_text().replace("77 steps", "78 steps"), "# Mine\n"):
        path.write_text(edited)
        write_card(tmp_path, facts(steps=99))
        assert path.read_text() == edited
