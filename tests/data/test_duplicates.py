"""Near-duplicate groups: copies found through re-encoding, resizing, light and mirroring; look-alikes kept apart; one noise."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

import ambient_sd
from ambient_sd.data import duplicates
from ambient_sd.data.duplicates import Group, Thumbnails, find_groups, noise_fingerprint, noise_keys, shared_noise
from ambient_sd.data.images import content_key
from ambient_sd.data.noise import image_noise
from ambient_sd.data.sources import load_rows


def photo(seed: int, size: tuple[int, int] = (192, 144)) -> Image.Image:
    """A random image with the 1/f spectrum of photographs."""
    rng = np.random.default_rng(seed)
    width, height = size
    f = np.sqrt(np.fft.fftfreq(height)[:, None] ** 2 + np.fft.fftfreq(width)[None] ** 2) + 1 / width
    waves = np.fft.fft2(rng.normal(size=(3, height, width))) / f**1.3
    x = np.fft.ifft2(waves).real
    x[1:] = x[:1] + 0.4 * x[1:]
    x = 128 + 55 * (x - x.mean()) / x.std()
    return Image.fromarray(np.moveaxis(x, 0, 2).clip(0, 255).astype(np.uint8))


def coded(image: Image.Image, kind: str = "JPEG", quality: int = 60) -> Image.Image:
    data = io.BytesIO()
    image.save(data, kind, quality=quality)
    return Image.open(data).convert("RGB")


def groups_of(images: list[Image.Image]) -> list[Group]:
    thumbnails = Thumbnails()
    for image in images:
        thumbnails.add(image)
    return find_groups([content_key(i) for i in images], thumbnails)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg": lambda i: coded(i, quality=40),
    "webp": lambda i: coded(i, "WEBP"),
    "half size": lambda i: i.resize((i.width // 2, i.height // 2), Image.Resampling.LANCZOS),
    "odd size": lambda i: i.resize((int(i.width * 1.37), int(i.height * 1.37)), Image.Resampling.BICUBIC),
    "darker": lambda i: ImageEnhance.Brightness(i).enhance(0.93),
    "more contrast": lambda i: ImageEnhance.Contrast(i).enhance(1.06),
    "mirrored": ImageOps.mirror,
    "mirrored, smaller, jpeg": lambda i: coded(ImageOps.mirror(i).resize((120, 90))),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_changed_copy_joins_its_image_and_no_other(name: str) -> None:
    originals = [photo(s) for s in range(30)]
    groups = groups_of(originals + [COPIES[name](i) for i in originals])
    assert [g.rows for g in groups] == [(i, 30 + i) for i in range(30)]
    assert all((g.mirrored[0] != g.mirrored[1]) == name.startswith("mirrored") for g in groups)


def test_images_that_differ_in_colour_place_or_one_detail_stay_apart() -> None:
    def icon(colour: str, at: int, hand: int = 0) -> Image.Image:
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (at, 16, at + 32, 48))
        if hand:
            image.paste("black", (hand, 28, hand + 8, 36))
        return image

    icons = [icon("red", 16), icon("blue", 16), icon("red", 2), icon("red", 16, hand=20), icon("red", 16, hand=36)]
    assert groups_of(icons) == [
        Group((3, 4), (icons_mirror(icons, 3), icons_mirror(icons, 4)), min_key(icons, 3, 4))
    ], "20 and 36 are mirror images of one another; nothing else merges"
    photos = [photo(s) for s in range(40)]
    assert groups_of(photos) == []
    squeezed = photos[0].resize((96, 144))
    assert groups_of([photos[0], squeezed]) == [], "another aspect ratio has other crops"


def min_key(images: list[Image.Image], *rows: int) -> str:
    return min(content_key(images[i]) for i in rows)


def icons_mirror(images: list[Image.Image], row: int) -> bool:
    return content_key(images[row]) != min_key(images, 3, 4)


def test_the_embedded_images_are_not_merged() -> None:
    source = Path(ambient_sd.__file__).parent / "assets" / "emoji.parquet"
    images = load_rows(source, split="finetune").check(near_duplicates=True)
    merged = [{images.captions[i] for i in g.rows} for g in images.groups]
    assert len(images) == 1010
    assert merged == [
        {"3D emoji of guardsman", "3D emoji of man guard"},
        {"3D emoji of left-pointing magnifying glass", "3D emoji of right-pointing magnifying glass"},
        {"flat emoji of left-facing fist", "flat emoji of right-facing fist"},
        {"flat emoji of rightwards hand", "flat emoji of leftwards hand"},
    ]
    assert [any(g.mirrored) for g in images.groups] == [False, True, True, True]


def test_blank_images_merge_by_their_colour_only() -> None:
    def plain(*colour: int) -> Image.Image:
        return Image.new("RGB", (64, 64), colour)

    groups = groups_of([plain(250, 250, 250), plain(253, 253, 253), plain(200, 30, 30), plain(30, 30, 200), photo(0)])
    assert [g.rows for g in groups] == [(0, 1)]


def test_groups_do_not_depend_on_order() -> None:
    images = [photo(s) for s in range(6)]
    images += [coded(images[0]), ImageOps.mirror(images[0]), coded(ImageOps.mirror(images[0])), images[1].copy()]
    assert len(groups_of(images)) == 2

    def by_key(images: list[Image.Image]) -> dict[str, tuple[str, bool]]:
        keys = [content_key(i) for i in images]
        return dict(zip(keys, zip(*noise_keys(keys, groups_of(images)), strict=True), strict=True))

    wanted = by_key(images)
    for seed in range(3):
        random.Random(seed).shuffle(images)
        assert by_key(images) == wanted
    assert all(key <= own for own, (key, _) in wanted.items()), "the smallest content key names a group"


def test_a_crowd_of_copies_beyond_the_first_look_ups_is_one_group() -> None:
    # 16 neighbours are asked for first: each of 70 copies has 69.
    one = np.asarray(photo(1))
    crowd = [Image.fromarray(np.roll(one, 0) ^ np.uint8(i % 2)) for i in range(2)]
    noise = np.random.default_rng(0)
    crowd = [Image.fromarray((one + noise.integers(-3, 4, one.shape)).clip(0, 255).astype(np.uint8)) for _ in range(70)]
    assert [g.rows for g in groups_of([*crowd, photo(2)])] == [tuple(range(70))]


def test_no_and_one_image_have_no_groups() -> None:
    assert groups_of([]) == []
    assert groups_of([photo(0)]) == []


def test_copies_under_their_own_noise_average_out_and_grouped_ones_do_not() -> None:
    image, m, shape = photo(3, (64, 64)), 16, (4, 16, 16)
    copies = [coded(image, quality=95 - i) for i in range(m // 2)]
    copies += [ImageOps.mirror(c) for c in copies]
    keys = [content_key(c) for c in copies]
    (group,) = groups_of(copies)
    shared, mirrored = noise_keys(keys, [group])
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    turned = torch.tensor(mirrored)
    latents = x0.expand(m, *shape).clone()
    latents[turned] = latents[turned].flip(-1)
    sigma_n = 0.7

    def error_of_the_average(eps: torch.Tensor) -> float:
        x_n = latents + sigma_n * eps
        x_n[turned] = x_n[turned].flip(-1)  # who wants the image back turns the mirrored ones round
        return float((x_n.mean(0) - x0).std())

    grouped = shared_noise(shared, mirrored, shape, seed=0)
    assert error_of_the_average(grouped) == pytest.approx(sigma_n, rel=0.05)
    own = shared_noise(keys, [False] * m, shape, seed=0)
    assert error_of_the_average(own) == pytest.approx(sigma_n / m**0.5, rel=0.1), "negative control: the leak"
    unturned = image_noise(shared, shape)
    assert error_of_the_average(unturned) == pytest.approx(sigma_n / 2**0.5, rel=0.1), "a mirrored copy: a second draw"


def test_another_grouping_has_another_fingerprint() -> None:
    assert noise_fingerprint(["a", "a"], [False, True]) != noise_fingerprint(["a", "a"], [False, False])
    assert noise_fingerprint(["a", "a"], [False, False]) != noise_fingerprint(["a", "b"], [False, False])


@pytest.mark.parametrize("limit", [2**20, 0])
def test_held_noise_is_the_noise_made_once(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(
        duplicates, "image_noise", lambda keys, *a, **k: (made.extend(keys), image_noise(keys, *a, **k))[1]
    )
    keys, mirrored, shape = ["a", "b", "a"], [False, False, True], (4, 8, 8)
    noise = duplicates.FixedNoise(keys, mirrored, 0, limit)
    for rows in ([0, 1, 0], [2, 1]):
        expected = shared_noise([keys[i] for i in rows], [mirrored[i] for i in rows], shape, seed=0)
        made.clear()
        assert torch.equal(noise(rows, shape), expected)
    assert made == (["a"] if limit else ["a", "b"]), "b was held, if there was room"
