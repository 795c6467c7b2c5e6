"""What is measured of a run at one step: copies, quality, and the denoiser's error by noise level on seen and unseen images.

    copies        share of samples that are copies, held-out images as the null    ambient_sd.audit.decision, as in an audit
    returned      share of training images of which some sample is a copy            ambient_sd.audit.shares
    copied        share of samples with d1 / d2 < 1/3, pixels at 64 x 64             ambient_sd.audit.metrics
    coarsely      the same at 16 x 16: copies whose fine detail is worse than the original's count too
    recoloured    the same by contours alone (`ambient_sd.audit.features.Edges`): copies in other colours count too
    distance      Frechet distance to the held-out images, EfficientNet-Lite0, at equal n; KID beside it
    error(s)      mean over images of |x0 - E[x0 | x_t]|^2 / dim at noise level s, x_t made of the CLEAN image

The gap of error(s) between held-out and training images says at which noise levels a network has learned its images, and a rise
on both says that it has learned something else: its noisy copies.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ambient_sd.audit.decision import RENDERED, CopyDecision, through_vae
from ambient_sd.audit.features import Features, embed
from ambient_sd.audit.metrics import bootstrap, memorized, memorized_fraction, quality_rows
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.registry import choose
from ambient_sd.audit.shares import COPIES, RETURNED, copy_rate, returned
from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import drawn, keyed_generator
from ambient_sd.sampling import SamplingConfig, generate, requests_for
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.estimate import Estimate
from experiments.denoised import embedded, predicted_x0
from experiments.plan import Sampling

CONTOURS = "copied-recoloured"  # the name of the edge-based copy rate
LEVELS = (0.2, 0.4, 0.8, 1.6, 3.0, 4.0, 6.0, 8.0)  # of the error curve
_PICTURES = 64  # of the error curve, at most, of either set


@dataclass(frozen=True)
class Reals:
    """Hold the real images of a study: features of one of each training image and of the held-out ones, and captions."""

    training: Mapping[str, Tensor]
    heldout: Mapping[str, Tensor]
    images: Sequence[Image.Image]
    captions: Sequence[str]
    heldout_images: Sequence[Image.Image]
    heldout_captions: Sequence[str]
    features: Sequence[Features]
    labels: Sequence[Hashable] | None = None
    vae: Any = None
    side: int = 0

    @cached_property
    def decision(self) -> CopyDecision:
        """The definition of a copy of these images; made once, at the first samples."""
        return CopyDecision.of(self.images, self.labels, heldout=self.heldout_images, vae=self.vae, side=self.side)

    @cached_property
    def rendered(self) -> Tensor:
        """EfficientNet-Lite0 features of the held-out images as the autoencoder renders them: the best that a model's samples can be."""
        deep, images = self.features[1], self.heldout_images
        if self.vae is not None and self.side <= RENDERED:
            images = through_vae(self.vae, self.side)(images)
        return embed(images, [deep])[deep.name]


def read_reals(training: ImageDataset, heldout: ImageDataset, vae: Any = None, side: int = 0) -> Reals:
    """Embed both sets; `vae` and `side`: as in `CopyDecision.of`."""
    training.fingerprint()  # fills in the keys that tell equal images
    rows = training.one_of_each()
    features = choose(["pixels", "efflite0", "pixels16", "edges"], device="cpu" if vae is None else vae.device)
    images, unseen = [training[i].image for i in rows], [row.image for row in heldout]
    return Reals(
        embed(images, features), embed(unseen, features), images, [training.captions[i] for i in rows], unseen,
        heldout.captions, features, [training.noise_keys[i] for i in rows], vae, side,
    )  # fmt: skip


def prompts_of(reals: Reals, sampling: Sampling, seed: int) -> list[str]:
    """Return a prompt for each image to sample: captions in turn, a draw of them if there are more than images."""
    if sampling.captions == "none":
        return [""] * sampling.images
    return in_turn(reals.captions, sampling.images, seed)


def in_turn(captions: Sequence[str], count: int, seed: int) -> list[str]:
    """Return `count` captions, each as often as the others or once more; a draw of them if there are more."""
    if len(captions) > count:
        captions = [captions[i] for i in drawn(len(captions), count, seed, "study prompts")]
    return [captions[i % len(captions)] for i in range(count)]


def config_of(
    base: str | Path, folder: Path, lora: bool, sampling: Sampling, resolution: int, seed: int
) -> SamplingConfig:
    """Say how what a run left is sampled: under DPM-Solver++."""
    return SamplingConfig(
        str(base if lora else folder), str(folder) if lora else None, "dpm++", sampling.num_inference_steps, sampling.guidance_scale,
        resolution, seed, dtype="float32", batch_size=sampling.batch_size,
    )  # fmt: skip


def sample(pipe: Any, prompts: Sequence[str], config: SamplingConfig) -> list[Image.Image]:
    """Sample one image per entry of `prompts`."""
    return [
        one.image for batch in generate(pipe, requests_for(prompts), config) for one in batch if one.image is not None
    ]


def measure_samples(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    reals: Reals,
    seed: int,
    resamples: int = 1000,
    *,
    drawn: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Estimate], dict[str, list[Any]]]:
    """Return the figures of sampled images; intervals resample prompts (images, where none is given).

    Args:
        drawn: the images' features, where they are known.

    Returns:
        Figures by name, and of each image whether it is a copy (`copies`), the training image that explains it best (`originals`), and
        d1 / d2 (`ratios`).
    """
    groups = prompts if any(prompts) else None
    drawn = embed(images, reals.features) if drawn is None else drawn
    options: dict[str, Any] = {"groups": groups, "seed": seed, "resamples": resamples}
    pixels, deep, coarse, edges = (feature.name for feature in reals.features)
    near = nearest(drawn[pixels], reals.training[pixels])
    cosine = nearest(drawn[deep], reals.training[deep], distance="cosine").similarity
    decided = reals.decision(images, memorized(near))
    out = {
        COPIES: copy_rate(decided, None, **options).generated,
        "copied": memorized_fraction(near, name="copied", **options),
        "copied-EffLite0": memorized_fraction(
            nearest(drawn[deep], reals.training[deep]), name="copied-EffLite0", **options
        ),
        "copied-coarsely": memorized_fraction(
            nearest(drawn[coarse], reals.training[coarse]), name="copied-coarsely", **options
        ),
        CONTOURS: memorized_fraction(nearest(drawn[edges], reals.training[edges]), name=CONTOURS, **options),
        RETURNED: returned(decided, range(len(reals.images)), seed=seed).generated,
        "ratio": bootstrap(near.ratio, torch.median, name="median d1/d2", **options),
        "similarity": bootstrap(
            cosine, lambda v: torch.quantile(v, 0.95), name="95th percentile of the cosine", **options
        ),
    }
    for name, row in zip(
        ("distance", "kid"),
        quality_rows(drawn[deep], reals.heldout[deep], name=deep, groups=groups, seed=seed),
        strict=False,
    ):
        out[name] = row.generated
        if row.heldout is not None:
            out[f"{name} floor"] = row.heldout
    each = {"copies": decided.copy.tolist(), "originals": decided.row.tolist(), "ratios": near.ratio.tolist()}
    return out, each


@torch.no_grad()
def error_curves(
    pipe: Any, reals: Reals, sampling: Sampling, resolution: int, seed: int, levels: Sequence[float] = LEVELS
) -> dict[str, dict[str, list[float]]]:
    """Return error(s) with its standard error over images, for training and held-out images.

    Every model of a study sees the same noise. Captions are the images' own, or empty where the study samples without.

    Returns:
        {"training": {"level": [...], "mean": [...], "error": [...]}, "heldout": ...}
    """
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    sets = {"training": (reals.images, reals.captions), "heldout": (reals.heldout_images, reals.heldout_captions)}
    out: dict[str, dict[str, list[float]]] = {}
    for name, (images, captions) in sets.items():
        count = min(_PICTURES, len(images))
        order = torch.randperm(len(images), generator=keyed_generator(seed, f"study error {name}", 0))[:count].tolist()
        texts = ["" if sampling.captions == "none" else captions[i] for i in order]
        latents = torch.cat([_encode(pipe, [images[i] for i in part], resolution) for part in _parts(order)])
        hidden = embedded(pipe, texts)
        curve: dict[str, list[float]] = {"level": [], "mean": [], "error": []}
        for level in levels:
            if not float(schedule.level(0)) <= level <= schedule.max_level:
                continue
            t = round(schedule.timestep(level))
            noise = torch.stack(
                [
                    torch.randn(latents.shape[1:], generator=keyed_generator(seed, f"study error {level}", i))
                    for i in order
                ]
            )
            found = predicted_x0(pipe, latents + float(schedule.level(t)) * noise, t, hidden)
            errors = (found - latents).square().flatten(1).mean(1).double()
            curve["level"].append(float(schedule.level(t)))
            curve["mean"].append(float(errors.mean()))
            curve["error"].append(float(errors.std() / count**0.5) if count > 1 else float("nan"))
        out[name] = curve
    return out


def _encode(pipe: Any, images: Sequence[Image.Image], resolution: int) -> Tensor:
    """Return the means of the VAE, scaled as the U-Net sees them."""
    prepared = pipe.image_processor.preprocess(list(images), height=resolution, width=resolution)
    mean = pipe.vae.encode(prepared.to(pipe.device, pipe.vae.dtype)).latent_dist.mean
    return (mean * pipe.vae.config.scaling_factor).float().cpu()


def _parts(values: Any, size: int = 32) -> Iterator[Any]:
    for first in range(0, len(values), size):
        yield values[first : first + size]
