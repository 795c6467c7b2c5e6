"""Images on their way to a descriptor as the papers bring them there: each written out here, pixel by pixel."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from ambient_sd.audit.features import Sscd
from ambient_sd.audit.networks import Dinov2
from ambient_sd.audit.registry import FeatureOptions, choose, label
from ambient_sd.utils.errors import UserError


class Whole(torch.nn.Module):
    """A descriptor that gives back what it was shown, at a few places: 3 x 8 x 8 = 192 numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)


class Large(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :16, :16].flatten(1)[:, :512].repeat(1, 2)  # as many as sscd_disc_large gives


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.jit.script(Whole()).save(str(tmp_path / "whole.pt"))
    return tmp_path / "whole.pt"


def make_image(w: int, h: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (h // 4 + 1, w // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((w, h), Image.Resampling.BICUBIC)


def pooled(x: np.ndarray) -> torch.Tensor:
    """The means of 8 x 8 equal fields of a float image (S, S, 3), of unit norm."""
    field = x.shape[0] // 8
    means = x.reshape(8, field, 8, field, 3).mean((1, 3)).transpose(2, 0, 1).flatten()
    return torch.from_numpy(means / np.linalg.norm(means)).float()


@pytest.mark.parametrize(("w", "h"), [(300, 200), (200, 300), (64, 64), (256, 391)])
def test_wens_preprocessing_is_resize_256_centre_crop_224_and_half(file: Path, w: int, h: int) -> None:
    image = make_image(w, h)
    short = min(w, h)
    size = (int(256 * w / short), int(256 * h / short))
    array = np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float64) / 255
    top, left = round((size[1] - 224) / 2.0), round((size[0] - 224) / 2.0)
    expected = pooled((array[top : top + 224, left : left + 224] - 0.5) / 0.5)
    wen = Sscd(file, preprocessing="wen")
    torch.testing.assert_close(wen([image])[0], expected, rtol=1e-4, atol=1e-5)
    assert (wen.name, wen.size) == ("SSCD-wen", 224)
    others = (Sscd(file)([image])[0], Sscd(file, preprocessing="han")([image])[0])
    assert all((other - expected).abs().max() > 1e-2 for other in others)  # control


def test_hans_preprocessing_is_squeezed_to_320_with_imagenets_normalisation(file: Path) -> None:
    image = make_image(300, 200)
    array = np.asarray(image.resize((320, 320), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    expected = pooled((array - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    han = Sscd(file, preprocessing="han")
    torch.testing.assert_close(han([image])[0], expected, rtol=1e-4, atol=1e-5)
    assert (han.name, han.size) == ("SSCD-han", 320)


def test_sscd_takes_the_number_of_dimensions_from_the_file(file: Path, tmp_path: Path) -> None:
    torch.jit.script(Large()).save(str(tmp_path / "large.pt"))
    assert Sscd(file).dim == 192
    large = Sscd(tmp_path / "large.pt", preprocessing="wen")
    assert large.dim == 1024 and large([]).shape == (0, 1024) and large([make_image(64, 64)]).shape == (1, 1024)
    torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match=r"none\.pt does not take an image of 288 x 288"):
        Sscd(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preprocessing": "dcr"}, "there are squeeze288, wen, han"),
        ({"preprocessing": "wen", "size": 288}, "part of it"),
    ],
)
def test_a_preprocessing_that_is_none_is_refused(file: Path, given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sscd(file, **given)


def test_names_of_the_command_line_choose_the_preprocessing(file: Path) -> None:
    made = choose(["sscd", "sscd-wen", "SSCD-HAN"], {"sscd": str(file)})
    assert [feature.name for feature in made] == ["SSCD", "SSCD-wen", "SSCD-han"]
    assert [label(feature.name) for feature in made] == ["SSCD", "SSCD-wen", "SSCD-han"]
    assert label("dinov2-paper") == "DINOv2-paper"
    with pytest.raises(UserError, match=r"feature dinov2-paper without weights.*give --dinov2"):
        choose(["dinov2-paper"])


def test_weights_of_a_variant_are_given_by_the_flag_of_its_network() -> None:
    assert FeatureOptions(features="pixels,sscd-wen,dinov2-paper", sscd="x", dinov2="y").chosen()[0] == [
        "pixels",
        "sscd-wen",
        "dinov2-paper",
    ]
    with pytest.raises(UserError, match="--dinov2 without dinov2"):
        FeatureOptions(features="sscd-wen", sscd="x", dinov2="y").chosen()


@pytest.mark.skipif(Sscd._find() is None or Sscd._find().suffix != ".onnx", reason="no ONNX file")  # type: ignore[union-attr]
def test_a_file_with_imagenets_normalisation_inside_is_refused_for_wens() -> None:
    with pytest.raises(UserError, match="has ImageNet's mean and deviation inside"):
        Sscd(preprocessing="wen")


# -- DINOv2 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(path)
    return path


def mirrored(n: int, total: int) -> list[int]:
    """Which of n places stands at each of `total`: the middle ones as they are, the rest by reflection without the edge itself."""
    first = (total - n) // 2
    return [abs(k - first) if k - first < n else 2 * (n - 1) - (k - first) for k in range(total)]


def test_the_papers_dinov2_pads_by_reflection_at_the_images_own_size(dino: Path) -> None:
    sizes = [(32, 32), (28, 28), (40, 19), (32, 32), (64, 64)]
    images = [make_image(w, h, seed) for seed, (w, h) in enumerate(sizes)]
    model = Dinov2Model.from_pretrained(dino).eval()
    feature = Dinov2(str(dino), preprocessing="paper", batch_size=4)
    found = feature(images)
    for row, image in zip(found, images, strict=True):  # one at a time: sizes do not mix
        array = np.asarray(image)
        h, w = (math.ceil(n / 14) * 14 for n in array.shape[:2])
        padded = array[mirrored(array.shape[0], h)][:, mirrored(array.shape[1], w)] / 255
        with torch.no_grad():
            expected = model(pixel_values=torch.from_numpy(padded).float().permute(2, 0, 1)[None]).pooler_output[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    assert (feature.name, feature.thresholds, feature.dim) == ("DINOv2-paper", (0.9, 0.875), 16)
    plain = Dinov2(str(dino))(images)
    assert (plain - found).abs().max(1).values.min() > 1e-3  # control
    assert feature([]).shape == (0, 16)


def test_an_image_too_small_to_be_reflected_is_refused_in_one_line(dino: Path) -> None:
    with pytest.raises(UserError, match=r"5 x 5 pixels for DINOv2-paper.*multiple of 14") as error:
        Dinov2(str(dino), preprocessing="paper")([make_image(5, 5)])
    assert "\n" not in str(error.value)
    for given in ({"preprocessing": "paper", "size": 224}, {"preprocessing": "none"}):
        with pytest.raises(UserError, match="preprocessing"):
            Dinov2(str(dino), **given)  # type: ignore[arg-type]
