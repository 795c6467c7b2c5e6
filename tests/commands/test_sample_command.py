"""`ambient-sd sample`: what it writes, that it goes on after a cut, and that prompts do no harm anywhere."""

from __future__ import annotations

import html.parser
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from ambient_sd.cli import main
from ambient_sd.commands.sample import SampleSettings
from ambient_sd.commands.sample import work as sample
from ambient_sd.commands.sample.work import read_record
from ambient_sd.sampling import SamplingConfig, image_seed, load_pipeline, read_prompts
from ambient_sd.utils.errors import UserError

HOSTILE = [
    "",
    "x" * 10_000,
    "a\x00b\x1b[31mc\r\nd\u2028e",
    '"><script>alert(1)</script><img src=x onerror=alert(1)>',
    "../../etc/passwd",
    "C:\\con\\nul:*?",
    "a \u202egnp.exe",
    "{prompt} %s ${HOME} `id`",
]


def settings(model: Path, out: Path, prompts: list[str], **changes: Any) -> SampleSettings:
    config = {"model": str(model), "num_inference_steps": 2, "batch_size": 3, "device": "cpu"}
    config |= {name: changes.pop(name) for name in list(changes) if name in SamplingConfig.__dataclass_fields__}
    return SampleSettings(SamplingConfig(**config), out, prompts, **changes)


def pixels(out: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in sorted((out / "images").glob("*.png"))}


def near(a: bytes, b: bytes) -> bool:
    """Tell whether two images differ by rounding only: one of 256 levels."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1


class Page(html.parser.HTMLParser):
    """Collects what a browser would see as structure."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs


def test_command_writes_images_list_sheet_and_page_and_all_agree(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    main(["sample", str(tiny_base), "--prompt", "a cat", "the red dog", "--num_images_per_prompt", "2", "--num_inference_steps",
          "2", "--scheduler", "dpm++", "--seed", "5", "--threshold", "0.01", "--device", "cpu", "--out", str(out)])  # fmt: skip
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    names = ["00000-00.png", "00000-01.png", "00001-00.png", "00001-01.png"]
    assert [row["file"] for row in rows] == [f"images/{name}" for name in names]
    assert [read_record(out / row["file"]) for row in rows] == rows
    assert [row["prompt"] for row in rows] == ["a cat", "a cat", "the red dog", "the red dog"]
    for row in rows:
        assert row["score"] == pytest.approx(sum(row["curve"]) / len(row["curve"])) and row["run_seed"] == 5
        assert row["flagged"] is (row["score"] >= 0.01) is True and row["threshold_origin"] == "given by caller"
        assert (row["sampler"], row["num_inference_steps"], row["policy"]) == ("DPMSolverMultistepScheduler", 2, None)
    assert [row["seed"] for row in rows] == [image_seed(5, p, i) for p in range(2) for i in range(2)]
    assert len({tuple(row["curve"]) for row in rows}) == 4
    page = (out / "index.html").read_text()
    assert page.count("<figure") == 4 and all(f"{row['score']:.4g}" in page for row in rows)
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "") and "<script" not in page
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.width >= 4 * 32 and sheet.height > 32
    said = capsys.readouterr().out
    assert "4 images" in said and "4 flagged" in said


def test_hostile_prompts_reach_no_file_name_and_no_structure(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    records = sample.sample(settings(tiny_base, out, HOSTILE))
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        ["out/contact_sheet.png", "out/index.html", "out/samples.jsonl", "out/settings.json"]
        + [f"out/images/{i:05d}-00.png" for i in range(len(HOSTILE))]
    )
    # They come back as they were, from the list and from the images.
    assert [r["prompt"] for r in records] == HOSTILE
    lines = (out / "samples.jsonl").read_text().split("\n")
    assert [json.loads(line)["prompt"] for line in lines[:-1]] == HOSTILE and all(line.isprintable() for line in lines)
    assert [read_record(out / r["file"])["prompt"] for r in records] == HOSTILE
    assert records[0]["score"] == 0  # an empty prompt is its own unconditional half
    page = (out / "index.html").read_text()
    assert not Page(page).tags & {"script", "iframe", "link", "object", "svg"}
    assert not [name for name, _ in Page(page).attributes if name.startswith("on")]
    assert "\u202e" not in page and "\x1b" not in page and "x" * 1000 not in page


def test_nothing_written_names_a_place_of_this_machine(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample.sample(settings(tiny_base, out, ["a cat"]))
    for path in out.rglob("*"):
        if path.is_file():
            assert str(tiny_base).encode() not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()


def test_noise_of_an_image_does_not_depend_on_batch_or_company(tiny_base: Path, tmp_path: Path) -> None:
    prompts = ["a cat", "the red dog", "a cat"]
    one, many = tmp_path / "one", tmp_path / "many"
    alone = sample.sample(settings(tiny_base, one, prompts, num_images_per_prompt=2, batch_size=1))
    together = sample.sample(settings(tiny_base, many, prompts, num_images_per_prompt=2, batch_size=4))
    for a, b in zip(alone, together, strict=True):
        assert a["curve"] == pytest.approx(b["curve"], rel=1e-4)
    first, second = pixels(one), pixels(many)
    assert all(near(data, second[name]) for name, data in first.items())
    # Control: the address matters. The same prompt at another place, and its next image, start from other noise.
    assert not near(first["00000-00.png"], first["00002-00.png"]) and not near(
        first["00000-00.png"], first["00000-01.png"]
    )
    more = sample.sample(settings(tiny_base, tmp_path / "more", prompts, num_images_per_prompt=3, batch_size=5))
    assert more[0]["curve"] == pytest.approx(alone[0]["curve"], rel=1e-4)
    assert near(pixels(tmp_path / "more")["00002-01.png"], first["00002-01.png"])


def test_a_run_that_was_cut_goes_on_and_ends_as_if_it_had_not_been(
    tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    prompts = ["a cat", "the red dog"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    sample.sample(settings(tiny_base, straight, prompts, num_images_per_prompt=3, batch_size=2))
    calls = []

    call = StableDiffusionPipeline.__call__
    stop = True

    def stops(pipe: Any, prompt: list[str], **options: Any) -> Any:
        calls.append(len(prompt))
        if stop and len(calls) == 3:
            raise KeyboardInterrupt
        return call(pipe, prompt, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        sample.sample(settings(tiny_base, cut, prompts, num_images_per_prompt=3, batch_size=2))
    assert len((cut / "samples.jsonl").read_text().splitlines()) == 4 and not (cut / "index.html").exists()
    # An image that broke on the disk is sampled again, too.
    broken = cut / "images" / "00000-01.png"
    broken.write_bytes(broken.read_bytes()[:200])
    stop = False
    sample.sample(settings(tiny_base, cut, prompts, num_images_per_prompt=3, batch_size=2))
    assert calls == [2, 2, 2, 2, 1]
    # Other batches were formed, so the last digits may differ: images by their bytes of 256 levels.
    assert all(near(data, pixels(cut)[name]) for name, data in pixels(straight).items())
    # Once more: nothing is sampled.
    sample.sample(settings(tiny_base, cut, prompts, num_images_per_prompt=3, batch_size=2))
    assert len(calls) == 5


@pytest.mark.parametrize("why", ["scale", "distilled"])
def test_without_guidance_images_are_the_stock_pipelines_and_have_no_scores(
    tiny_base: Path, tmp_path: Path, capsys: Any, why: str
) -> None:
    base, scale = tiny_base, 1.0
    if why == "distilled":  # as LCM: the scale is an input of the network, at any value there is no second branch
        base, scale = tmp_path / "lcm", 7.5
        pipe = tiny.tiny_pipeline()
        unet = type(pipe.unet).from_config(pipe.unet.config, time_cond_proj_dim=8)
        pipe.register_modules(unet=unet)
        pipe.save_pretrained(base)
    out = tmp_path / "out"
    given = settings(base, out, ["a cat", "<b>dog"], guidance_scale=scale)
    records = sample.sample(given)
    assert [r["score"] for r in records] == [None, None] and [r["guidance_scale"] for r in records] == [scale] * 2
    assert "no guidance" not in capsys.readouterr().err
    pipe = load_pipeline(given.sampling)
    generators = [torch.Generator().manual_seed(image_seed(0, p)) for p in (0, 1)]
    stock = pipe(["a cat", "<b>dog"], generator=generators, num_inference_steps=2, guidance_scale=scale)
    assert [near(data, image.tobytes()) for data, image in zip(pixels(out).values(), stock.images, strict=True)] == [
        True
    ] * 2
    page = (out / "index.html").read_text()
    assert "No scores" in page and "under the guard" not in page and "<b>dog" not in page
    # Control: with guidance there are scores, and other images.
    if why == "scale":
        guided = sample.sample(settings(base, tmp_path / "guided", ["a cat", "<b>dog"], guidance_scale=7.5))
        assert all(r["score"] > 0 for r in guided) and pixels(tmp_path / "guided") != pixels(out)
    with pytest.raises(UserError, match="guard measures guidance"):
        sample.sample(settings(base, tmp_path / "policy", ["a cat"], guidance_scale=scale, policy="random_tokens"))
    sample.sample(given)  # resumes: nothing left to sample


@pytest.mark.parametrize(
    "text", ["", "[]", '{"kind": "sample"}', '{"kind": "sample", "settings": 3, "finished": true}', "[" * 10**5]
)
def test_a_folder_whose_settings_are_damaged_is_one_line(tiny_base: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(UserError, match=r"settings\.json cannot be read; name another folder"):
        sample.sample(settings(tiny_base, tmp_path, ["a cat"]))


def test_overwriting_removes_the_earlier_run_alone(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample.sample(settings(tiny_base, out, ["a cat", "a dog"]))
    (out / "notes.txt").write_text("mine")
    sample.sample(settings(tiny_base, out, ["a bird"], seed=1, overwrite=True))
    assert sorted(pixels(out)) == ["00000-00.png"] and (out / "notes.txt").read_text() == "mine"
    assert len((out / "samples.jsonl").read_text().splitlines()) == 1


def test_other_settings_in_the_same_folder_are_one_line(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample.sample(settings(tiny_base, out, ["a cat"]))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for change, named in (
        ({"seed": 1}, "seed was 0 and is 1"), ({"guidance_scale": 3.0}, "guidance_scale"), ({"num_images_per_prompt": 2}, "num_images"),
        ({"prompts": ["a dog"]}, "prompts changed"), ({"threshold": 3.0}, "threshold"),
    ):  # fmt: skip
        prompts = change.pop("prompts", ["a cat"])
        with pytest.raises(UserError, match=named):
            sample.sample(settings(tiny_base, out, prompts, **change))
    other = tmp_path / tiny_base.name
    shutil.copytree(tiny_base, other)
    tiny.tiny_pipeline(seed=1).save_pretrained(other)
    with pytest.raises(UserError, match="weights changed"):
        sample.sample(settings(other, out, ["a cat"]))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    with pytest.raises(UserError, match=r"no settings\.json"):
        sample.sample(settings(tiny_base, tmp_path, ["a cat"]))


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--prompt", "a", "--prompts", "b"], "both prompt and prompts are given"), ([], "neither prompt nor prompts is given"), (["--prompt", "a", "--threshold", "high"], "threshold is 'high'"),
     (["--prompt", "a", "--threshold", "-1"], "threshold is -1"), (["--prompt", "a", "--threshold", "0"], "threshold is 0"), (["--prompt", "a", "--guidance_scale", "-1"], "guidance_scale is -1"),
     (["--prompt", "a", "--guidance_scale", "1", "--threshold", "3"], "guard measures guidance"),
     (["--prompt", "a", "--guidance_scale", "0", "--attribution", "all"], "attribution is 'all'"),
     (["--prompt", "a", "--guidance_scale", "inf"], "must be a finite number"),
     (["--prompt", "a", "--base_above", "1"], "give --base MODEL"), (["--prompt", "a", "--base", "x"], "base is given; it has no effect here: base_above is off"),
     (["--prompt", "a", "--base_above", "nan", "--base", "x"], "base_above is nan"),
     (["--prompt", "a", "--base_above", "1", "--base", "./none"], "there is no folder './none'"),
     (["--prompt", "a", "--resolution", "30"], "multiple of 8"), (["--prompt", "a", "--policy", "nothing"], "--help lists all"),
     (["--prompt", "a", "--policy", "prompt_optimization"], "needs target"), (["--prompt", "a", "--when", "flagged"], "without a policy"),
     (["--prompt", "a", "--adapter", "./none"], "adapter is ./none"), (["--prompt", "a", "--device", "toaster"], "device is"),
     (["--prompts", "none.jsonl"], "cannot be read"), (["--prompt", "a", "--num_images_per_prompt", "0"], "num_images_per_prompt is 0"),
     (["--prompt", "a", "--num_images_per_prompt", "1010"], "num_images_per_prompt is 1010")],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(
    tiny_base: Path, tmp_path: Path, capsys: Any, words: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(tiny_base), "--out", str(tmp_path / "out"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and named in error
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxFillPipeline"}')
    for model, named in ((tmp_path, "is a FluxFillPipeline"), (tmp_path / "none", "there is no folder")):
        with pytest.raises(UserError, match=named):
            sample.sample(settings(model, tmp_path / "out", ["a cat"]))


def test_prompt_files_of_both_kinds_are_read(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n\n{"prompt": ""}\n')
    (tmp_path / "p.txt").write_bytes(b"a cat\r\n\n a\x0bb\n")
    assert read_prompts(str(tmp_path / "p.jsonl")) == ["a cat", ""]
    assert read_prompts(str(tmp_path / "p.txt")) == ["a cat", " a\x0bb"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "\\ud800"}\n')
    with pytest.raises(UserError, match="surrogate"):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_an_adapter_changes_the_images_and_is_named(tiny_base: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    unet = tiny.tiny_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    folder = tmp_path / "my-lora"
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    plain = sample.sample(settings(tiny_base, tmp_path / "plain", ["a cat"]))
    adapted = sample.sample(settings(tiny_base, tmp_path / "adapted", ["a cat"], lora_weights=str(folder)))
    assert adapted[0]["lora_weights"] == "my-lora" and plain[0]["lora_weights"] is None
    assert abs(adapted[0]["score"] / plain[0]["score"] - 1) > 1e-4
    # Above a level the base: at the ends these very images.
    for level, same in ((0.0, "plain"), (1.0, None), (1e6, "adapted")):
        out = tmp_path / f"above-{level}"
        both = sample.sample(settings(tiny_base, out, ["a cat"], lora_weights=str(folder), base_above=level))
        assert both[0]["base_above"] == level and both[0]["base"] is None
        assert [n for n in ("plain", "adapted") if pixels(tmp_path / n) == pixels(out)] == ([same] if same else [])
        assert f"Above noise level {level:g} the base, without the adapter" in (out / "index.html").read_text()
    given = settings(folder.parent / "tuned", tmp_path / "whole", ["a cat"], base_above=0.0, base=str(tiny_base))
    tiny.tiny_pipeline(seed=1).save_pretrained(folder.parent / "tuned")
    assert (
        sample.sample(given)[0]["base"] == tiny_base.name
    )  # a whole fine-tune, here another model, over its base's U-Net
    assert pixels(tmp_path / "whole") != pixels(tmp_path / "plain")  # text encoder and VAE are the fine-tune's
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="cannot be loaded"):
        sample.sample(settings(tiny_base, tmp_path / "broken", ["a cat"], lora_weights=str(folder)))


def test_words_of_flagged_images_are_explained_as_attribute_would_and_images_stay(
    tiny_base: Path, tmp_path: Path
) -> None:
    from ambient_sd.guard.attribution import attribute

    out, prompts = tmp_path / "out", ["a cat", "", HOSTILE[3]]
    plain = sample.sample(settings(tiny_base, out, prompts, attribution="none"))
    before = pixels(out)
    edge = sorted(row["score"] for row in plain)[-1]
    flagged = sample.sample(settings(tiny_base, tmp_path / "flagged", prompts, threshold=edge * (1 - 1e-4)))
    assert [row["attribution"] is not None for row in flagged] == [row["flagged"] for row in flagged]
    assert sum(bool(row["flagged"]) for row in flagged) == 1 and all(row["attribution"] is None for row in plain)
    # The same folder, asked for all: what is there is explained, nothing is sampled again.
    rows = sample.sample(settings(tiny_base, out, prompts, attribution="all"))
    assert pixels(out) == before
    assert [{**row, "attribution": None} for row in rows] == plain
    assert [read_record(out / row["file"]) for row in rows] == rows
    assert [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()] == rows
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(image_seed(0, 0)))
    pipe = load_pipeline(settings(tiny_base, out, prompts).sampling)
    expected = attribute(pipe, "a cat", num_inference_steps=2, latents=noise)
    found = rows[0]["attribution"]
    assert found["tokens"] == expected.tokens and found["scores"] == pytest.approx(expected.scores, rel=1e-3)
    assert found["words"] == ["a", "cat"] and found["steps"] == 2
    assert found["word_scores"][1] == pytest.approx(sum(x * x for x in expected.scores[2:5]) ** 0.5, rel=1e-3)
    assert rows[1]["attribution"]["words"] == []
    # On the page the strongest word is the fullest; markup stays text.
    page = (out / "index.html").read_text()
    weights = [float(w) for w in re.findall(r'<span style="--w:([\d.]+)">', page)]
    assert weights.count(1.0) >= 2 and max(weights) == 1.0 and len(weights) == 2 + len(rows[2]["attribution"]["words"])
    assert Page(page).tags >= {"span"} and "script" not in Page(page).tags
    assert not [name for name, _ in Page(page).attributes if name.startswith("on")]
    assert "(no words)" in page and "no trial" in page


def test_words_are_not_looked_at_without_a_threshold_and_a_bad_word_is_one_line(
    tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sample, "TokenGradients", None)  # whoever would look at words fails
    (row,) = sample.sample(settings(tiny_base, tmp_path / "a", ["a cat"]))
    assert row["attribution"] is None and "no trial" not in (tmp_path / "a" / "index.html").read_text()
    with pytest.raises(UserError, match="attribution is 'some'"):
        sample.sample(settings(tiny_base, tmp_path / "b", ["a cat"], attribution="some"))


def test_words_that_cannot_be_explained_leave_the_images_and_say_what_to_do(
    tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(sample.TokenGradients, "step", fails)
    with pytest.raises(UserError, match="--attribution none"):
        sample.sample(settings(tiny_base, tmp_path, ["a cat"], attribution="all"))
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", fails)  # nothing is sampled again
    (row,) = sample.sample(settings(tiny_base, tmp_path, ["a cat"], attribution="none"))
    assert row["attribution"] is None and (tmp_path / "index.html").exists()


def test_with_flagged_policies_the_images_that_they_acted_on_are_explained(tiny_base: Path, tmp_path: Path) -> None:
    chosen = {"policy": "static_transition", "when": "flagged", "threshold": 1e-9}
    rows = sample.sample(settings(tiny_base, tmp_path / "out", ["a cat", ""], **chosen))
    assert [row["active"] for row in rows] == [row["attribution"] is not None for row in rows] == [True, False]


def test_help_lists_the_policies(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and re.search(r"prompt_optimization:target=FLOAT,lr=0\.05,max_steps=10", said)


def test_the_pages_commands_and_code_run_as_written(
    tiny_base: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """But for fewer steps, and a target of the tiny model's size."""
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "my-model")
    Path("ordinary.txt").write_text("a cat\na dog\na bird\na fish\n")
    Path("memorized.txt").write_text("w w w w w w\nxxxxxxxxxxxxxxxxxxxx\n0123456789\nZ Z Z Z\n")
    Path("prompts.jsonl").write_text('{"prompt": "a cat"}\n')
    (commands,) = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    lines = commands.splitlines()
    assert len(lines) == 3
    for line in lines:
        name, *words = shlex.split(line.replace("_steps 25", "_steps 2").replace("=3 ", "=0.0001,max_steps=1 "))
        assert name == "ambient-sd"
        main([*words, "--device", "cpu"])
    assert read_record("mitigated/images/00000-00.png")["iterations"] == 1
    code, adapters = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    pipe = tiny.tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    given = {"pipe": tiny.tiny_pipeline(), "lora": get_peft_model_state_dict(pipe.unet)}
    exec(compile(adapters, "docs/sampling.md", "exec"), given)
    assert "bare 16 2 2.0 " in capsys.readouterr().out
    exec(compile(code, "docs/sampling.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("a cat ")


def test_scores_of_raw_outputs_are_asked_for_on_the_command_line(tiny_base: Path, tmp_path: Path) -> None:
    rows = {}
    for space in ("noise", "output"):
        out = tmp_path / space
        main(["sample", str(tiny_base), "--prompt", "a cat", "--num_inference_steps", "2", "--score_space", space,
              "--attribution", "none", "--device", "cpu", "--out", str(out)])  # fmt: skip
        (rows[space],) = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert rows[space]["quantity"] == space
    alpha = load_pipeline(SamplingConfig(str(tiny_base), device="cpu")).scheduler.alphas_cumprod.sqrt()
    for t, noise, raw in zip(rows["noise"]["timesteps"], rows["noise"]["curve"], rows["output"]["curve"], strict=True):
        assert noise == pytest.approx(float(alpha[int(t)]) * raw, rel=1e-3)
    assert pixels(tmp_path / "noise") == pixels(tmp_path / "output")
    with pytest.raises(UserError, match=r"other settings.*score_space"):
        sample.sample(settings(tiny_base, tmp_path / "output", ["a cat"], attribution="none"))
