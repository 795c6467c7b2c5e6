"""Prior preservation: class images generated or given, trained beside the training images, resumed to the bit; and the resizing filter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from launching import launch
from PIL import Image
from safetensors.torch import load_file

from ambient_sd.families.lora import WEIGHTS_NAME
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import TrainingBatch, run
from ambient_sd.training.record import RunRecord
from ambient_sd.utils.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
WORKER = (
    "import json, sys\nfrom ambient_sd.training.config import TrainConfig\nfrom ambient_sd.training.loop import run\n"
    "run(TrainConfig(**json.loads(sys.argv[1])), progress=False)\n"
)
Settings = Callable[..., TrainConfig]


@pytest.fixture
def settings(tiny_base: Path, tiny_images: Path, tmp_path: Path) -> Settings:
    def make(name: str = "out", **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32, "learning_rate": 3e-3,
            "train_batch_size": 2, "max_train_steps": 2, "report_to": "none", "output_dir": str(tmp_path / name), "center_crop": True,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_images: Path) -> Path:
    """A folder that the base has filled with three class images."""
    root = tmp_path_factory.mktemp("classes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ambient_sd.training.validation.INFERENCE_STEPS", 3)
        run(TrainConfig(str(tiny_base), train_data_dir=str(tiny_images), resolution=32, train_batch_size=1, max_train_steps=1, report_to="none",
                        output_dir=str(root / "out"), **asked(root / "class")), progress=False)  # fmt: skip
    return root / "class"


def asked(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "with_prior_preservation": True,
        "class_data_dir": str(folder),
        "class_prompt": "a disc",
        "num_class_images": 3,
        **changes,
    }


def copied(classes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classes, tmp_path / "class"))


def watched(config: TrainConfig) -> tuple[RunRecord, list[TrainingBatch]]:
    seen: list[TrainingBatch] = []
    return run(config, progress=False, on_batch=seen.append), seen


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / UNET)


def alike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


def records(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.output_dir) / "losses.jsonl").read_text().splitlines()]


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_each_batch_has_as_many_class_images(settings: Settings, classes: Path) -> None:
    more = {"gradient_accumulation_steps": 2, "caption_dropout": 0.0}
    _, without = watched(settings("without", **more))
    record, seen = watched(settings("with", **asked(classes), **more))
    own, theirs = [b for b in seen if not b.prior], [b for b in seen if b.prior]
    assert [len(b.keys) for b in own] == [len(b.keys) for b in theirs] == [2] * 4
    assert all(b.captions == ["a disc"] * 2 for b in theirs)
    # Generated images need no fixed noise; the training images keep theirs, and every draw that they have without the flag.
    assert all(b.eps_n is None for b in theirs) and all(b.eps_n is not None for b in own)
    for a, b in zip(own, without, strict=True):
        assert a.keys == b.keys and torch.equal(a.noise, b.noise) and torch.equal(a.x0, b.x0)
    assert not torch.equal(own[0].noise, theirs[0].noise)
    assert all(r["prior_loss"] > 0 for r in records(record.plan.config))
    assert all("prior_loss" not in r for r in records(settings("without", **more)))


def test_gradients_are_the_sum_by_weight(settings: Settings, classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain SGD without clipping: the step of the sum is the sum of the steps."""

    def sgd(config: TrainConfig, groups: list[dict[str, Any]], rate: float, step: int) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(groups, lr=rate)
        for group in optimizer.param_groups:
            group["initial_lr"] = rate
        return optimizer

    monkeypatch.setattr("ambient_sd.training.optimizers.make", sgd)
    values: dict[str, Any] = {"max_train_steps": 1, "max_grad_norm": 1e9, "caption_dropout": 0.0}

    def step(name: str, **more: Any) -> torch.Tensor:
        config = settings(name, **values, **more)
        run(config, progress=False)
        base = load_file(Path(str(config.pretrained_model_name_or_path)) / UNET)
        return torch.cat([(value - base[name]).flatten() for name, value in weights(config).items()]).double()

    alone, once, twice = (
        step("alone"),
        step("once", **asked(classes)),
        step("twice", **asked(classes), prior_loss_weight=2.0),
    )
    assert (once - alone).norm() > 0.01 * alone.norm()
    assert (twice - alone - 2 * (once - alone)).norm() < 0.01 * (once - alone).norm()
    # The mean over the samples kept is the training images' own: with all of them dropped the class images' part stays.
    kept: dict[str, Any] = {"memorization_threshold": 1e-9, "dropped_mean": "kept"}  # all of them
    assert (step("kept", **asked(classes), **kept) - (once - alone)).norm() < 0.01 * (once - alone).norm()


def test_a_resumed_run_with_class_images_is_the_straight_one(settings: Settings, classes: Path) -> None:
    for name, more in {
        "lora": {"lora": True, "lora_dropout": 0.2},
        "cached": {"latent_cache_dir": str(classes.parent / "cache")},
    }.items():
        values = {**asked(classes), **more, "checkpointing_steps": 1}
        straight = run(settings(name, **values), progress=False)
        resumed = run(settings(name, resume_from_checkpoint="checkpoint-1", **values), progress=False)
        assert resumed.first_step == 1 and resumed.losses == straight.losses
        assert resumed.means == straight.means
        with pytest.raises(UserError, match="written with prior"):
            run(settings(name, resume_from_checkpoint="checkpoint-1", **values, prior_loss_weight=0.5), progress=False)


def test_only_missing_class_images_are_generated(settings: Settings, classes: Path, tmp_path: Path) -> None:
    folder = copied(classes, tmp_path)
    (folder / "00001.png").unlink()
    stamp = (folder / "00000.png").stat().st_mtime_ns
    run(settings(max_train_steps=1, **asked(folder, num_class_images=4)), progress=False)
    made, before = images(folder), images(classes)
    assert sorted(made) == ["00000.png", "00001.png", "00002.png", "00003.png"]
    assert made["00001.png"] == before["00001.png"] and len(set(made.values())) == 4
    assert (folder / "00000.png").stat().st_mtime_ns == stamp
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [s["image"] for s in scores] == [0, 1, 2, 1, 3] and all(s["score"] > 0 for s in scores)
    assert str(tmp_path) not in (folder / "settings.json").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"class_prompt": "a cat"}, "class_prompt was a disc and is a cat"), ({"resolution": 64, "allow_upscaling": True}, "resolution was 32 and is 64"),
     ({"seed": 5}, "seed was 0 and is 5")],
)  # fmt: skip
def test_class_images_of_other_settings_are_refused(
    settings: Settings, classes: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(settings(**{**asked(classes), **changes}), progress=False)


def test_class_images_of_another_base_are_refused(settings: Settings, classes: Path, tmp_path: Path) -> None:
    tiny.tiny_pipeline(seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="was begun with other settings"):
        run(settings(**asked(classes), pretrained_model_name_or_path=str(tmp_path / "other")), progress=False)


def test_real_class_images_keep_one_noise_each(settings: Settings, tiny_images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dogs"
    shutil.copytree(tiny_images, folder, ignore=shutil.ignore_patterns("metadata.jsonl"))
    for i, path in enumerate(sorted(folder.glob("*.png"))):  # one is also a training image; others are nobody's else
        if i:
            tiny.noise_image(70 + i).save(path)
    _, seen = watched(settings(**asked(folder, num_class_images=8), max_train_steps=8))
    noise: dict[str, torch.Tensor] = {}
    for batch in seen:
        assert batch.eps_n is not None
        for key, eps in zip(batch.keys, batch.eps_n, strict=True):
            assert torch.equal(noise.setdefault(key, eps), eps)
    own, theirs = ({key for b in seen if b.prior is which for key in b.keys} for which in (False, True))
    assert len(own & theirs) == 1 and len(noise) == 15
    _, plain = watched(settings("plain", objective="plain", **asked(folder, num_class_images=8)))
    assert all(batch.eps_n is None for batch in plain)


def test_regularisation_images_keep_their_captions(settings: Settings, classes: Path, tmp_path: Path) -> None:
    """kohya's folders: `img/` holds training images, `reg/` regularisation images, `N_words` repeats and the caption."""
    for place, words, first in (("img", "2_sks dog", 0), ("reg", "1_dog", 70)):
        tiny.image_folder(tmp_path / "kohya" / place / words, [tiny.noise_image(first + i) for i in range(4)])
    (tmp_path / "kohya" / "reg" / "1_dog" / "000.txt").write_text("an old dog")
    source = {"train_data_dir": str(tmp_path / "kohya"), "caption_dropout": 0.0}
    record, seen = watched(settings(**source, prior_loss_weight=0.5))
    own, theirs = ({c for batch in seen if batch.prior is which for c in batch.captions} for which in (False, True))
    assert own == {"sks dog"} and theirs == {"dog", "an old dog"}
    assert all(batch.eps_n is not None for batch in seen) and record.plan.prior is not None
    assert record.plan.prior.describe(0.5) == "4 real images, weight 0.5"
    with pytest.raises(UserError, match="both are class images"):
        run(settings("both", **source, **asked(classes)), progress=False)


def tall(seed: int) -> Image.Image:
    return Image.frombytes("RGB", (24, 48), tiny.noise_image(seed, 48).crop((0, 0, 24, 48)).tobytes())


def test_class_images_keep_their_shape_in_buckets(settings: Settings, classes: Path, tmp_path: Path) -> None:
    both = [tiny.noise_image(1, 32), tiny.noise_image(2, 32), tall(3), tall(4)]
    tiny.image_folder(tmp_path / "images", both, ["a", "b", "c", "d"])
    tiny.image_folder(tmp_path / "dogs", [tiny.noise_image(60 + i, 32) if i % 2 else tall(60 + i) for i in range(4)])
    shapes = {}
    for name, given in {"real": asked(tmp_path / "dogs", num_class_images=4), "generated": asked(classes)}.items():
        _, seen = watched(settings(name, train_data_dir=str(tmp_path / "images"), aspect_ratio_buckets="32,32;48,24", max_train_steps=4, **given))  # fmt: skip
        shapes[name] = [{tuple(b.x0.shape[2:]) for b in seen if b.prior is which} for which in (False, True)]
        assert all(b.noise.shape == b.x0.shape and (b.eps_n is None or b.eps_n.shape == b.x0.shape) for b in seen)
    square, high = (16, 16), (24, 12)
    assert shapes == {"real": [{square, high}, {square, high}], "generated": [{square, high}, {square}]}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_class_images_train_text_encoders(settings: Settings, tmp_path: Path, family: str) -> None:
    values: dict[str, Any] = {
        **asked(tmp_path / "class", num_class_images=2), "lora": True, "train_text_encoder": True, "checkpointing_steps": 1,
        "learning_rate": 1e-2,
    }  # fmt: skip
    if family == "sdxl":
        tiny.tiny_sdxl_pipeline().save_pretrained(tmp_path / "sdxl")
        values["pretrained_model_name_or_path"] = str(tmp_path / "sdxl")
    straight, seen = watched(settings("out", **values))
    trained = load_file(tmp_path / "out" / WEIGHTS_NAME)
    theirs = [b for b in seen if b.prior]
    assert len(theirs) == 2 and all((b.time_ids is not None) is (family == "sdxl") for b in theirs)
    resumed = run(settings("out", resume_from_checkpoint="checkpoint-1", **values), progress=False)
    assert resumed.losses == straight.losses and alike(trained, load_file(tmp_path / "out" / WEIGHTS_NAME))
    # Their captions move the encoders: with another weight of their loss these end elsewhere.
    run(settings("heavy", **values, prior_loss_weight=4.0), progress=False)
    heavy = load_file(tmp_path / "heavy" / WEIGHTS_NAME)
    moved = [
        n for n, v in trained.items() if n.startswith("text_encoder") and not torch.allclose(v, heavy[n], atol=1e-5)
    ]
    assert moved and {n.partition(".")[0] for n in moved} == {
        "text_encoder",
        *(["text_encoder_2"] if family == "sdxl" else []),
    }


@pytest.mark.slow
def test_two_processes_train_the_text_encoders_of_one(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    found = []
    for processes in (1, 2):
        config = settings(f"out{processes}", lora=True, train_text_encoder=True, use_ema=True, checkpointing_steps=3, max_train_steps=3,
                          train_batch_size=4 // processes, learning_rate=1e-2)  # fmt: skip
        done = launch(processes, tmp_path / "worker.py", config.to_dict())
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(load_file(tmp_path / f"out{processes}" / "checkpoint-3" / WEIGHTS_NAME))
    ups = [n for n in found[0] if n.startswith("text_encoder") and "lora_B" in n]
    assert ups and any(found[0][n].abs().max() > 1e-3 for n in ups)
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=2e-5)
    # control: the half of the batches that one process sees alone leads elsewhere
    half = settings("half", lora=True, train_text_encoder=True, use_ema=True, checkpointing_steps=3, max_train_steps=3, train_batch_size=2, learning_rate=1e-2)  # fmt: skip
    run(half, progress=False)
    other = load_file(tmp_path / "half" / "checkpoint-3" / WEIGHTS_NAME)
    assert not all(torch.allclose(found[0][n], other[n], rtol=1e-3, atol=2e-5) for n in ups)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"class_prompt": None}, "class_prompt is missing"), ({"class_data_dir": None}, "class_data_dir is missing"),
     ({"with_prior_preservation": False}, "with_prior_preservation is off"), ({"prior_loss_weight": 0.0}, "above 0")],
)  # fmt: skip
def test_incomplete_or_idle_settings_are_refused(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        settings(**asked(tmp_path / "class", **changes))
    assert not (tmp_path / "class").exists()


def test_folders_that_cannot_serve_are_refused(settings: Settings, tiny_images: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    tiny.noise_image(1).save(tmp_path / "few" / "a.png")
    for folder, said in (
        (tmp_path / "few", "with 1 images that were not generated here"),
        (tiny_images, "that is train_data_dir too"),
    ):
        with pytest.raises(UserError, match=said):
            run(settings(**asked(folder)), progress=False)
    with pytest.raises(UserError, match="there are no class images"):
        run(settings(prior_loss_weight=0.5), progress=False)


@pytest.mark.slow
def test_two_processes_train_the_class_images_of_one(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    found = []
    for processes in (1, 2):
        config = settings(f"out{processes}", **asked(tmp_path / f"class{processes}"), train_batch_size=4 // processes)
        done = launch(processes, tmp_path / "worker.py", config.to_dict())
        assert done.returncode == 0, done.stderr[-3000:]
        found.append((records(config), images(tmp_path / f"class{processes}")))
    assert found[0][1] == found[1][1] and len(found[0][1]) == 3
    for name in ("loss", "prior_loss"):
        assert [r[name] for r in found[0][0]] == pytest.approx([r[name] for r in found[1][0]], rel=1e-4)


def test_another_resizing_filter_is_another_run(settings: Settings, tmp_path: Path) -> None:
    x0, cache = {}, {"latent_cache_dir": str(tmp_path / "cache"), "checkpointing_steps": 1}
    for name in ("lanczos", "bicubic"):
        _, seen = watched(settings(name, image_interpolation_mode=name, max_train_steps=1, **cache))
        x0[name] = seen[0].x0
    _, seen = watched(settings("default", max_train_steps=1))
    assert torch.equal(seen[0].x0, x0["lanczos"])
    assert not torch.equal(x0["lanczos"], x0["bicubic"])
    with pytest.raises(UserError, match="written with image_interpolation_mode = 'bicubic'"):
        run(settings("bicubic", resume_from_checkpoint="latest", **cache, max_train_steps=3), progress=False)
