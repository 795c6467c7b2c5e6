"""`--keep best` keeps the last evaluation before copying begins, and its weights are those of that checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from ambient_sd.data.captions import compose
from ambient_sd.training import validation
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.keeping import Kept, decide
from ambient_sd.training.loop import run
from ambient_sd.utils.errors import UserError


def curve(*shares: float) -> list[dict[str, float]]:
    return [{"step": 10 * i, "copies": share} for i, share in enumerate(shares)]


@pytest.mark.parametrize(
    ("shares", "limit", "step", "began", "confirmed"),
    [
        ((0, 0, 0, 0), 0.0, 30, None, False),
        ((0, 0, 0.1, 0.2), 0.0, 10, 20, True),
        ((0, 0, 0.1, 0, 0), 0.0, 40, None, False),  # a false alarm
        ((0, 0, 0, 0.1), 0.0, 20, 30, False),  # nothing can confirm the last one
        ((0.1, 0.1, 0.1, 0.2, 0.2), 0.0, 20, 30, True),  # the base's own count is no copying
        ((0, 0.1, 0.1, 0.3, 0.3), 0.2, 20, 30, True),
        ((0, 0.1, 0.1), 0.0, None, 10, True),
        ((0,), 0.0, None, None, False),
    ],
)
def test_last_clean_evaluation_is_kept(shares: Any, limit: float, step: int | None, began: int | None, confirmed: bool) -> None:  # fmt: skip
    kept = decide(curve(*shares), limit)
    assert (kept.step, kept.began, kept.confirmed) == (step, began, confirmed)


def redrawn(*shares: float | None) -> list[dict[str, float]]:
    """No copies by the decision; of these shares of images the closest training image is their own."""
    return [e if own is None else {**e, "own": own} for e, own in zip(curve(*[0.0] * len(shares)), shares, strict=True)]


@pytest.mark.parametrize(
    ("shares", "step", "began"),
    [
        ((0.02, 0.3, 0.52, 0.5), 30, None),  # half of the images beyond the base's is not above it
        ((0.02, 0.3, 0.53, 0.9), 10, 20),
        ((0.02, 0.3, 0.9, 0.3, 0.3), 40, None),  # a false alarm
        ((0.4, 0.7, 0.89, 0.89), 30, None),  # a base whose captions say as much
        ((0.4, 0.7, 0.91, 0.91), 10, 20),
        ((None, None, None), 20, None),  # captions tell nothing apart
        ((None, 0.9, 0.9), 20, None),  # the base was not measured: nothing says what captions alone give
    ],
)
def test_redrawn_images_are_copying_too(shares: Any, step: int, began: int | None) -> None:
    kept = decide(redrawn(*shares))
    assert (kept.step, kept.began) == (step, began)
    assert (kept.drawn is None) is (began is None)


def test_evaluations_that_could_not_be_compared_say_nothing() -> None:
    black = {"copies": 0.0, "n": 1, "blank": 7}
    one, two, three = [*curve(0, 0, 0)[1:], {"step": 30, "copies": 0.2}]
    kept = decide([*curve(0), one, {**two, **black}])
    assert kept.step == 10 and kept.describe().endswith(
        "1 evaluation drew images that show too little to be compared: look at probe/"
    )
    assert "the last one that could be compared" in kept.describe()
    assert decide([*curve(0), one, {**two, **black}, three]).began == 30, "it does not lie between copying and its end"
    kept = decide([*curve(0), {**one, **black}])
    assert (
        kept.step is None
        and kept.began is None
        and "nothing is kept; no evaluation could be compared" in kept.describe()
    )
    assert decide([*curve(0), {**one, "n": 7, "blank": 1}]).step == 10, "control: one of eight"


def test_a_base_that_copies_already_is_said() -> None:
    assert "a copy rate above 90 %, which is allowed or the base's own" in decide(curve(0.9, 0.9, 0.9)).describe()
    assert "the base itself draws 95 % of the probe's images" in decide(redrawn(0.95, 1.0, 1.0)).describe()
    assert "the base" not in decide(redrawn(0.4, 0.5)).describe()


def test_either_sign_confirms_the_other() -> None:
    mixed = [{**e, "copies": copies} for e, copies in zip(redrawn(0, 0.1, 0.7, 0.2), (0, 0, 0, 0.1), strict=True)]
    kept = decide(mixed)
    assert (kept.step, kept.began, kept.confirmed, kept.drawn) == (10, 20, True, 0.7)


def test_composed_captions_are_new_and_of_the_same_words() -> None:
    captions = ["a red apple, flat", "a blue house, flat", "a green tree, flat", "a small dog, flat"]
    made = compose(captions, 12, seed=1)
    assert len(made) == len(set(made)) == 12
    assert not set(made) & set(captions)
    known = {word for caption in captions for word in caption.split()} | {"apple", "house", "tree", "dog"}
    assert all(set(caption.replace(",", " ,").split()) <= known | {","} for caption in made)
    assert compose(captions, 12, seed=1) == made != compose(captions, 12, seed=2)
    assert compose(["one", "one"], 3) == compose(["", ""], 3) == compose([], 3) == []


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that samples training images from step 6 on: an untrained network of this size copies nothing by itself."""
    folder = tiny.tiny_folder(tmp_path / "images", count=24)
    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    sample, calls = validation.sample, []

    def planting(pipe: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        found = sample(pipe, prompts, *args, **options)
        calls.append(prompts)
        copies = planting.begin is not None and len(calls) // 2 >= planting.begin and len(calls) % 2 == 1
        return validation.Samples([[image] for image in images[: len(prompts)]], found.scores) if copies else found

    planting.begin = 3  # type: ignore[attr-defined]  # evaluations before copying begins, that of the base among them
    monkeypatch.setattr(validation, "sample", planting)

    def make(name: str, begin: int | None = 3, **values: Any) -> TrainConfig:
        planting.begin = begin  # type: ignore[attr-defined]
        calls.clear()
        return TrainConfig(
            str(tiny_base), train_data_dir=str(folder), resolution=32, train_batch_size=4, max_train_steps=12, report_to="none",
            output_dir=str(tmp_path / name), learning_rate=1e-3, probe_steps=2, probe_images=4, keep="best", **values,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("values", [{}, *(pytest.param(v, marks=pytest.mark.slow) for v in ({"use_ema": True}, {"lora": True})), {"lora": True, "use_ema": True}], ids=str)  # fmt: skip
def test_result_is_the_kept_checkpoint(config: Any, values: dict[str, Any]) -> None:
    kept = run(config("kept", checkpoints_total_limit=1, **values), progress=False)
    assert kept.kept == Kept(step=4, began=6, confirmed=True, allowed=0.0)
    assert kept.steps == 8, "the run ends at the second evaluation in a row"
    assert "kept step 4; copying began at step 6" in kept.describe()
    out = kept.output
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"], (
        "the kept one is spared"
    )
    assert [e["step"] for e in kept.evaluations] == [0, 2, 4, 6, 8] and all("kid" in e for e in kept.evaluations)
    assert (out / "probe" / "step-4-new.png").is_file()

    def straight(steps: int) -> Path:
        alone = config(f"straight-{steps}", begin=None, **values)
        alone.max_train_steps, alone.keep, alone.probe_steps = steps, "last", None
        return Path(run(alone, progress=False).output)

    # A run that ends at step 4 by itself has these weights; one that ends at 8 has not.
    name = "pytorch_lora_weights.safetensors" if "lora" in values else "unet/diffusion_pytorch_model.safetensors"
    result = load_file(out / name)
    last = straight(8) if "use_ema" in values else out / "checkpoint-8"
    for folder, same in ((straight(4), True), (last, False)):
        other = load_file(folder / name)
        assert all(torch.equal(other[k], v) for k, v in result.items()) is same


def test_resumed_run_keeps_what_a_straight_one_keeps(config: Any) -> None:
    straight = run(config("straight", lora=True), progress=False)
    weights = load_file(straight.output / "pytorch_lora_weights.safetensors")
    resumed = run(config("straight", begin=0, lora=True, resume_from_checkpoint="checkpoint-6"), progress=False)
    assert resumed.evaluations == straight.evaluations
    assert resumed.kept == straight.kept
    again = load_file(straight.output / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(weights[k], v) for k, v in again.items())


def test_copying_before_the_first_evaluation_keeps_nothing(config: Any) -> None:
    with pytest.raises(UserError, match="copying began before the first evaluation, step 2"):
        run(config("none", begin=1, lora=True), progress=False)


def test_trained_captions_are_no_measure_of_quality(config: Any) -> None:
    plain = config("plain", lora=True)
    from ambient_sd.training.plan import open_images

    with pytest.raises(UserError, match="probe_prompts has"):
        run(config("known", lora=True, probe_prompts=[open_images(plain).captions[0]]), progress=False)


def test_options_without_their_mode_are_refused() -> None:
    for values, text in (
        ({"keep": "best"}, "--probe_steps"),
        ({"probe_steps": 2, "probe_prompts": ["a"]}, "--keep best"),
    ):
        with pytest.raises(UserError, match=text):
            TrainConfig("base", train_data_dir="images", **values)
