"""The table of changed copies: what must be found, what must not, and that mirror images cost no false alarms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from ambient_sd.audit.features import Edges, Features, Pixels, embed
from ambient_sd.audit.neighbours import nearest
from ambient_sd.utils.errors import UserError
from experiments.transformations import TRANSFORMATIONS, detection, embed_all, table, transformed


def image(seed: int) -> Image.Image:
    patches = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((40, 40), Image.Resampling.BICUBIC)


def test_every_change_keeps_size_and_mode_and_is_a_function_of_the_seed() -> None:
    for name, change in TRANSFORMATIONS.items():
        a, b = (transformed([image(0), image(1)], change, 3) for _ in range(2))
        assert [p.size for p in a] == [(40, 40)] * 2 and {p.mode for p in a} == {"RGB"}
        assert all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)), name
        assert (a[0].tobytes() == image(0).tobytes()) == (name == "none"), name
    other = transformed([image(0)], TRANSFORMATIONS["noise, 16 of 255"], 4)[0]
    assert other.tobytes() != transformed([image(0)], TRANSFORMATIONS["noise, 16 of 255"], 3)[0].tobytes()


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, bool], tuple[float, float]]:
    features, names = [Pixels(16)], ["none", "mirrored", "noise, 16 of 255", "middle 75 % cut out"]
    training = [image(i) for i in range(30)]
    found = {}
    for mirrored in (False, True):
        for cell in detection(
            embed_all(training[:10], features, names=names), list(range(10)),
            embed_all([image(100 + i) for i in range(20)], features, names=names), embed(training, features), features,
            duplicates=list(range(30)), mirrored=mirrored,
        ):  # fmt: skip
            found[cell.transformation, mirrored] = (cell.detected.value, cell.false_alarms.value)
    return found


def test_exact_and_noisy_copies_are_found_and_no_held_out_image_is(
    cells: dict[tuple[str, bool], tuple[float, float]],
) -> None:
    for mirrored in (False, True):
        assert cells["none", mirrored] == (1.0, 0.0) and cells["noise, 16 of 255", mirrored] == (1.0, 0.0)
    assert cells["middle 75 % cut out", True] == (0.0, 0.0)  # what pixels cannot see


def test_mirrored_copies_are_found_only_by_their_mirror_image(
    cells: dict[tuple[str, bool], tuple[float, float]],
) -> None:
    assert cells["mirrored", False][0] == 0.0 and cells["mirrored", True] == (1.0, 0.0)


def test_a_copy_that_is_nearest_to_another_image_is_not_detected() -> None:
    features = [Pixels(16)]
    queries = embed_all([image(0)], features, names=["none"])
    heldout = embed_all([image(9), image(8)], features, names=["none"])
    training = embed([image(i) for i in range(3)], features)
    (cell,) = detection(queries, [1], heldout, training, features, duplicates=[0, 1, 2], mirrored=False)
    assert cell.detected.value == 0.0


def test_toned_pixels_do_not_see_brightness_and_contrast_but_see_what_differs() -> None:
    standardized, plain = Pixels(16, standardized=True), Pixels(16)
    a = image(1).point(lambda v: 60 + v // 4)  # away from black and white, where a change is lost
    lighter = a.point(lambda v: v + 40)
    assert (
        float((standardized([a]) - standardized([lighter])).norm())
        < 0.01
        < float((plain([a]) - plain([lighter])).norm())
    )
    assert float((standardized([a]) - standardized([image(2)])).norm()) > 10
    flat = standardized([Image.new("RGB", (8, 8), "white")])
    assert torch.isfinite(flat).all() and torch.equal(flat, standardized([Image.new("RGB", (9, 9), "white")]))
    darker = ImageEnhance.Brightness(a).enhance(0.7)
    assert float((standardized([a]) - standardized([darker])).norm()) < 2


def test_edges_see_copies_in_other_colours_where_pixels_do_not_and_know_other_images() -> None:
    training = [image(i) for i in range(20)]
    swapped = [Image.merge("RGB", [p.getchannel(c) for c in "BRG"]) for p in training]
    edges = Edges()
    assert torch.allclose(edges(swapped), edges(training), atol=1e-4)
    found = nearest(
        edges([TRANSFORMATIONS["hue turned by 120 degrees"](p, np.random.default_rng(0)) for p in training]),
        edges(training),
    )
    assert found.index[:, 0].tolist() == list(range(20)) and float((found.ratio < 1 / 3).float().mean()) > 0.9
    by_pixels = nearest(Pixels()(swapped), Pixels()(training))
    assert float((by_pixels.ratio < 1 / 3).float().mean()) == 0  # control
    others = nearest(edges([image(100 + i) for i in range(20)]), edges(training))
    assert float(others.ratio.min()) > 1 / 3  # control: other images are no copies in any colour
    for side in (1, 2, 5, 128):
        with pytest.raises(UserError, match="divisor of 64, at least 4"):
            Edges(side)


def ramp(low: tuple[int, int, int], high: tuple[int, int, int]) -> Image.Image:
    across = np.linspace(0, 1, 64)[None, :, None]
    return Image.fromarray((np.array(low) * (1 - across) + np.array(high) * across).repeat(64, 0).astype(np.uint8))


@pytest.mark.parametrize("feature", [Edges(), Pixels(standardized=True)], ids=["edges", "standardized"])
def test_plain_images_are_no_copies_of_a_blank_one_and_copies_of_plain_ones_are_found(feature: Features) -> None:
    blank = Image.new("RGB", (64, 64), "white")
    known = feature([*(image(i) for i in range(20)), blank, Image.new("RGB", (64, 64), "black")])
    colours = [(40, 90, 200), (250, 250, 250), (128, 128, 128), (3, 3, 3)]
    plain = [Image.new("RGB", (64, 64), colour) for colour in colours]
    if feature.name == "edges16":  # of one slope everywhere, so without a contour; standardized they are not plain
        plain += [ramp((10, 60, 200), (30, 200, 20)), ramp((0, 0, 0), (90, 80, 70))]
    assert float(nearest(feature(plain), known).ratio.min()) > 1 / 3
    # Control: equal images are copies still, and so is a changed one of a drawing that is hardly there.
    found = nearest(feature([blank.resize((128, 128))]), known)
    assert found.index[0, 0] == 20 and float(found.ratio[0]) == 0
    faint = Image.blend(Image.new("RGB", (64, 64), (128, 128, 128)), image(3).resize((64, 64)), 0.2)
    changed = faint.copy()
    changed.putpixel((10, 10), (120, 120, 120))
    near = nearest(feature([changed]), torch.cat([known[4:], feature([faint])]))
    assert near.index[0, 0] == 18 and float(near.ratio[0]) < 1 / 3


def test_edges_are_the_gradient_of_all_channels() -> None:
    """Held against a loop over pixels, on a ramp whose gradient is known, and on a flat image, which has none."""
    rows = np.zeros((64, 64, 3), np.uint8)
    rows[:, 32:, 0], rows[:, 32:, 1] = 200, 100  # one upright contour in two channels
    found = Edges(64)._embed(rows[None])[0].reshape(64, 64)
    strength = torch.zeros(64, 64)
    # Sobel / 8 spreads a step of height h over two columns, h / 2 each.
    strength[:, 31:33] = ((200 / 255) ** 2 + (100 / 255) ** 2) ** 0.5 / 2
    expected = (strength - strength.mean()) / strength.std(correction=0)
    assert torch.allclose(found, expected, atol=1e-4)
    assert set(Edges()._embed(np.full((1, 64, 64, 3), 7, np.uint8)).flatten().tolist()) == {-1.0, 1.0}


def test_the_table_is_markdown_with_intervals(cells: dict[tuple[str, bool], tuple[float, float]]) -> None:
    features = [Pixels(16)]
    sets = [embed_all([image(i) for i in (0, 1)], features, names=["none"]) for _ in range(2)]
    training = embed([image(i) for i in range(3)], features)
    text = table(detection(sets[0], [0, 1], sets[1], training, features, duplicates=[0, 1, 2], mirrored=True))
    assert (
        text.splitlines()[0] == "| | pixels16, mirror searched |" and text.splitlines()[2] == "| none | 100 [34, 100] |"
    )
