"""A threshold is handed out for the model and the sampling that it was measured on, and for nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import guard_tools as tools
import pytest
import torch
from guard_calibration import calibration
from peft import LoraConfig

from ambient_sd.guard.calibration import FILE_NAME, Calibration, ModelFingerprint, Sampling
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate


def test_threshold_is_that_of_the_steps_and_images_and_errors_say_what_there_is() -> None:
    found = calibration(tools.pipeline())
    assert [found.threshold(1, 1), found.threshold(1, 4), found.threshold(5, 1)] == [3.0, 2.5, 2.0]
    # A whole run, counted in evaluations of the network or in steps.
    assert found.threshold(21, 1) == found.threshold(20, 1) == 1.5 and found.threshold(21, 4) == 1.0
    assert found.origin == (
        "calibrated: FPR 1 % on 500 ordinary prompts; AUC unknown: nothing shows that it works on this model"
    )
    # Heun evaluates about twice a step: a run stopped after as many evaluations as a whole one has steps is no whole run.
    assert found.threshold(21, 1, stopped=True) == 1.5
    with pytest.raises(UserError, match="no threshold for 20 steps"):
        found.threshold(20, 1, stopped=True)
    for steps, images in ((2, 1), (50, 1), (1, 3), (5, 4)):
        with pytest.raises(UserError, match="calibrated were 1, 5, 21 steps, and 1, 4 images"):
            found.threshold(steps, images)


def test_file_brings_everything_back_and_names_no_place(tmp_path: Path) -> None:
    pipe = tools.pipeline()
    pipe.unet.register_to_config(_name_or_path=str(tmp_path / "secret"))
    made = calibration(pipe)
    path = made.save(tmp_path)
    assert path.name == FILE_NAME and Calibration.load(tmp_path) == Calibration.load(path, pipe) == made
    assert "secret" not in path.read_text() and str(tmp_path) not in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    pipe, other = tools.pipeline(), tools.pipeline()
    calibration(pipe).save(tmp_path)
    Calibration.load(tmp_path, other)  # control: equal weights in another object
    with torch.no_grad():
        other.unet.conv_out.bias[0] += 1e-6
    with pytest.raises(UserError, match="another network was calibrated: its weights"):
        Calibration.load(tmp_path, other)
    adapted = tools.pipeline()
    adapted.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="adapters"):
        Calibration.load(tmp_path, adapted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_weights_in_half_precision_are_the_same_model_and_fine_tuned_ones_are_not(dtype: torch.dtype) -> None:
    pipe = tools.pipeline()
    full = ModelFingerprint.of(pipe.unet)
    assert full.differs(ModelFingerprint.of(tools.pipeline().unet.to(dtype))) is None
    tuned = tools.pipeline().unet
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.mul_(1.02)
    assert full.differs(ModelFingerprint.of(tuned.to(dtype))) == "its weights are others"


def test_strength_of_an_adapter_is_part_of_the_model() -> None:
    unet = tools.pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="a")
    before = ModelFingerprint.of(unet)
    unet.set_adapters(["a"], weights=[0.5])
    assert before.differs(ModelFingerprint.of(unet)) is not None


@pytest.mark.parametrize(
    ("change", "named"),
    [({"num_inference_steps": 10}, "num_inference_steps 20 was calibrated, not 10"),
     ({"guidance_scale": 3.0}, "guidance_scale 7.5 was calibrated, not 3.0"), ({"height": 64}, "height 32")],
)  # fmt: skip
def test_other_sampling_is_named(change: dict[str, Any], named: str) -> None:
    pipe = tools.pipeline()
    made, usual = calibration(pipe), {"num_inference_steps": 20, "guidance_scale": 7.5, "height": None, "width": None}
    made.check(pipe, Sampling.of(pipe, **usual))
    made.check(pipe, Sampling.of(pipe, **(usual | {"height": 32, "width": 32})))
    with pytest.raises(UserError, match=named):
        made.check(pipe, Sampling.of(pipe, **(usual | change)))


def test_another_sampler_or_setting_of_it_is_named() -> None:
    pipe = tools.pipeline(scheduler="euler")
    made, usual = calibration(pipe), {"num_inference_steps": 20, "guidance_scale": 7.5, "height": None, "width": None}
    for other, named in (
        ("ddim", "sampler EulerDiscreteScheduler"),
        ("euler-karras", "use_karras_sigmas|timestep_spacing"),
    ):
        with pytest.raises(UserError, match=named):
            made.check(pipe, Sampling.of(tools.pipeline(scheduler=other), **usual))


@pytest.mark.parametrize(
    "damage", ["{", "[]", "null", "cut", "nan", "negative", "zero", "none", "strange", "format", "kind"]
)
def test_damaged_files_end_in_one_line(tmp_path: Path, damage: str) -> None:
    path = calibration(tools.pipeline()).save(tmp_path)
    values = json.loads(path.read_text())
    if damage in ("nan", "negative", "zero"):
        values["entries"][0]["value"] = {"nan": float("nan"), "negative": -1.0, "zero": 0.0}[damage]
    elif damage == "none":
        values["entries"] = []
    elif damage == "strange":
        values["surprise"] = 1
    elif damage == "format":
        values["format"] = 2
    elif damage == "kind":
        values["ordinary"] = "many"
    text = {"cut": path.read_text()[:200]}.get(damage, damage if damage in ("{", "[]", "null") else json.dumps(values))
    path.write_text(text)
    with pytest.raises(UserError, match="cannot be read") as error:
        Calibration.load(tmp_path)
    assert "\n" not in str(error.value)


def test_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no"):
        Calibration.load(tmp_path)


def test_figures_of_detection_survive_the_file(tmp_path: Path) -> None:
    made = calibration(tools.pipeline())
    entry = dataclasses.replace(made.entries[0], auc=Estimate(0.99, 0.9, 1.0, 20), tpr=Estimate(0.8, 0.5, 1.0, 20))
    made = dataclasses.replace(made, entries=[entry], memorized=20)
    made.save(tmp_path / "x.json")
    assert Calibration.load(tmp_path / "x.json").entry(1, 1) == entry
