"""How well an image shows its prompt, without a CLIP: a reference diffusion model as the judge.

    e(x0, c)  = mean over t, eps of || eps_hat(x_t, c) - eps ||^2                    per latent value
    A(x0, c)  = mean over k of e(x0, c_k)  -  e(x0, c)                               c_k: other prompts of the same set
    hit       = e(x0, c) is smaller than every e(x0, c_k)

The right prompt helps the judge to separate image from noise more than other prompts do (Li et al., "Your diffusion model is secretly
a zero-shot classifier", ICCV 2023). A > 0 means: more like its own prompt than like others. A hit by chance has probability
1 / (k + 1): hits are the (k + 1)-way prompt accuracy. The comparison is with other prompts, not with the empty one, because a judge that
knows a concept badly often does better with no prompt. t, eps and the c_k depend on the seed alone: they are the same for all images and models.

The judge should NOT have been trained on the images in question: take the base of a fine-tune. Else a copy scores high because it is a
copy. A is no CLIP score, and figures of two judges do not compare.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ambient_sd.families import SD, of_pipeline
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.sheets import as_rgb

# Noise levels s = sigma / alpha at which subject and layout are decided: below, a prompt says little that the image does not show.
LEVELS = (0.5, 0.8, 1.2, 1.8, 2.7, 4.0)


class Alignment(NamedTuple):
    """Hold A, float64 `(n,)`, and the hits, bool `(n,)`.

    Example:
        >>> Alignment(value=torch.tensor([0.02]), hit=torch.tensor([True])).hit.tolist()
        [True]
    """

    value: Tensor
    hit: Tensor


class DiffusionAlignment:
    """Score images against prompts by a judging Stable Diffusion pipeline (epsilon, v or sample prediction).

    Args:
        pipe: `StableDiffusionPipeline` of the judge.
        resolution: side to which images are brought, pixels, a multiple of the VAE's factor.
        others: k, how many other prompts each image is held against.
        repeats: noises per level.
        seed: of noises and other prompts.
        batch_size: images at once.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> judge = DiffusionAlignment(tiny_pipeline(), resolution=32, others=1)
        >>> len(judge([Image.new("RGB", (32, 32))], ["a cat"], pool=["a cat", "a dog"]).value)
        1
    """

    name = "alignment"

    def __init__(
        self, pipe: Any, *, resolution: int, others: int = 4, repeats: int = 1, seed: int = 0, batch_size: int = 16
    ) -> None:
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        if resolution % factor:
            raise UserError(f"resolution {resolution}", rule=f"it must be a multiple of the VAE's factor {factor}")
        if of_pipeline(pipe) is not SD:
            raise UserError(
                f"the judge is {of_pipeline(pipe).name}",
                rule="alignment needs Stable Diffusion 1 or 2",
                remedy="name one of those",
            )
        self.pipe, self.resolution, self.batch_size = pipe, resolution, batch_size
        self.others, self.seed = others, seed
        self.schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        self.timesteps = [int(self.schedule.timestep(level)) for level in LEVELS]
        channels = pipe.vae.config.latent_channels
        shape = (len(LEVELS), repeats, channels, resolution // factor, resolution // factor)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def choose(self, prompts: Sequence[str], pool: Sequence[str] | None = None) -> list[list[str]]:
        """Return the k other prompts of each place: distinct, none equal to its own, a function of seed, prompt and pool.

        Args:
            prompts: each image's own.
            pool: where the others come from; the prompts themselves if None.

        Raises:
            UserError: there are not enough other prompts.
        """
        pool = sorted(set(prompts if pool is None else pool))
        if len(pool) <= self.others:
            raise UserError(f"{len(pool)} different prompts", rule=f"each image is held against {self.others} other prompts",
                            remedy="give more prompts, or a smaller `others`")  # fmt: skip
        drawn = {
            c: random.Random(f"{self.seed} {c}").sample([p for p in pool if p != c], self.others) for c in set(prompts)
        }
        return [drawn[c] for c in prompts]

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], pool: Sequence[str] | None = None
    ) -> Alignment:
        """Return A and hit of each image with its prompt, held against others of `pool` (`choose`).

        Raises:
            UserError: another number of prompts than of images, or too few different prompts.
        """
        if len(images) != len(prompts):
            raise UserError(f"{len(images)} images and {len(prompts)} prompts", rule="one prompt per image")
        if not images:
            return Alignment(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool))
        texts = [[c, *rest] for c, rest in zip(prompts, self.choose(prompts, pool), strict=True)]
        starts = range(0, len(images), self.batch_size)
        errors = torch.cat([
            self.errors(images[i : i + self.batch_size], texts[i : i + self.batch_size]) for i in starts
        ])  # fmt: skip
        own, rest = errors[:, 0], errors[:, 1:]
        return Alignment(rest.mean(1) - own, (own[:, None] < rest).all(1))

    @torch.no_grad()
    def errors(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> Tensor:
        """Return e of each image with each of its texts (equally many), float64 `(n, m)`."""
        pipe, n, m = self.pipe, len(images), len(texts[0])
        device, dtype = pipe.unet.device, pipe.unet.dtype
        size = (self.resolution, self.resolution)
        resized = [as_rgb(p).resize(size, Image.Resampling.BICUBIC) for p in images]
        pixels = pipe.image_processor.preprocess(resized).to(pipe.vae.device, pipe.vae.dtype)
        x0 = (pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor).to(device, torch.float32)
        context = pipe.encode_prompt([t for row in texts for t in row], device, 1, False)[0]
        total = torch.zeros(n, m, dtype=torch.float64)
        for t, noises in zip(self.timesteps, self.noise, strict=True):
            alpha, sigma = (float(f(torch.tensor([t]))) for f in (self.schedule.alpha, self.schedule.sigma))
            steps = torch.full((n * m,), t, device=device, dtype=torch.long)
            for eps in noises.to(device):
                x_t = (alpha * x0 + sigma * eps).repeat_interleave(m, dim=0)
                out = pipe.unet(x_t.to(dtype), steps, context).sample.float()
                noise = self.schedule.predicted_noise(out, sample=x_t, timestep=t)
                error = (noise - eps).square().flatten(1).mean(1)
                total += error.view(n, m).double().cpu()
        return total / (len(self.timesteps) * self.noise.shape[1])
