"""The decision: hand-computed p, discoveries by brute force, copies found in every form and no image that the model never saw."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from changed_images import CHANGES, SIZE, blurred, scene, scenes, series
from PIL import Image, ImageDraw, ImageOps

from ambient_sd.audit import decision
from ambient_sd.audit.decision import EACH, LEAST, RATE, SAME, CopyDecision, discoveries, squares, tail
from ambient_sd.audit.metrics import memorized
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.registry import choose
from ambient_sd.utils.errors import UserError


def sixty_four(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- p


def test_p_is_the_conformal_share_by_hand() -> None:
    null = torch.arange(1, 41, dtype=torch.float64)  # 5 % quantile: 1 + 0.05 * 39 = 2.95
    found = tail(null, sixty_four(3.5, 20.0, 20.5, 100.0))
    expected = [(1 + 3) / 41, (1 + 20) / 41, (1 + 20) / 41, 41 / 41]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_below_the_quantile_p_falls_by_the_power_law_by_hand() -> None:
    null = torch.arange(1, 41, dtype=torch.float64)
    low, high = 2.95, 1 + 0.2 * 39
    steep = math.log(4) / math.log(high / low)
    assert 1 < steep < 2
    values = [2.0, 1.0, 0.1, 0.0]
    expected = [0.05 * (v / low) ** steep for v in values]
    assert tail(null, sixty_four(*values)).tolist() == pytest.approx(expected, rel=1e-9)
    # Where the null has no spread the power is limited: nothing is certain because of a narrow null.
    narrow = torch.full((40,), 2.0, dtype=torch.float64)
    assert tail(narrow, sixty_four(1.0)).item() == pytest.approx(0.05 * 0.5**decision.STEEPEST)


def test_p_never_falls_as_values_grow_and_infinite_ones_are_no_copies() -> None:
    null = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort().values + 0.3
    values = torch.linspace(0, 2, 400, dtype=torch.float64)
    below, above = tail(null, values[values < null[2]]), tail(null, values[values > null[-1]])
    assert (below.diff() >= 0).all() and (above == 1).all() and below.max() <= 0.05
    assert tail(null, sixty_four(math.inf)).item() == 1.0
    # A null of a few: the conformal p alone, at least 1 / (n + 1).
    few = null[:8]
    assert tail(few, sixty_four(0.0)).item() == pytest.approx(1 / 9)


def brute(p: list[float], rate: float, each: float) -> list[bool]:
    """Benjamini & Hochberg as it is written: for every k, whether the k-th smallest is at most rate k / N."""
    n, cut = len(p), -1.0
    for k in range(1, n + 1):
        value = sorted(p)[k - 1]
        if value <= rate * k / n:
            cut = value
    return [value <= cut and value <= each for value in p]


@pytest.mark.parametrize("seed", range(12))
def test_discoveries_equal_a_brute_force(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    p = torch.rand(40, dtype=torch.float64, generator=draw)
    p[: 3 * seed] *= 10.0 ** (-seed % 5)
    p[5] = p[6]  # ties
    for rate, each in ((RATE, EACH), (0.2, 1.0), (0.01, 0.5)):
        assert discoveries(p, rate, each).tolist() == brute(p.tolist(), rate, each)


def test_discoveries_of_nothing_and_of_all() -> None:
    assert discoveries(torch.zeros(0, dtype=torch.float64)).tolist() == []
    assert discoveries(torch.zeros(3, dtype=torch.float64)).all()
    assert not discoveries(torch.ones(3, dtype=torch.float64)).any()


# --- copies among images that are none


@pytest.fixture(scope="module")
def decide() -> CopyDecision:
    return CopyDecision(scenes(0, 24), unseen={"held-out images": scenes(1000, 24)})


def test_changed_copies_are_found_among_unseen_images_and_no_unseen_one_is(decide: CopyDecision) -> None:
    copies = [change(scene(i)) for i, change in enumerate(CHANGES.values())]
    found = decide([*copies, *scenes(2000, 16)])
    n = len(copies)
    missed = [name for name, copy in zip(CHANGES, found.copy.tolist(), strict=False) if not copy]
    assert not missed and found.row[:n].tolist() == list(range(n))
    assert not found.copy[n:].any() and (found.p[n:] > EACH).all()
    assert (found.ratio[:n].max() < found.ratio[n:].min()) and len(found) == n + 16
    # Control: without a copy among them nothing is discovered.
    assert not decide(scenes(3000, 16)).copy.any()
    assert "24 held-out images" in decide.rule and "1%" in decide.rule


def test_a_blank_image_is_no_copy_and_none_is_decided_of_none(decide: CopyDecision) -> None:
    blank = decide([Image.new("RGB", (SIZE, SIZE), shade) for shade in ("white", "black", "grey")])
    assert not blank.copy.any() and torch.isinf(blank.residual).all() and (blank.p == 1).all()
    assert len(decide([])) == 0


def sketch(seed: int, ink: int = 0, width: int = 1, size: int = 1024) -> Image.Image:
    """Six lines on white: at 64 pixels next to nothing."""
    points = np.random.default_rng(seed).integers(size // 10, size - size // 10, (6, 2))
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).line([(int(x), int(y)) for x, y in points], fill=(ink, ink, ink), width=width)
    return image


@pytest.mark.parametrize(("ink", "width", "size"), [(0, 1, 1024), (0, 1, 512), (200, 3, 512)])
def test_copies_of_drawings_that_show_hardly_anything_are_copies_and_others_are_not_cleared(
    ink: int, width: int, size: int
) -> None:
    training = [sketch(i, ink, width, size) for i in range(24)]
    decide = CopyDecision(training)
    jpeg = io.BytesIO()
    training[5].save(jpeg, "JPEG", quality=90)
    found = decide(
        [*training[:4], training[4].transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.open(jpeg).convert("RGB")]
    )
    assert found.copy.all() and found.compared.all() and found.row.tolist() == list(range(6))
    others = decide(
        [
            *(sketch(i, ink, width, size) for i in range(50, 56)),
            Image.new("RGB", (64, 64)),
            Image.new("RGB", (64, 64), "white"),
        ]
    )
    assert not others.copy.any(), "control: other drawings are none"
    assert not others.compared[-2:].any() and not (others.compared & (others.residual <= SAME)).any()
    blank = CopyDecision([*training, Image.new("RGB", (64, 64), "white")])([Image.new("RGB", (64, 64), "white")])
    assert not blank.copy.any() and not blank.compared.any(), (
        "a blank image among the training images is copied by every blank one"
    )


@pytest.fixture(scope="module")
def of_scenes() -> CopyDecision:
    return CopyDecision(scenes(0, 40), unseen={"held-out images": scenes(1000, 40)})


SHAPES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "middle at 5:4": lambda image: ImageOps.fit(image, (SIZE * 5 // 4, SIZE)),
    "middle at 4:3": lambda image: ImageOps.fit(image, (SIZE * 4 // 3, SIZE)),
    "upright middle": lambda image: ImageOps.fit(image, (SIZE, SIZE * 4 // 3)),
    "padded to 3:2": lambda image: ImageOps.pad(image, (SIZE * 3 // 2, SIZE), color="white"),
    "framed": lambda image: ImageOps.expand(image.resize((SIZE * 5 // 8,) * 2), SIZE * 3 // 16, "black"),
    "squeezed between bands": lambda image: ImageOps.expand(image.resize((SIZE, SIZE // 2)), (0, SIZE // 4), "black"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_copies_of_another_shape_or_in_a_frame_are_found_and_other_images_in_it_are_not(
    shape: str, of_scenes: CopyDecision
) -> None:
    change = SHAPES[shape]
    found = of_scenes([change(image) for image in [*scenes(0, 8), *scenes(2000, 8)]])
    assert found.copy[:8].all() and found.row[:8].tolist() == list(range(8)) and not found.copy[8:].any()


def test_any_square_of_a_long_image_is_found() -> None:
    long = [
        Image.merge("RGB", [Image.effect_noise((9, 3), 90 + i).resize((3 * SIZE, SIZE), Image.Resampling.BICUBIC)] * 3)
        for i in range(24)
    ]
    assert len(squares(long[0])) == 5 and len(squares(Image.new("RGB", (400, 64)))) > 9
    decide = CopyDecision(long)
    for place in (0, 0.25, 0.5, 0.75, 1):
        at = round(2 * SIZE * place)
        found = decide([image.crop((at, 0, at + SIZE, SIZE)) for image in long[:6]])
        assert found.copy.all() and found.row.tolist() == list(range(6)), place


def test_the_decision_is_the_same_twice_and_leaves_random_numbers_alone(decide: CopyDecision) -> None:
    images = [CHANGES["turned"](scene(1)), scene(4001)]
    state = torch.get_rng_state()
    first = decide(images)
    assert torch.equal(torch.get_rng_state(), state)
    second = decide(images)
    assert torch.equal(first.p, second.p) and torch.equal(first.residual, second.residual)


def test_the_background_is_of_the_null_each_without_itself(decide: CopyDecision) -> None:
    background = decide.background("held-out images")
    assert background is not None and background.tolist() == [False] * 24
    assert decide.background("images of the base model") is None


# --- a series


@pytest.fixture(scope="module")
def draw() -> Callable[[range], list[Image.Image]]:
    member = series().member
    return lambda numbers: [member(s, n) for s in range(6) for n in numbers]


@pytest.fixture(scope="module")
def of_a_series(draw: Callable[[range], list[Image.Image]]) -> CopyDecision:
    return CopyDecision(draw(range(6)), unseen={"held-out images": draw(range(6, 10))})


def test_blurred_copies_out_of_a_series_are_found_where_d1_over_d2_finds_few(
    draw: Callable[[range], list[Image.Image]], of_a_series: CopyDecision
) -> None:
    training = draw(range(6))
    rows = list(range(0, 30, 3))
    copies = [blurred(training[row], 1.2) for row in rows]
    members = draw(range(10, 13))  # never seen, of the same series
    found = of_a_series([*copies, *members])
    assert found.copy[:10].all() and found.row[:10].tolist() == rows
    assert not found.copy[10:].any()
    (pixels,) = choose(("pixels",), {}, "cpu")
    assert int(memorized(nearest(pixels(copies), pixels(training))).sum()) < 5
    # Control: among held-out members alone there is no copy either.
    assert not of_a_series(members).copy.any()


# --- duplicates in the training set


@pytest.mark.parametrize("labelled", [True, False])
def test_near_duplicates_in_the_training_set_shield_no_copy(labelled: bool) -> None:
    training = scenes(0, 24)
    training += [blurred(training[i], 0.4).point(lambda v: round(v * 0.95)) for i in range(3)]
    labels = [*range(24), 0, 1, 2] if labelled else None
    decide = CopyDecision(training, labels, {"held-out images": scenes(1000, 24)})
    copies = [blurred(CHANGES["cropped"](scene(i)), 0.5) for i in range(3)]
    found = decide([*copies, *scenes(2000, 6)])
    assert found.copy.tolist() == [True] * 3 + [False] * 6
    assert [row % 24 for row in found.row[:3].tolist()] == [0, 1, 2]


# --- the null


def test_twins_in_the_null_are_counted_and_hide_nothing() -> None:
    twins = [CHANGES["another hue"](scene(20)), CHANGES["mirrored"](scene(21))]
    decide = CopyDecision(scenes(0, 24), unseen={"held-out images": [*scenes(1000, 24), *twins]})
    (null,) = decide.nulls
    assert (null.n, null.twins) == (24, 2)
    copies = [CHANGES[name](scene(i)) for i, name in enumerate(("JPEG", "cropped", "turned"))]
    assert decide([*copies, *scenes(2000, 6)]).copy.tolist() == [True] * 3 + [False] * 6
    background = decide.background("held-out images")
    assert background is not None and int(background.sum()) == 2 and len(background) == 26


def test_with_a_null_that_is_too_small_only_what_no_eye_tells_apart_is_a_copy() -> None:
    training = scenes(0, LEAST - 2)  # too few to stand for a null themselves
    decide = CopyDecision(training, unseen={"held-out images": scenes(1000, LEAST - 1)})
    assert decide.nulls == [] and f"fewer than {LEAST}" in decide.rule
    found = decide([scene(1), CHANGES["grey"](scene(2)), CHANGES["JPEG"](scene(3)), scene(2000)])
    assert found.copy.tolist() == [True, True, False, False] == (found.residual <= SAME).tolist()
    assert (found.p == 1).all() and found.row[:3].tolist() == [1, 2, 3]


def test_without_unseen_images_the_training_images_calibrate_each_without_itself(
    draw: Callable[[range], list[Image.Image]],
) -> None:
    training = scenes(0, 24)
    decide = CopyDecision(training)
    (null,) = decide.nulls
    assert null.name == "training images among themselves" and null.n == 24 and null.twins == 0
    found = decide([CHANGES["cropped"](scene(3)), CHANGES["noisy"](scene(4)), *scenes(2000, 8)])
    assert found.copy.tolist() == [True, True] + [False] * 8
    # Duplicates stand for one: equal labels are not held against one another.
    doubled = CopyDecision([*training, blurred(scene(0), 0.4)], [*range(24), 0])
    assert doubled.nulls[0].n == 24 and doubled.nulls[0].twins == 0


def test_the_worst_of_two_nulls_decides() -> None:
    """Images of the base that come as near as the model's: what is no nearer than they are is no copy."""
    near = [CHANGES["JPEG"](scene(i)) for i in range(LEAST)]
    at = [CHANGES["JPEG"](scene(i)) for i in range(20, 23)]
    heldout = {"held-out images": scenes(1000, LEAST)}
    alone = CopyDecision(scenes(0, 24), unseen=heldout)
    both = CopyDecision(scenes(0, 24), unseen={**heldout, "images of the base model": near})
    assert [null.name for null in both.nulls] == ["held-out images", "images of the base model"]
    assert (both(at).p >= alone(at).p).all() and alone(at).copy.all() and not both(at).copy.any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(CopyDecision, scenes(0, 1)), "1 different training image"),
        (partial(CopyDecision, scenes(0, 3), [0, 0, 0]), "1 different training image"),
        (partial(CopyDecision, scenes(0, 3), [0, 1]), "2 labels for 3 training images"),
        (partial(CopyDecision, []), "0 different training image"),
    ],
)
def test_a_set_without_surroundings_is_refused(make: Callable[[], CopyDecision], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
