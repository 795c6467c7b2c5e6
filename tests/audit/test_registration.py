"""What the residual keeps small - recoloured, blurred, moved copies - and what it keeps large: every other image."""

from __future__ import annotations

import pytest
import torch
from changed_images import CHANGES, SIZE, scene, scenes
from PIL import Image

from ambient_sd.audit.registration import SCALES, Poses, Registered, prepare, register

COUNT, COPIED = 24, 4


@pytest.fixture(scope="module")
def training() -> torch.Tensor:
    return prepare(scenes(0, COUNT))


@pytest.fixture(scope="module")
def poses(training: torch.Tensor) -> Poses:
    return Poses(training)


@pytest.fixture(scope="module")
def unseen(training: torch.Tensor, poses: Poses) -> torch.Tensor:
    """The least residual of images of the same kind that are no copies."""
    return register(prepare(scenes(1000, 24)), training, poses=poses).residual[SCALES[0]].amin(1)


def best(found: Registered) -> tuple[list[float], list[int]]:
    least = found.residual[SCALES[0]].min(1)
    return least.values.tolist(), found.index.gather(1, least.indices[:, None])[:, 0].tolist()


def test_nothing_is_left_of_an_exact_copy(training: torch.Tensor, poses: Poses, unseen: torch.Tensor) -> None:
    residual, rows = best(register(training[:COPIED], training, poses=poses))
    assert rows == list(range(COPIED)) and max(residual) < 0.01
    assert float(unseen.min()) > 0.5  # control: of what is no copy much is left


@pytest.mark.parametrize("change", CHANGES)
def test_less_is_left_of_a_changed_copy_than_of_every_unseen_image(
    change: str, training: torch.Tensor, poses: Poses, unseen: torch.Tensor
) -> None:
    changed = prepare([CHANGES[change](scene(i)) for i in range(COPIED)])
    residual, rows = best(register(changed, training, poses=poses))
    assert rows == list(range(COPIED))
    # A white border leaks into the edge of what it surrounds; the rest stays far below.
    share = 0.9 if change == "bordered" else 0.65
    assert max(residual) < share * float(unseen.min())


def test_mirror_images_are_left_out_where_they_are_not_looked_for(training: torch.Tensor, poses: Poses) -> None:
    queries = prepare([CHANGES["mirrored"](scene(2)), CHANGES["cropped"](scene(3))])
    residual, rows = best(register(queries, training, poses=poses, mirrored=False))
    assert residual[0] > 0.3 and rows[1] == 3 and residual[1] < 0.3


def test_one_that_is_barred_is_not_found(training: torch.Tensor, poses: Poses) -> None:
    barred = torch.eye(COUNT, dtype=torch.bool)[:2]
    found = register(training[:2], training, not_allowed=barred, poses=poses)
    residual, rows = best(found)
    assert rows[0] != 0 and rows[1] != 1 and min(residual) > 0.3
    assert all(torch.isinf(found.residual[s][found.index == torch.arange(2)[:, None]]).all() for s in SCALES)


def test_a_rendition_of_a_training_image_explains_it_too(training: torch.Tensor, poses: Poses) -> None:
    """An autoencoder that wipes out a corner: its images are no further from the set than the set's own."""
    wiped = training.clone()
    wiped[:, :, :24, :24] = 0.5
    plain, _ = best(register(wiped[:2], training, poses=poses))
    through, rows = best(register(wiped[:2], training, renditions=[wiped], poses=poses))
    assert rows == [0, 1] and max(through) < 0.01 < 0.1 < min(plain)


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_of_a_blank_image_nothing_can_be_said(shade: int, training: torch.Tensor, poses: Poses) -> None:
    blank = prepare([Image.new("RGB", (SIZE, SIZE), (shade, shade, min(255, shade + 1)))])
    found = register(blank, training, poses=poses)
    assert all(torch.isinf(found.residual[s]).all() for s in SCALES)


def test_a_blank_training_image_explains_nothing() -> None:
    images = [Image.new("RGB", (SIZE, SIZE), "white"), *scenes(0, 7)]
    found = register(prepare([scene(50), scene(3)]), prepare(images))
    residual, rows = best(found)
    assert residual[0] > 0.3 and rows[1] == 4 and residual[1] < 0.01


def test_the_same_alone_or_among_others_and_nothing_random_is_used(training: torch.Tensor, poses: Poses) -> None:
    queries = prepare([CHANGES[name](scene(5)) for name in ("turned", "cropped", "noisy")] + scenes(1000, 2))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    together = register(queries, training, poses=poses)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)  # another state
    again = register(queries, training)
    assert torch.equal(together.index, again.index)
    assert all(torch.equal(together.residual[s], again.residual[s]) for s in SCALES)
    alone = register(queries, training, poses=poses, batch=1)
    for name in SCALES:
        torch.testing.assert_close(together.residual[name].amin(1), alone.residual[name].amin(1), rtol=0, atol=1e-4)
    assert best(together)[1] == best(alone)[1]
    flipped = register(queries.flip(0), training, poses=poses)
    torch.testing.assert_close(
        flipped.residual[SCALES[0]].amin(1).flip(0), together.residual[SCALES[0]].amin(1), rtol=0, atol=1e-4
    )


def test_gradients_may_be_off_and_no_graph_is_kept(training: torch.Tensor, poses: Poses) -> None:
    query = prepare([CHANGES["turned"](scene(2))])
    with torch.inference_mode(False), torch.no_grad():
        off = register(query, training, poses=poses)
    on = register(query, training, poses=poses)
    assert torch.equal(off.residual[SCALES[0]], on.residual[SCALES[0]]) and not on.residual[SCALES[0]].requires_grad


def test_images_of_every_mode_and_shape_are_prepared_and_an_empty_list_is_empty(
    training: torch.Tensor, poses: Poses
) -> None:
    image = scene(6)
    given = [image.convert("RGBA"), image.convert("CMYK"), image.resize((200, 120))]
    ready = prepare(given)
    assert ready.shape == (3, 3, SIZE, SIZE) and ready.dtype == torch.float32 and 0 <= ready.min() <= ready.max() <= 1
    assert best(register(ready, training, poses=poses))[1] == [6, 6, 6]
    nothing = register(prepare([]), training, poses=poses)
    assert len(prepare([])) == len(nothing.index) == 0


def test_two_training_images_are_enough(training: torch.Tensor) -> None:
    residual, rows = best(register(training[1:2], training[:2]))
    assert rows == [1] and residual[0] < 0.01
