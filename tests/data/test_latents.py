"""Latents and embeddings: one fixed draw per image, equal in memory and on the fly; nothing leaks by averaging."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ambient_sd.data.latents import encode, encode_all
from ambient_sd.data.noise import image_noise
from ambient_sd.data.sources import ImageDataset, ImageRow, load_rows
from ambient_sd.data.stream import SampleStream, keyed_generator, process_batches
from ambient_sd.data.views import Samples, View, ViewRule
from ambient_sd.families.encoders import ImageEncoder
from ambient_sd.families.sd import SD


@pytest.fixture(scope="module")
def pipe(tiny_base: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_base)


@pytest.fixture
def wide(tmp_path: Path) -> ImageDataset:
    """Four images that are wider than high, so that the crop matters."""
    folder = tiny.tiny_folder(tmp_path / "wide", count=4, size=40)
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        Image.effect_mandelbrot((72, 40), (-2, -1, 1, 1 + i / 4), 20).convert("RGB").save(path)
    return load_rows(folder).check()


def rule(**values: bool) -> ViewRule:
    options = {"center_crop": False, "random_flip": True, "per_image": True, **values}
    return ViewRule(32, noise_seed=0, **options)  # type: ignore[arg-type]


def views(wide: ImageDataset, how: ViewRule, seed: int = 0, epochs: int = 6) -> dict[str, set[str]]:
    samples = Samples(wide, how, SampleStream(len(wide), seed))
    seen: dict[str, set[str]] = {}
    for position in range(epochs * len(wide)):
        seen.setdefault(samples[position].key, set()).add(samples[position].draw_key)
    return seen


def test_under_ambient_an_image_keeps_one_view_for_ever(wide: ImageDataset) -> None:
    first, other_run = views(wide, rule()), views(wide, rule(), seed=7)
    assert first == other_run
    assert all(len(names) == 1 for names in first.values())
    assert len({next(iter(n)).rsplit(" ", 1)[0] for n in first.values()}) > 1, "views differ by image"


def test_without_fixed_noise_views_change_by_position(wide: ImageDataset) -> None:
    how = rule(per_image=False)
    assert all(len(names) > 1 for names in views(wide, how).values())
    assert not how.fixed(wide)
    assert rule(per_image=False, random_flip=False, center_crop=True).fixed(wide)
    assert not rule(per_image=False, random_flip=False).fixed(wide), "a drawn crop of a wide image moves"


def test_average_of_x_n_over_epochs_and_runs_keeps_its_noise(pipe: StableDiffusionPipeline, wide: ImageDataset) -> None:
    """Lemma 4.2: m independent noisy copies average to sigma_n / sqrt(m); ours are one copy, whatever m."""
    sigma_n, shape = 0.8, (4, 16, 16)

    def averaged(how: ViewRule, fresh: bool) -> torch.Tensor:
        sums: dict[str, torch.Tensor] = {}
        count = 0
        for run in range(2):
            samples = Samples(wide, how, SampleStream(len(wide), run))
            for epoch in range(8):
                for position in range(epoch * len(wide), (epoch + 1) * len(wide)):
                    sample = samples[position]
                    key = f"{run}/{position}" if fresh else sample.key
                    x0 = encode(ImageEncoder(SD, pipe.vae), [sample], noise_seed=0)[0]
                    x_n = x0 + sigma_n * image_noise([key], shape)[0]
                    sums[sample.key] = sums.get(sample.key, 0) + x_n - x0
                count += 1
        return torch.stack([s / count for s in sums.values()])

    assert averaged(rule(), fresh=False).std().item() == pytest.approx(sigma_n, rel=0.05)
    assert averaged(rule(), fresh=True).std().item() == pytest.approx(sigma_n / 4, rel=0.05), "the leak, for contrast"


def test_mirrored_views_with_one_noise_would_leak_and_ours_do_not(
    pipe: StableDiffusionPipeline, wide: ImageDataset
) -> None:
    """Mirror half of the looks at x0 but never the noise, mirror back, average: the noise falls to sigma / sqrt(2)."""
    eps = image_noise([wide.keys[0]], (4, 16, 16))[0]
    leaked = (eps + eps.flip(-1)) / 2
    assert leaked.std().item() == pytest.approx(2**-0.5, rel=0.08)
    flips = {"mirrored" in name for name in views(wide, rule())[wide.keys[0]]}
    assert len(flips) == 1, "one orientation per image: there is nothing to average"


def test_held_and_on_the_fly_latents_have_the_same_bits(pipe: StableDiffusionPipeline, wide: ImageDataset) -> None:
    held = encode_all(ImageEncoder(SD, pipe.vae), wide, rule(), range(4))
    stream = SampleStream(4, 3)
    samples = Samples(wide, rule(), stream)
    batch = encode(ImageEncoder(SD, pipe.vae), [samples[p] for p in range(8)], noise_seed=0)
    assert torch.equal(batch, held[[stream.image(p) for p in range(8)]])
    assert held.shape[1:] == SD.latent_shape(pipe.vae.config, (32, 32))


def test_the_vae_draw_is_fixed_real_and_apart_from_the_noise(pipe: StableDiffusionPipeline, wide: ImageDataset) -> None:
    sample = Samples(wide, rule(), SampleStream(4, 0))[0]
    posterior = pipe.vae.encode(sample.pixels[None]).latent_dist
    x0 = encode(ImageEncoder(SD, pipe.vae), [sample], noise_seed=0)
    drawn = (x0 / pipe.vae.config.scaling_factor - posterior.mean) / posterior.std
    assert torch.equal(x0, encode(ImageEncoder(SD, pipe.vae), [sample], noise_seed=0))
    assert not torch.equal(x0, encode(ImageEncoder(SD, pipe.vae), [sample], noise_seed=1))
    assert drawn.std().item() == pytest.approx(1.0, abs=0.1)
    eps_n = image_noise([sample.key], (4, 16, 16))
    assert abs((drawn * eps_n).mean().item()) < 0.12, "VAE draw and image noise are independent"


def test_crop_and_mirror_take_the_right_pixels() -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (48, 0, 64, 32))
    rule = ViewRule(32, center_crop=False, random_flip=True, per_image=False, noise_seed=0)
    shown = ImageRow(image, "", "key", "name")
    right, mirrored = (rule.see(shown, View(flip, left=0.999)) for flip in (False, True))
    assert rule.place(image.size, View(left=0.999), "key", False)[:2] == ((64, 32), (0, 32))
    assert "(0, 32) upright key" in right.draw_key
    assert right.pixels[0, 0, :16].max() == -1.0
    assert right.pixels[0, 0, 16:].min() == 1.0
    assert torch.equal(mirrored.pixels, right.pixels.flip(-1))
    small = ViewRule(16, center_crop=False, random_flip=True, per_image=False, noise_seed=0)
    assert small.place(image.size, View(), "key", False)[1] == (0, 8), "the centre"


def test_each_epoch_is_a_permutation_and_positions_are_independent_of_history() -> None:
    stream = SampleStream(7, 5)
    order = [stream.image(p) for p in range(21)]
    assert [sorted(order[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert order[:7] != order[7:14]
    fresh = SampleStream(7, 5)
    assert [fresh.image(p) for p in (20, 3, 11)] == [order[20], order[3], order[11]]
    assert [SampleStream(7, 6).image(p) for p in range(21)] != order


@pytest.mark.parametrize(("batch", "accumulation", "processes"), [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)])
def test_each_step_takes_the_same_positions_however_it_is_cut(batch: int, accumulation: int, processes: int) -> None:
    options = {"batch_size": batch, "accumulation": accumulation, "processes": processes}
    taken = [list(process_batches(2, 4, rank=r, **options)) for r in range(processes)]
    for step in range(2):
        part = [p for r in taken for b in r[step * accumulation : (step + 1) * accumulation] for p in b]
        assert sorted(part) == list(range((step + 2) * 4, (step + 3) * 4))


def test_keyed_generators_repeat_and_differ() -> None:
    draws = [
        torch.rand(4, generator=keyed_generator(*k)).tolist()
        for k in ((0, "a", 1), (0, "a", 1), (0, "a", 2), (0, "b", 1))
    ]
    assert draws[0] == draws[1]
    assert len({tuple(d) for d in draws}) == 3
