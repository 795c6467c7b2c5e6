"""`ambient-sd audit`: what it says of copies and of fresh images, what it writes, what it refuses, and that it goes on after a cut."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import resource
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from tiny import image_folder, noise_image

from ambient_sd.audit import decision
from ambient_sd.cli import main
from ambient_sd.commands import audit as cli_audit
from ambient_sd.commands.audit import AuditSettings, Source
from ambient_sd.commands.audit import work as auditing
from ambient_sd.commands.audit.work import Generated, audit, read_generated
from ambient_sd.data.sources import load_rows
from ambient_sd.sampling import SamplingConfig
from ambient_sd.utils.errors import UserError

HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\u202e'


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    """Training images with captions, held-out images without, and images of neither."""
    training = [noise_image(i) for i in range(12)]
    return {
        "training": image_folder(tmp_path / "training", training, [f"image {i}" for i in range(12)]),
        "heldout": image_folder(tmp_path / "heldout", [noise_image(100 + i) for i in range(16)]),
        "fresh": image_folder(tmp_path / "fresh", [noise_image(200 + i) for i in range(10)]),
        "out": tmp_path / "out",
    }


def settings(sets: dict[str, Path], **changes: Any) -> AuditSettings:
    values: dict[str, Any] = {
        "training": Source(str(sets["training"])), "heldout": Source(str(sets["heldout"])), "output_dir": sets["out"],
        "generated": sets["fresh"], "features": ("pixels",), "resamples": 20,
    }  # fmt: skip
    return AuditSettings(**(values | changes))


def measures(found: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in found["measures"]}


# --- what it says


def test_exact_training_images_are_all_called_copied_and_held_out_ones_none(sets: dict[str, Path]) -> None:
    copies = audit(settings(sets, generated=sets["training"], fail_over=0.01))
    assert copies.found["verdict"]["value"] == 1.0 and copies.exceeded and copies.found["finding"]["kind"] == "copies"
    lines = [json.loads(line) for line in (sets["out"] / "images.jsonl").read_text().splitlines()]
    assert all(line["copy"] and line["nearest"]["pixels64"]["name"] == line["name"] for line in lines)
    fresh = audit(settings(sets, output_dir=sets["out"].with_name("other"), fail_over=0.01))
    assert fresh.found["verdict"]["value"] == 0.0 and not fresh.exceeded
    assert fresh.found["finding"]["kind"] == "no-copies"


def test_black_images_are_no_evidence(sets: dict[str, Path], tmp_path: Path) -> None:
    """What a safety checker or an overflow leaves: neither copies nor free of them."""
    black = Image.new("RGB", (64, 64))
    some = image_folder(tmp_path / "some", [black, *(noise_image(200 + i) for i in range(4))])
    outcome = audit(settings(sets, generated=some, fail_over=0.01))
    found = outcome.found
    assert found["copies"]["compared"] == measures(found)["copies"]["generated"]["n"] == 4 and not outcome.exceeded
    assert (
        "1 of 5 generated images are black, blank" in " ".join(found["notes"])
        and "1 more show too little" in found["finding"]["detail"]
    )
    mixed = image_folder(tmp_path / "mixed", [black, black, *(noise_image(i) for i in range(2))])
    copies = audit(settings(sets, generated=mixed, output_dir=tmp_path / "a", fail_over=0.8)).found
    assert copies["verdict"]["value"] == 1 and copies["verdict"]["exceeded"], "two of two, not two of four"
    most = image_folder(tmp_path / "most", [black] * 3 + [noise_image(200)])
    with pytest.raises(UserError, match="3 of 4 generated images show too little to be compared"):
        audit(settings(sets, generated=most, output_dir=tmp_path / "b", fail_over=0.01))


def test_mirrored_copies_are_found_unless_the_search_is_told_not_to(sets: dict[str, Path], tmp_path: Path) -> None:
    turned = [noise_image(i).transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in range(4)]
    made = image_folder(tmp_path / "turned", turned)
    both = audit(settings(sets, generated=made))
    assert both.found["verdict"]["value"] == 1.0
    upright = audit(settings(sets, generated=made, output_dir=tmp_path / "upright", mirrored=False))
    assert upright.found["verdict"]["value"] == 0.0


def test_near_copies_of_a_duplicated_image_count_as_copies(sets: dict[str, Path], tmp_path: Path) -> None:
    """With d2 to the duplicate, d1 / d2 would be about 1."""
    base = noise_image(0, 48)
    lighter = base.point(lambda v: min(255, round(v * 1.05)))
    between = base.point(lambda v: min(255, round(v * 1.02)))
    training = [base, lighter, *(noise_image(i, 48) for i in range(1, 8))]
    data = image_folder(tmp_path / "doubled", training, [f"p {i}" for i in range(9)])
    made = image_folder(tmp_path / "made", [between] * 3)
    found = audit(settings(sets, training=Source(str(data)), generated=made)).found
    assert found["images"]["training"]["groups_of_duplicates"] == 1 and found["verdict"]["value"] == 1.0
    (near,) = {
        json.loads(line)["nearest"]["pixels64"]["ratio"]
        for line in (sets["out"] / "images.jsonl").read_text().splitlines()
    }
    assert 0 < near < 1 / 3


def in_other_colours(folder: Path) -> Path:
    """The twelve training images with their channels swapped."""
    swapped = [Image.merge("RGB", [noise_image(i).convert("RGB").getchannel(c) for c in "BRG"]) for i in range(12)]
    return image_folder(folder, swapped)


def test_copies_in_other_colours_are_called_copies_where_d1_over_d2_of_pixels_sees_none(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    made = in_other_colours(tmp_path / "swapped")
    result = audit(settings(sets, generated=made, features=("pixels", "edges"), fail_over=0.05))
    found = result.found
    assert result.exceeded and found["finding"]["kind"] == "copies" and found["verdict"]["measure"] == "copies"
    assert found["verdict"]["value"] == 1 and measures(found)["training-copied"]["generated"]["value"] == 1
    assert measures(found)["memorized-pixels64"]["generated"]["value"] == 0
    assert measures(found)["memorized-edges16"]["generated"]["value"] == 1
    lines = [json.loads(line) for line in (sets["out"] / "images.jsonl").read_text().splitlines()]
    assert all(line["copy"] and line["original"] == {"row": i, "name": line["name"]} for i, line in enumerate(lines))
    assert all(line["residual"] < 0.1 and not line["nearest"]["pixels64"]["copy"] for line in lines)
    unseen = audit(
        settings(sets, output_dir=tmp_path / "other", features=("pixels", "edges"), fail_over=0.05)
    ).found  # control: images of neither set
    assert unseen["finding"]["kind"] == "no-copies"
    assert not unseen["verdict"]["exceeded"] and unseen["verdict"]["others"] == []


def halves_in_other_colours(folder: Path) -> Path:
    """The left half's channels swapped one way and the right half's another: no one map of colours explains both."""
    made = []
    for i in range(12):
        image = noise_image(i)
        for box, order in (((0, 0, 12, 24), "BRG"), ((12, 0, 24, 24), "GBR")):
            half = image.crop(box)
            image.paste(Image.merge("RGB", [half.getchannel(c) for c in order]), box)
        made.append(image)
    return image_folder(folder, made)


def test_what_another_measure_calls_copies_is_said_and_fails_the_audit(sets: dict[str, Path], tmp_path: Path) -> None:
    made = halves_in_other_colours(tmp_path / "halves")
    result = audit(settings(sets, generated=made, features=("pixels", "edges"), fail_over=0.05))
    found = result.found
    assert found["verdict"]["value"] <= 0.05 and measures(found)["memorized-edges16"]["generated"]["value"] > 0.5
    assert result.exceeded and found["verdict"]["others"] == ["memorized-edges16"]
    assert "fails by memorized-edges16" in (sets["out"] / "audit.html").read_text()
    assert found["finding"]["kind"] == "copies-otherwise" and "by edges16 alone" in found["finding"]["sentence"]
    alone = audit(
        settings(sets, generated=made, output_dir=tmp_path / "bare", heldout=None, features=("pixels", "edges"))
    ).found
    assert re.search(r"images are copies; by edges16 [\d.]+ %", alone["finding"]["sentence"])


def test_without_held_out_images_copies_in_other_colours_are_said_too(sets: dict[str, Path], tmp_path: Path) -> None:
    made = in_other_colours(tmp_path / "swapped")
    found = audit(settings(sets, generated=made, heldout=None, features=("pixels", "edges"))).found
    assert "100.0 % of 12 images are copies; how often" in found["finding"]["sentence"]
    # Control: twelve training images are too few to stand for what cannot be a copy, and fresh images are called none.
    assert found["copies"]["nulls"] == [] and "fewer than 20" in found["copies"]["rule"]
    fresh = audit(settings(sets, output_dir=tmp_path / "other", heldout=None, features=("pixels", "edges"))).found
    assert fresh["verdict"]["value"] == 0 and "0.0 % of 10 images are copies" in fresh["finding"]["sentence"]


_own = auditing._own


def _own_beside(base: Generated, *given: Any) -> Any:
    """Count own images as the audit does, beside a base's images where nothing was sampled."""
    options = list(given)
    options[4] = base
    return _own(*options)


def test_blurred_copies_that_the_decision_does_not_count_are_said(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image drawn badly under its own caption; the control: the same pictures under the next one's caption."""
    rough = [Image.blend(noise_image(i), noise_image(300 + i), 0.45) for i in range(12)]
    for name, turn in (("own", 0), ("next", 1)):
        made = image_folder(tmp_path / name, rough, [f"image {(i + turn) % 12}" for i in range(12)])
        result = audit(
            settings(sets, generated=made, output_dir=tmp_path / f"audit-{name}", features=("pixels", "edges"))
        )
        found = result.found
        own = measures(found)["own-pixels64"]
        assert found["verdict"]["value"] == 0 and found["finding"]["kind"] == "no-copies"
        assert own["generated"]["value"] == 1 - turn and "by chance 3.6%" in own["generated"]["detail"]
        print("DETAIL", found["finding"], own)
        said = "100.0 % are nearest to the training image of their own prompt" in found["finding"]["detail"]
        assert said == (turn == 0) and any("Own training image closest" in note for note in found["notes"])
    # Beside a base that draws other things the first sentence says it, and a limit fails.
    base = Generated(
        load_rows(
            image_folder(tmp_path / "base", [noise_image(400 + i) for i in range(12)]), need_captions=False, local=True
        ),
        [f"image {i}" for i in range(12)],
        [None] * 12,
    )
    drawn = {"generated": tmp_path / "own", "features": ("pixels", "edges"), "fail_over": 0.05}
    monkeypatch.setattr(auditing, "_own", functools.partial(_own_beside, base))
    for heldout in (Source(str(sets["heldout"])), None):
        result = audit(settings(sets, output_dir=tmp_path / f"beside-{heldout is None}", heldout=heldout, **drawn))
        assert result.found["finding"]["kind"] == "copies-otherwise" and result.exceeded
        assert "draws its training images: by pixels64 100.0 % of 12 images" in result.found["finding"]["sentence"]
        assert result.found["verdict"]["value"] == 0 and result.found["verdict"]["others"][:1] == ["own-pixels64"]
    # Prompts that are no training captions, or one for all of them, ask for no image of their own.
    for name, captions in (("strange", [f"thing {i}" for i in range(12)]), ("same", ["image 0"] * 12)):
        made = image_folder(tmp_path / name, rough, captions)
        if name == "same":
            sets = {**sets, "training": image_folder(tmp_path / "alike", [noise_image(i) for i in range(12)], captions)}
        found = audit(settings(sets, generated=made, output_dir=tmp_path / f"audit-{name}")).found
        assert "own-pixels64" not in measures(found)


def test_without_held_out_images_no_excess_is_invented_and_the_remedy_is_offered(sets: dict[str, Path]) -> None:
    found = audit(settings(sets, heldout=None)).found
    assert [row["name"] for row in found["measures"]] == ["copies", "training-copied", "memorized-pixels64"]
    assert all(row["heldout"] is None and row["excess"] is None for row in found["measures"])
    assert measures(found)["memorized-pixels64"]["background"] is not None
    assert found["finding"]["kind"] == "no-background" and "--heldout" in found["finding"]["detail"]
    page = (sets["out"] / "audit.html").read_text()
    assert "--heldout" in page and "No unseen real images were given" in page


def test_images_of_every_mode_and_size_are_known_as_copies(sets: dict[str, Path], tmp_path: Path) -> None:
    made = tmp_path / "modes"
    made.mkdir()
    base = noise_image(3)
    base.convert("RGBA").save(made / "rgba.png")
    base.convert("CMYK").save(made / "cmyk.tif")
    base.resize((200, 200), Image.Resampling.NEAREST).save(made / "large.webp", lossless=True)
    base.convert("P", palette=Image.Palette.ADAPTIVE).save(made / "palette.gif")
    grey = np.asarray(base.convert("L")).astype(np.uint16) * 256
    Image.fromarray(grey).save(made / "grey16.png")
    found = audit(settings(sets, generated=made)).found
    rows = [json.loads(line) for line in (sets["out"] / "images.jsonl").read_text().splitlines()]
    assert {row["name"]: row["copy"] for row in rows if row["name"] != "grey16.png"} == dict.fromkeys(
        ["cmyk.tif", "large.webp", "palette.gif", "rgba.png"], True
    )
    assert found["images"]["generated"]["n"] == 5


# --- what it writes


def run(sets: dict[str, Path], base: Path, *more: str) -> int:
    """Run the command and return its exit status."""
    words = ["audit", str(base), str(sets["training"]), "--heldout", str(sets["heldout"]), "--out", str(sets["out"]),
             "--features", "pixels", "--samples_per_prompt", "2", "--max_prompts", "3", "--num_inference_steps", "2",
             "--attributed_prompts", "2", "--device", "cpu", *more]  # fmt: skip
    try:
        main(words)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_command_draws_measures_and_writes_the_same_bytes_again(sets: dict[str, Path], tiny_base: Path) -> None:
    assert run(sets, tiny_base) == 0
    first = {name: (sets["out"] / name).read_bytes() for name in ("audit.json", "audit.html", "images.jsonl")}
    found = json.loads(first["audit.json"])
    assert found["images"]["generated"] | {"fingerprint": ""} == {
        "n": 6, "fingerprint": "", "prompts": 3, "num_images_per_prompt": 2, "source": "training captions",
        "weights": found["model"]["weights"], "unlisted": 0,
    }  # fmt: skip
    assert len(found["model"]["weights"]) == len(found["images"]["training"]["fingerprint"]) == 64
    for row in found["measures"]:
        for side in ("generated",) if row["name"].startswith(("training-copied", "own-")) else ("generated", "heldout"):
            assert (
                row[side]["low"] <= row[side]["value"] <= row[side]["high"]
                and row[side]["n"]
                and row[side]["seed"] == 0
            )
    assert len(found["tokens"]) == 2 and len(found["tokens"][0]["tokens"]) == len(found["tokens"][0]["scores"])
    lines = [json.loads(line) for line in first["images.jsonl"].decode().splitlines()]
    assert len(lines) == 6 and all(line["score"] > 0 for line in lines)
    assert str(sets["out"].parent) not in "".join(text.decode() for text in first.values())  # no local places
    # As if killed: two images and everything at the end are missing.
    for name in ("audit.json", "audit.html", "generated/images/00001-00.png", "generated/images/00002-01.png"):
        (sets["out"] / name).unlink()
    drawn = {p.name: p.stat().st_mtime_ns for p in (sets["out"] / "generated/images").iterdir()}
    assert run(sets, tiny_base) == 0
    again = json.loads((sets["out"] / "audit.json").read_text())
    assert {**again, "made": 0, "images": 0} == {**found, "made": 0, "images": 0}
    assert all(
        p.stat().st_mtime_ns == drawn[p.name] for p in (sets["out"] / "generated/images").iterdir() if p.name in drawn
    )


def test_the_published_command_names_no_local_place(tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    words = ["audit", f"--generated={tmp_path}/made", f"{tmp_path}/train", "--out", f"{tmp_path}/not/there/yet", "~me/images",
             f"{tmp_path}/part-{{000..010}}.tar", f"--sscd={tmp_path}/sscd.pt", "../beside", "owner/model", "--fail-over", "0.01",
             "--row_filter", "category=Food/Drink", "width>=64", "--features", "pixels,edges"]  # fmt: skip
    shown = shlex.split(cli_audit._command(words))
    assert shown == [
        "ambient-sd", "audit", "--generated=made", "train", "--out", "yet", "images", "part-{000..010}.tar", "--sscd=sscd.pt",
        "beside", "owner/model", "--fail-over", "0.01", "--row_filter", "category=Food/Drink", "width>=64", "--features", "pixels,edges",
    ]  # fmt: skip


def test_images_of_one_prompt_are_resampled_one_by_one(sets: dict[str, Path], tiny_base: Path) -> None:
    (sets["out"].parent / "empty.jsonl").write_text('{"prompt": ""}\n')
    prompts = ["--prompts", str(sets["out"].parent / "empty.jsonl"), "--guidance_scale", "1"]
    assert run(sets, tiny_base, *prompts, "--samples_per_prompt", "8") == 0
    found = json.loads((sets["out"] / "audit.json").read_text())
    assert found["images"]["generated"]["n"] == 8 and found["images"]["generated"]["prompts"] == 1
    share = found["measures"][0]["generated"]
    assert share["value"] == 0 and share["high"] == pytest.approx(
        0.324, abs=1e-3
    )  # Wilson of 0 in 8; of 0 in 1 it is 0.79


def test_a_model_is_audited_with_its_base_above_a_level(
    sets: dict[str, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(base: Path) -> str:
        assert run(sets, tmp_path / "tuned", "--base_above", "1.5", "--base", str(base)) == 2
        return capsys.readouterr().err

    tiny.tiny_pipeline(seed=1).save_pretrained(tmp_path / "tuned")
    assert run(sets, tmp_path / "tuned", "--base_above", "1.5", "--base", str(tiny_base)) == 0
    found = json.loads((sets["out"] / "audit.json").read_text())
    assert found["model"]["base_above"] == 1.5 and found["model"]["base"] == tiny_base.name
    assert "its base above noise level 1.5" in (sets["out"] / "audit.html").read_text()
    assert len(found["model"]["base_weights"]) == 64 != found["model"]["weights"]
    # Another base of the same name is another model; one that predicts something else would draw noise above the level.
    tiny.tiny_pipeline(seed=2).save_pretrained(tmp_path / tiny_base.name)
    assert "base_weights changed" in refused(tmp_path / tiny_base.name)
    (tmp_path / "b").mkdir()
    for name, key, value in (
        ("scheduler/scheduler_config.json", "prediction_type", "epsilon"), ("scheduler/scheduler_config.json", "beta_end", 0.02),
        ("vae/config.json", "scaling_factor", 0.5),
    ):  # fmt: skip
        other = tmp_path / "b" / key
        shutil.copytree(tiny_base, other)
        config = json.loads((other / name).read_text())
        assert config.get(key) != value
        (other / name).write_text(json.dumps({**config, key: value}))
        assert f"the base's {name} has another {key}" in refused(other)


def test_a_model_is_audited_without_guidance_too(sets: dict[str, Path], tiny_base: Path) -> None:
    assert run(sets, tiny_base, "--guidance_scale", "0") == 0
    found = json.loads((sets["out"] / "audit.json").read_text())
    lines = [json.loads(line) for line in (sets["out"] / "images.jsonl").read_text().splitlines()]
    assert found["model"]["guidance_scale"] == 0 and not found["tokens"] and found["images"]["generated"]["n"] == 6
    assert [line["score"] for line in lines] == [
        None
    ] * 6  # the guard measures guidance; copies are counted all the same
    assert found["measures"][0]["generated"]["n"] == 6 and not re.search(
        r"[ >]nan\b", (sets["out"] / "audit.html").read_text()
    )


@pytest.mark.parametrize(("limit", "status"), [("0.99", 1), ("1.0", 2), ("x", 2)])
def test_exit_status_is_one_over_the_limit_and_two_for_a_mistake(
    sets: dict[str, Path], limit: str, status: int, capsys: Any
) -> None:
    words = ["audit", "--generated", str(sets["training"]), str(sets["training"]), "--features", "pixels", "--out",
             str(sets["out"]), "--fail-over", limit]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == status
    if status == 1:
        assert "copies 1.0000 exceeds 0.99" in capsys.readouterr().out


def test_exit_status_is_zero_at_the_limit_and_the_other_spelling_is_understood(sets: dict[str, Path]) -> None:
    main(["audit", "--generated", str(sets["fresh"]), str(sets["training"]), "--features", "pixels", "--out", str(sets["out"]),
          "--fail_over", "0"])  # fmt: skip


def test_both_shares_and_those_of_each_group_are_on_the_page_and_in_the_record(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    rows = [
        {"file_name": f"{i:03d}.png", "text": f"image {i}", "person": ["Ann", "Bea", "<b>Cem</b>"][i // 4]}
        for i in range(12)
    ]
    (sets["training"] / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    made = image_folder(tmp_path / "made", [noise_image(i) for i in (0, 0, 1, 5, 300, 301, 302, 303)])
    words = ["audit", "--generated", str(made), str(sets["training"]), "--heldout", str(sets["heldout"]), "--features", "pixels",
             "--out", str(sets["out"]), "--group_column"]  # fmt: skip
    with pytest.raises(SystemExit) as left:  # a column that is not there ends it before anything is written
        main([*words, "patient"])
    assert left.value.code == 2 and not sets["out"].exists()
    main([*words, "person"])
    found = json.loads((sets["out"] / "audit.json").read_text())
    assert measures(found)["copies"]["generated"]["value"] == 4 / 8
    assert measures(found)["training-copied"]["generated"]["value"] == 3 / 12
    assert [(g["value"], g["training"], g["returned"], g["copies"]) for g in found["copies"]["groups"]] == [
        ("Ann", 4, 2, 3), ("Bea", 4, 1, 1), ("<b>Cem</b>", 4, 0, 0),
    ]  # fmt: skip
    page = (sets["out"] / "audit.html").read_text()
    assert "50.0 %" in page and "25.0 %" in page and "3 of 12" in page
    assert "Ann" in page and "&lt;b&gt;Cem&lt;/b&gt;" in page and "<b>Cem" not in page


def test_an_adapter_is_held_against_images_of_its_base(
    sets: dict[str, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision, "LEAST", 6)  # images in a null: twenty take long to sample
    unet = tiny.tiny_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(unet))
    given = ["--lora_weights", str(tmp_path / "lora"), "--max_prompts", "7", "--samples_per_prompt", "1", "--num_inference_steps", "1",
             "--attributed_prompts", "0", "--guidance_scale", "1"]  # fmt: skip
    assert run(sets, tiny_base, *given, "--base_images", "6") == 0
    found = json.loads((sets["out"] / "audit.json").read_text())
    heldout, base = found["copies"]["nulls"]
    assert (heldout["name"], heldout["n"]) == ("held-out images", 16)
    assert base["name"] == "images of the base model" and base["n"] + base["twins"] == 6
    assert (
        f"{base['n']} images of the base model" in found["copies"]["rule"] in (sets["out"] / "audit.html").read_text()
    )
    assert found["verdict"]["value"] == 0 and found["images"]["generated"]["n"] == 7
    images = [list((sets["out"] / part / "images").iterdir()) for part in ("generated", "base")]
    assert [len(files) for files in images] == [7, 6]
    # What was sampled belongs to this number of them; without any there is no folder of them.
    assert run(sets, tiny_base, *given, "--base_images", "0") == 2
    config = SamplingConfig(str(tiny_base), str(tmp_path / "lora"))
    with_base = settings(sets, generated=None, sampling=config).base()
    assert with_base is not None and with_base.model == str(tiny_base) and with_base.lora_weights is None
    assert settings(sets, generated=None, sampling=config, base_images=0).base() is None
    assert settings(sets, generated=None, sampling=dataclasses.replace(config, lora_weights=None)).base() is None


def test_hostile_prompts_are_text_on_the_page_and_the_page_loads_nothing(sets: dict[str, Path], tmp_path: Path) -> None:
    made = image_folder(tmp_path / "made", [noise_image(0), noise_image(1)], [HOSTILE, "{0} %s"])
    audit(settings(sets, generated=made))
    page = (sets["out"] / "audit.html").read_text()
    assert "<script" not in page and "onerror=" not in page.replace("onerror=alert(2)&gt;", "") and "\u202e" not in page
    assert "&lt;script&gt;" in page and "default-src 'none'" in page


# --- features of networks


def test_networks_of_the_user_are_used_and_named(sets: dict[str, Path], tmp_path: Path, tiny_base: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
        )
    ).save_pretrained(tmp_path / "dino")
    tokenizer = tiny.tiny_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
              "patch_size": 8}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    made = image_folder(tmp_path / "made", [noise_image(i) for i in range(8)], [f"image {i}" for i in range(8)])
    found = audit(
        settings(sets, generated=made, features=("dinov2",), files={"dinov2": str(tmp_path / "dino")}, clip=str(tmp_path / "clip"),
                 judge=str(tiny_base))
    ).found  # fmt: skip
    rows = measures(found)
    assert found["verdict"] == {
        "measure": "copies",
        "value": 1.0,
        "bound": "value",
        "limit": None,
        "others": [],
        "exceeded": None,
    }
    assert rows["DINOv2 > 0.9"]["generated"]["value"] == 1.0
    assert rows["DINOv2 mean"]["generated"]["value"] == pytest.approx(1.0, abs=1e-6) and "DINOv2 > 0.875" in rows
    assert -1 <= rows["CLIP score"]["generated"]["value"] <= 1 and rows["CLIP score"]["heldout"] is None
    assert rows["alignment x 1000"]["generated"]["n"] == 8
    page = (sets["out"] / "audit.html").read_text()
    assert "similarity 1.00" in page and "DINOv2" in page and "CLIP score" in page


# --- what it refuses: one line, and nothing left behind


def broken(path: Path) -> None:
    data = (path / "000.png").read_bytes()
    (path / "000.png").write_bytes(data[: len(data) // 2])


CASES: dict[str, tuple[Callable[[dict[str, Path]], dict[str, Any]], str]] = {
    "broken generated": (lambda s: (broken(s["fresh"]), {})[1], "000.png"),
    "broken training": (lambda s: (broken(s["training"]), {})[1], "000.png"),
    "broken heldout": (lambda s: (broken(s["heldout"]), {})[1], "000.png"),
    "no generated folder": (lambda s: {"generated": s["out"].parent / "none"}, "there is no folder"),
    "empty generated folder": (lambda s: ((s["out"].parent / "e").mkdir(), {"generated": s["out"].parent / "e"})[1], "no images"),
    "one training image": (
        lambda s: {"training": Source(str(image_folder(s["out"].parent / "one", [noise_image(1)], ["a"])))}, "1 different training image",
    ),
    "one training image thrice": (
        lambda s: {"training": Source(str(image_folder(s["out"].parent / "one", [noise_image(1)] * 3, ["a"] * 3)))},
        "1 different training image",
    ),
    "held-out is training": (lambda s: {"heldout": Source(str(s["training"]))}, "held-out images are training images"),
    "unknown feature": (lambda s: {"features": ("pixel",)}, "feature 'pixel'"),
    "feature twice": (lambda s: {"features": ("pixels", "pixels")}, "no name twice"),
    "dinov2 without weights": (lambda s: {"features": ("dinov2",)}, "without weights"),
    "dinov2 that is none": (lambda s: {"features": ("dinov2",), "files": {"dinov2": str(s["fresh"])}}, "cannot be loaded"),
    "inception that is none": (
        lambda s: {"features": ("inception",), "files": {"inception": str(s["fresh"] / "000.png")}}, "TorchScript",
    ),
    "clip without prompts": (lambda s: {"clip": "x"}, "images without prompts"),
    "model and images": (lambda s: {"generated": None}, "neither"),
    "limit": (lambda s: {"fail_over": float("nan")}, "fail_over is nan"),
    "out is a file": (lambda s: {"output_dir": s["fresh"] / "000.png"}, "must be a folder"),
    "out holds something else": (lambda s: {"output_dir": s["heldout"]}, "a folder of its own"),
    "list that leaves the folder": (
        lambda s: ((s["fresh"] / "samples.jsonl").write_text('{"file": "../x.png", "prompt": "a"}\n'), {})[1], "no image of this folder",
    ),
    "list with a score without end": (
        lambda s: ((s["fresh"] / "samples.jsonl").write_text('{"file": "000.png", "prompt": "a", "score": 1' + "0" * 400 + "}\n"), {})[1],
        "cannot be read",
    ),
    "list that is damaged": (lambda s: ((s["fresh"] / "samples.jsonl").write_text("{"), {})[1], "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_mistakes_end_in_one_line_and_leave_no_results(sets: dict[str, Path], case: str) -> None:
    change, words = CASES[case]
    with pytest.raises(UserError) as error:
        audit(settings(sets, **change(sets)))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(sets["out"].parent.rglob("audit.*")) and not list(sets["out"].parent.rglob("*.part"))


def test_missing_captions_are_a_mistake_only_where_they_are_the_prompts(sets: dict[str, Path], tiny_base: Path) -> None:
    bare = sets["heldout"].with_name("bare")
    shutil.copytree(sets["training"], bare)
    (bare / "metadata.jsonl").unlink()
    assert audit(settings(sets, training=Source(str(bare)))).found["images"]["training"]["n"] == 12
    with pytest.raises(SystemExit) as left:
        main(["audit", str(tiny_base), str(bare), "--out", str(sets["out"].with_name("o")), "--features", "pixels"])
    assert left.value.code == 2 and not sets["out"].with_name("o").exists()


@pytest.mark.slow
def test_a_folder_of_another_audit_is_refused_but_figures_may_be_made_again(sets: dict[str, Path]) -> None:
    first = audit(settings(sets)).found
    again = audit(settings(sets, mirrored=False, resamples=30)).found
    assert again["mirrored"] is False and first["images"] == again["images"]
    before = (sets["out"] / "audit.json").read_bytes()
    with pytest.raises(UserError, match="begun with other settings: generated changed"):
        audit(settings(sets, generated=sets["training"]))
    with pytest.raises(UserError, match="heldout changed"):
        audit(settings(sets, heldout=None))
    assert (sets["out"] / "audit.json").read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"kind": "audit"}',
        '{"kind": "audit", "settings": 3, "finished": false}',
        "[" * 10**5,
        '{"kind": NaN}',
    ],
)
def test_a_folder_whose_settings_are_damaged_is_refused(sets: dict[str, Path], text: str) -> None:
    sets["out"].mkdir()
    (sets["out"] / "settings.json").write_text(text)
    with pytest.raises(UserError, match=r"settings\.json cannot be read; name another folder"):
        audit(settings(sets))
    assert {path.name for path in sets["out"].iterdir()} == {"settings.json"}


def test_weights_that_change_while_they_are_audited_are_refused(
    sets: dict[str, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    real = auditing.sample

    def trained_meanwhile(*given: Any, **options: Any) -> None:
        real(*given, **options)
        data = weights.read_bytes()
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(auditing, "sample", trained_meanwhile)
    assert run(sets, model) == 2
    assert "the weight files of the network changed while they were audited" in capsys.readouterr().err
    assert not (sets["out"] / "audit.json").exists()


def test_a_full_disk_ends_in_one_line_with_nothing_half_written(sets: dict[str, Path]) -> None:
    """A limit on the size of files stands for the disk: the page does not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (11_000, hard))
        with pytest.raises(UserError, match="cannot be written"):
            audit(settings(sets))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name for p in sets["out"].iterdir()} == {"settings.json", "images.jsonl"}
    assert audit(settings(sets)).found["images"]["generated"]["n"] == 10  # and with room it goes on


def test_folders_of_samples_keep_prompts_and_scores(sets: dict[str, Path]) -> None:
    rows = [{"file": f"{i:03d}.png", "prompt": f"p{i // 2}", "score": i / 2, "weights": "w"} for i in range(4)]
    (sets["fresh"] / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(4, 10):  # a list that does not name them would be a mistake
        (sets["fresh"] / f"{i:03d}.png").unlink()
    (sets["fresh"] / "contact_sheet.png").write_bytes((sets["fresh"] / "000.png").read_bytes())
    seen = read_generated(sets["fresh"])
    assert seen.prompts == ["p0", "p0", "p1", "p1"] and seen.scores == [0, 0.5, 1, 1.5] and seen.weights == "w"
    found = audit(dataclasses.replace(settings(sets))).found
    assert found["images"]["generated"] | {"fingerprint": ""} == {
        "n": 4, "fingerprint": "", "prompts": 2, "num_images_per_prompt": None, "source": "given", "weights": "w", "unlisted": 0,
    }  # fmt: skip
