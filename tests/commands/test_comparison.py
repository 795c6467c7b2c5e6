"""The comparison: ground truth and detectors by hand-made numbers; whole runs on a small random model, cut and resumed."""

from __future__ import annotations

import hashlib
import html
import json
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import tiny_flow
import torch
from PIL import Image, ImageOps

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.cli import main, parser_of
from ambient_sd.commands.compare import ComparedOptions, CompareSettings
from ambient_sd.commands.compare import work as comparison
from ambient_sd.commands.compare.work import MITIGATIONS, detector_figures, ordinary_scores, relative_figures, truth
from ambient_sd.data.dataset_options import DatasetOptions
from ambient_sd.data.sources import load_rows
from ambient_sd.guard.policies import Policy
from ambient_sd.reporting import compare_page
from ambient_sd.sampling import SamplingConfig, load_pipeline, requests_for
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import from_flags

HOSTILE = "<script>alert(1)</script> & \u202e ../../etc"


def test_a_prompt_is_memorized_if_half_of_its_images_are_copies_and_ordinary_if_none_is() -> None:
    copied = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert truth(copied.flatten(), 4) == ([0, 1], [3])


def test_a_blurred_copy_is_no_false_alarm() -> None:
    ratios = torch.tensor([[0.9, 0.95], [0.9, 0.5], [0.67, 0.99], [0.8, 0.8]], dtype=torch.float64).flatten()
    assert comparison.clear_of_copying(ratios, 2, [0, 1, 2], 2 / 3) == [0, 2]


def test_detectors_average_over_the_steps_and_generations_that_they_are_named_after() -> None:
    # Memorized prompts stand out at the first step only, and only in the mean over both generations.
    curves = torch.full((6, 2, 6), 10.0, dtype=torch.float64)
    curves[:, 0, 0] = torch.tensor([9.0, 11, 10, 10, 12, 8])
    curves[:, 1, 0] = torch.tensor([15.0, 13, 10, 10, 8, 12])
    rows = {(r["steps"], r["generations"]): r["figures"] for r in detector_figures(curves, 2, [0, 1], [2, 3, 4, 5], 0)}
    assert set(rows) == {(1, 1), (5, 1), (6, 1), (1, 2), (5, 2), (6, 2)}
    assert rows[1, 2][0]["value"] == 1.0
    assert rows[1, 1][0]["value"] == pytest.approx(4 / 8)  # 9 beats 8; 11 beats 10, 10, 8
    assert rows[1, 2][1]["name"] == "TPR@1%FPR"


def test_the_scale_is_that_of_the_ordinary_prompts() -> None:
    curves = torch.arange(24, dtype=torch.float64).view(4, 2, 3)
    scores = ordinary_scores(curves, [0, 1], 3.0)
    assert scores.first_step == 3.0  # of 0, 3, 6, 9 the lower middle one
    assert scores.all_steps_high == pytest.approx(11 * 0.95)
    assert scores.first_step_high == pytest.approx(6 + 3 * 0.97)


def test_every_mitigation_can_be_made_from_a_models_scores() -> None:
    scores = comparison.OrdinaryScores(first_step=3.0, first_step_high=5.0, all_steps_high=4.0, guidance_scale=7.5)
    made = {name: make(scores) for name, (make, _) in MITIGATIONS.items()}
    assert made.pop("none") is None
    assert all(isinstance(policy, Policy) for policy in made.values())


def test_what_a_transformer_refuses_is_left_out_with_its_reason(tmp_path: Path) -> None:
    pipe = tiny_flow.tiny_sd3_pipeline(t5=False)
    scores = comparison.OrdinaryScores(first_step=3.0, first_step_high=5.0, all_steps_high=4.0, guidance_scale=7.5)
    refused = {name: why for name, (make, _) in MITIGATIONS.items() if (why := comparison._refused(pipe, make(scores)))}
    assert set(refused) == {"GUARD", "Ren"} and all("cross-attention of a U-Net" in why for why in refused.values())
    found = {
        "memorized_prompts": 1,
        "ordinary_prompts": 1,
        "clear_prompts": 1,
        "between": 0,
        "detectors": [],
        "mitigations": {},
        "left_out": refused,
    }
    result = {"settings": {}, "command": "", "prompts": 1, "mitigated_prompts": [], "models": {"a": found}}
    assert f"- Ren left out: {refused['Ren']}" in compare_page.tables(result)
    pipe.save_pretrained(tmp_path / "sd3")
    settings = CompareSettings({"a": str(tmp_path / "sd3")}, str(BASE), tmp_path, 64)
    assert comparison.config_of(settings, str(tmp_path / "sd3")).scheduler is None, (
        "flow matching is sampled by its own"
    )
    assert comparison.config_of(settings, str(BASE)).scheduler == "dpm++"


def arguments(data: Path) -> list[str]:
    return ["compare", f"a={BASE}", "--data", str(data), "--heldout", str(data), "--judge", str(BASE), "--resolution", "64",
            "--generations", "2", "--num_inference_steps", "2", "--mitigated", "2", "--mitigations", "STP", "RT"]  # fmt: skip


def image_folder(folder: Path, images: list[Image.Image], captions: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    lines = (json.dumps({"file_name": f"{i}.png", "text": caption}) for i, caption in enumerate(captions))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def unseen_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Images that the base has never seen."""
    rows = list(load_rows(IMAGES, split="finetune"))[::100]
    folder = tmp_path_factory.mktemp("unseen")
    return arguments(image_folder(folder, [r.image for r in rows], [r.caption for r in rows]))


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of three captions the training image is what the base makes of them: it has memorized these, whatever it has seen."""
    rows = list(load_rows(IMAGES, split="finetune"))[::100]
    images, captions = [r.image for r in rows], sorted(r.caption for r in rows)
    images = [images[[r.caption for r in rows].index(caption)] for caption in captions]
    folder = tmp_path_factory.mktemp("drawn")
    settings = CompareSettings(
        {"a": str(BASE)}, str(BASE), folder, 64, num_images_per_prompt=2, num_inference_steps=2, guidance_scale=7.5
    )  # fmt: skip
    config = comparison.config_of(settings, str(BASE))
    requests, pipe = requests_for(captions, 2), load_pipeline(config)
    made = comparison.sample_requests(pipe, folder / "made", requests, config, None, "made")
    for i in range(3):
        images[i] = made.images[2 * i]
    return arguments(image_folder(folder / "images", images, captions))


@pytest.mark.slow
def test_a_run_writes_tables_sheets_and_page_and_goes_on_where_it_was_cut(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([*command, "--out", str(out)])
    first = json.loads((out / "comparison.json").read_text())
    rows = first["models"]["a"]["mitigations"]
    assert list(rows) == ["none", "STP", "RT"]
    assert {"copies", "copied", "similarity", "alignment", "hits", "distance", "seconds"} == set(rows["STP"]["figures"])
    assert (out / "a-STP.png").exists()
    text = (out / "comparison.html").read_text()
    assert "https://" not in text and 'src="data:' in text
    assert str(tmp_path) not in text + (out / "comparison.json").read_text() + (out / "settings.json").read_text()
    said = capsys.readouterr().out
    assert "| STP |" in said and "peak memory MB" in said and '<th scope="col">peak memory MB</th>' in text
    # The command is whole, its places by name only.
    words = shlex.split(first["command"])
    data = Path(command[3])
    assert first["models"]["a"]["memorized_prompts"] >= 2 and rows["none"]["figures"]["copies"]["value"] >= 0.5
    assert words[:4] == ["ambient-sd", "compare", "a=base", "--data"] and words[4] == data.name
    assert f"--output_dir {out.name} " in first["command"] + " " and "--mitigated 2" in first["command"]
    assert "/" not in first["command"] and html.escape(first["command"]) in text
    places = [f"a={BASE}" if word == "a=base" else word for word in words[1:]]
    again = [
        str(data) if w == data.name else str(BASE) if w == "base" else str(out) if w == out.name else w for w in places
    ]

    def read(line: list[str]) -> list[Any]:
        args = parser_of("compare").parse_args(line[1:])
        places, rows = from_flags(ComparedOptions, args), from_flags(DatasetOptions, args)
        return [places, rows, from_flags(CompareSettings, args, models={}, lora_weights={})]

    assert read(again) == read([*command, "--guidance_scale", "7.5", "--out", str(out)])  # the scale that was used
    if sys.platform == "linux":
        assert 0 < rows["STP"]["peak_memory_mb"] < 500
    # STP leaves guidance out for half of the way: other images, from the same noise.
    assert (out / "a-STP.png").read_bytes() != (out / "a-none.png").read_bytes()

    cells = sorted((out / "cells").rglob("*.json"))
    images = {p: p.read_bytes() for p in (out / "cells").rglob("*.png")}
    # As written by a version that did not measure memory on a CPU.
    for cell in cells[1:]:
        values = json.loads(cell.read_text())
        if isinstance(values, list) and isinstance(values[0], dict):
            cell.write_text(json.dumps([{k: v for k, v in row.items() if k != "memory_mb"} for row in values]))
    kept = {p: p.stat().st_mtime_ns for p in cells[1:]}
    for damaged, text in ((cells[0], "{"), (out / "settings.json", "[" * 10**5)):
        whole = damaged.read_bytes()
        damaged.write_text(text)
        with pytest.raises(SystemExit):
            main([*command, "--out", str(out)])
        assert f"{damaged} cannot be read" in capsys.readouterr().err
        damaged.write_bytes(whole)
    cells[0].unlink()  # cut between a call's images and the file that says they are whole
    main([*command, "--out", str(out)])
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    assert images == {p: p.read_bytes() for p in images}
    assert (
        json.loads((out / "comparison.json").read_text())["models"]["a"]["mitigations"]["STP"]["peak_memory_mb"] is None
    )
    assert capsys.readouterr().out.count(" - |") >= 2

    with pytest.raises(SystemExit) as caught:
        main([*command, "--guidance_scale", "3", "--out", str(out)])
    assert caught.value.code == 2
    assert "guidance_scale was 7.5 and is 3.0" in capsys.readouterr().err

    # Figures by an earlier definition of a copy would stand beside those of this one.
    claim = json.loads((out / "settings.json").read_text())
    del claim["settings"]["definition of a copy"]
    (out / "settings.json").write_text(json.dumps(claim))
    with pytest.raises(SystemExit):
        main([*command, "--out", str(out)])
    said = capsys.readouterr().err
    assert "other settings: definition of a copy was" in said and "--overwrite" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [(["--guidance_scale", "1"], "guidance_scale is 1"), (["--guidance_scale", "inf"], "must be a finite number"), (["--generations", "0"], "num_images_per_prompt is 0"),
     (["--mitigations", "Wenn"], "policy is 'Wenn'; the nearest known one is Wen"), (["--judge", "./nowhere"], "there is no folder"), (["--resolution", "15"], "multiple of")],
)  # fmt: skip
def test_mistakes_are_one_line(
    change: list[str], said: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, *change, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and said in errors[0]


def test_too_few_heldout_images_are_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = image_folder(tmp_path / "few", [tiny.noise_image(i) for i in range(7)], [f"image {i}" for i in range(7)])
    with pytest.raises(SystemExit):
        main([*command, "--heldout", str(few), "--out", str(tmp_path / "out")])
    assert "there are 7 held-out images; quality is measured against 8 at least" in capsys.readouterr().err


@pytest.mark.slow
def test_a_transformer_is_compared_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of its own images are training images; it is sampled at its own pipeline's guidance."""
    model, captions = (
        tmp_path / "model",
        [f"a {word}" for word in ("cat", "dog", "fox", "hen", "owl", "pig", "rat", "cow", "ape")],
    )
    tiny_flow.tiny_sd3_pipeline().save_pretrained(model)
    how = {"num_images_per_prompt": 2, "num_inference_steps": 2}
    config = comparison.config_of(CompareSettings({"a": str(model)}, str(BASE), tmp_path, 32, **how), str(model))
    made = comparison.sample_requests(
        load_pipeline(config), tmp_path / "made", requests_for(captions, 2), config, None, ""
    )
    images = [made.images[2 * i] if i < 3 else tiny.noise_image(i) for i in range(len(captions))]
    data = str(image_folder(tmp_path / "images", images, captions))
    words = ["compare", f"a={model}", "--data", data, "--heldout", data, "--judge", str(BASE), "--resolution", "32", "--generations", "2",
             "--num_inference_steps", "2", "--mitigated", "2", "--mitigations", "STP", "attention_guard"]  # fmt: skip
    main([*words, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["models"]["a"]["memorized_prompts"] >= 2
    assert list(found["models"]["a"]["mitigations"]) == ["none", "STP"]
    assert "cross-attention of a U-Net" in found["models"]["a"]["left_out"]["GUARD"]
    assert "--guidance_scale 7.0 " in found["command"]
    assert "left out" in capsys.readouterr().out


def test_models_of_the_hub_are_told_apart_by_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    """From the hub's cache, offline: three repositories, two of them with the same weights."""
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        repo = tmp_path / f"models--owner--{name}"
        unet = tiny.tiny_pipeline(seed=seed).unet
        snapshot = repo / "snapshots" / ("0" * 40)
        unet.save_pretrained(snapshot / "unet")
        (snapshot / "model_index.json").write_bytes((tiny_base / "model_index.json").read_bytes())
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
    for module in (huggingface_hub.constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    one, same, other = (comparison._digest(SamplingConfig(f"owner/{name}")) for name in ("one", "same", "other"))
    assert one == same != other
    assert (
        comparison._digest(SamplingConfig(str(tiny_base)))
        == hashlib.sha256((tiny_base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    )  # of a folder as in claims written before
    with pytest.raises(UserError, match="owner/none cannot be read"):
        comparison._digest(SamplingConfig("owner/none"))


def test_a_norm_beside_the_bases_finds_what_the_norm_alone_cannot_tell() -> None:
    base = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.5, 2.0, 6.0]).double()
    curves = (0.5 * base + 1 + torch.tensor([1.5, 1.2, 0, 0, 0, 0, 0]))[:, None, None].expand(7, 2, 6).double()
    rows = relative_figures(curves, base[:, None, None].expand(7, 2, 5), 2, [0, 1], [2, 3, 4, 5, 6], 0)
    assert {(r["steps"], r["generations"]) for r in rows} == {(1, 1), (5, 1), (1, 2), (5, 2)}
    assert all(r["figures"][0]["value"] == 1 for r in rows)
    alone = detector_figures(curves, 2, [0, 1], [2, 3, 4, 5, 6], 0)
    assert all(r["figures"][0]["value"] == 0.8 for r in alone)  # Control: the loud one stands above both


def test_hostile_prompts_are_text_on_the_page(tmp_path: Path) -> None:
    figure = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    figures: dict[str, Any] = dict.fromkeys((name for name, *_ in compare_page.COLUMNS), figure)
    result = {
        "settings": {}, "command": HOSTILE, "prompts": 1, "mitigated_prompts": [HOSTILE],
        "models": {"a": {"memorized_prompts": 1, "ordinary_prompts": 0, "clear_prompts": 0, "between": 0, "detectors": [],
                         "mitigations": {"none": {"rule": HOSTILE, "figures": figures}}}},
    }  # fmt: skip
    shown = {"a": {"none": [Image.new("RGB", (4, 4))]}}
    text = compare_page.write(tmp_path / "c.html", result, [Image.new("RGB", (4, 4))], shown).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "| none | 50.0 % [40.0, 60.0] | 50.0 % [40.0, 60.0] | 0.500" in compare_page.tables(result)


@pytest.mark.slow
def test_copies_in_other_colours_are_counted_beside_those_by_the_published_measure(tmp_path: Path) -> None:
    rows = load_rows(IMAGES, split="finetune").subset(range(0, 1000, 25))
    reals = comparison.read_reals(rows, load_rows(IMAGES, split="heldout").subset(range(0, 320, 8)))
    settings = CompareSettings({"a": str(BASE)}, str(BASE), tmp_path, 64, num_images_per_prompt=1)

    def judge(images: Any, own: Any, captions: Any) -> Any:
        return types.SimpleNamespace(value=torch.zeros(len(own)), hit=torch.zeros(len(own)))

    judge.others = 4  # type: ignore[attr-defined]

    def shares(images: list[Image.Image]) -> tuple[float, float]:
        samples = comparison.Samples(images, [{"processor_seconds": 1.0} for _ in images])
        made: Any = comparison.mitigation_figures(samples, reals, reals.captions, reals.captions, judge, settings)  # type: ignore[arg-type]
        return made["copied"].value, made["copies"].value

    assert shares(reals.images) == (1, 1)
    negative = [ImageOps.invert(image) for image in reals.images]
    published, copies = shares(negative)
    assert published == 0 and copies > 0.95
    # Control: images of other things, which the null does not hold, are copies by neither.
    unseen = list(load_rows(IMAGES, split="finetune").subset(range(12, 1000, 100)))
    assert max(shares([row.image for row in unseen] * 4)) <= 0.1


def test_a_model_that_has_memorized_nothing_is_said(
    unseen_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*unseen_command, "--out", str(tmp_path / "out")])
    assert "0 memorized and 11 ordinary prompts of a" in capsys.readouterr().err
