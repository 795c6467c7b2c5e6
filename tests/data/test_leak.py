"""The leak that sharing noise plugs, in a trained network: m copies under m noises teach it the clean image.

Four images of the demo's set, each eight times (other JPEG quality, a little brighter or darker), train the embedded base
under `--near_duplicates share` and `off`, all else equal. Then both networks get the same inputs, clean latents under
fresh noise of levels above s_n, and say what x0 they see. Off must come nearer to the clean latents, per element of them:

    error = mean ||h(x_t, caption) - x0||^2 / dim

About four minutes on one core: `pytest -m slow tests/data/test_leak.py -s` prints the figures that docs/slow.md holds.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageEnhance

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.data.latents import encode
from ambient_sd.data.sources import ImageDataset, ImageRow, load_rows
from ambient_sd.data.stream import SampleStream
from ambient_sd.data.views import ViewRule
from ambient_sd.families.encoders import ImageEncoder
from ambient_sd.families.sd import SD
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.training.plan import base_of

COUNT, COPIES, STEPS, LEVEL = 4, 8, 100, 2.0
LEVELS = (3.0, 5.0, 8.0)
SEEDS = range(4)
DRAWS = 8  # fresh noises per image and level


def write_copies(images: list[ImageRow], folder: Path) -> Path:
    """Each image COPIES times: the first as it is, the others re-encoded and a little brighter or darker."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as rows:
        for i, image in enumerate(images):
            for copy in range(COPIES):
                light = 1.0 + 0.01 * ((copy + 1) // 2) * (-1) ** copy
                data = io.BytesIO()
                ImageEnhance.Brightness(image.image).enhance(light).save(data, "JPEG", quality=97 - 2 * copy)
                changed = Image.open(data).convert("RGB") if copy else image.image
                changed.save(folder / f"{i}-{copy}.png")
                rows.write(json.dumps({"file_name": f"{i}-{copy}.png", "text": image.caption}) + "\n")
    return folder


def settings(folder: Path, out: Path, seed: int, near_duplicates: str) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path=str(BASE), train_data_dir=str(folder), resolution=64, center_crop=True,
        train_batch_size=8, max_train_steps=STEPS, learning_rate=1e-3, caption_dropout=0.0, report_to="none",
        ambient_level=LEVEL, checkpointing_steps=100_000, seed=seed, noise_seed=seed, output_dir=str(out),
        near_duplicates=near_duplicates,
    )  # fmt: skip


@torch.no_grad()
def errors(unet: Any, base: Any, images: ImageDataset, captions: torch.Tensor, seed: int) -> dict[float, float]:
    """Error of the predicted x0 against the clean latents, by level, on the same inputs for every network."""
    encoder = ImageEncoder(SD, AutoencoderKL.from_pretrained(BASE / "vae").eval())
    rule = ViewRule(64, center_crop=True, random_flip=False, per_image=True, noise_seed=seed)
    stream = SampleStream(len(images), 0)
    x0 = encode(encoder, [rule.sample(images[i], stream, i) for i in range(len(images))], noise_seed=seed)
    schedule, predicts = base.schedule, base.scheduler.config.prediction_type
    found = {}
    for level in LEVELS:
        t = torch.full((len(x0),), round(schedule.timestep(level)))
        alpha, sigma = (c.float()[:, None, None, None] for c in schedule.coefficients(t))
        g = torch.Generator().manual_seed(seed)
        total = 0.0
        for _ in range(DRAWS):
            x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=g)
            output = unet(x_t, t, captions, return_dict=False)[0]
            h = alpha * x_t - sigma * output if predicts == "v_prediction" else (x_t - sigma * output) / alpha
            total += float((h - x0).square().mean())
        found[level] = total / DRAWS
    return found


def a_seed(seed: int, folder: Path) -> dict[str, dict[float, float]]:
    pool = load_rows(IMAGES, row_filter=[("subset_60", "=", "true")])
    chosen = np.random.default_rng(seed).permutation(len(pool))[:COUNT].tolist()
    originals = pool.subset(chosen).check()
    copies = write_copies(list(originals), folder / "images")
    result = {}
    for name in ("base", "share", "off"):
        config = settings(copies, folder / name, seed, "share" if name == "base" else name)
        base = base_of(config)
        if name != "base":
            groups = len(run(config, progress=False).plan.images.groups)
            assert groups == (COUNT if name == "share" else 0)
        unet: Any = UNet2DConditionModel.from_pretrained(BASE if name == "base" else folder / name, subfolder="unet")
        text = base.captions()(originals.captions)["hidden"]
        result[name] = errors(unet.eval(), base, originals, text, seed)
    return result


@pytest.mark.slow
def test_copies_under_their_own_noises_teach_the_clean_image_and_under_one_noise_do_not(tmp_path: Path) -> None:
    found = []
    for seed in SEEDS:
        (tmp_path / str(seed)).mkdir()
        found.append(a_seed(seed, tmp_path / str(seed)))
        print(seed, {k: {s: round(e, 4) for s, e in v.items()} for k, v in found[-1].items()}, flush=True)
    for level in LEVELS:
        gain = np.array([1.0 - f["off"][level] / f["share"][level] for f in found])
        half = 3.182 * gain.std(ddof=1) / len(gain) ** 0.5  # Student's t, 3 degrees of freedom
        print(f"s = {level}: off is nearer by {gain.mean():.1%} +- {half:.1%} of share's error", flush=True)
        assert gain.mean() - half > 0, "95 % interval over the seeds"
