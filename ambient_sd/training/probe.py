"""The onset of memorization: during training, images are sampled for fixed captions and compared with the training images.

    copies       copy rate of the probe's images                                    `ambient_sd.audit.decision`, as in an audit
    published    share with d1 / d2 < 1/3, distances in pixels at 64 x 64           for comparison (Yoon et al. 2023)
    own          share whose closest training image is their caption's own, pixels   sees redrawn images long before they are copies

The decision's null is the training images among themselves, as a run has no held-out ones. With fewer than 20 different images
there is no null, and the published measure counts too. Prompts are captions of the training set: copies appear for those first.
The probe is small: it shows when copying begins; an audit says how much there is.

    quality      KID between images for captions that are NOT trained and the training images, in EffLite0 features      with `--keep best` only

Lower is better. On trained captions a copy would be the best of images.

The decision is made once, at the first evaluation, on at most `MAX_DECIDED` training images. Up to 256 px it costs one pass of the autoencoder over
them and half as much registration again: for 59 images of 64 px 15 s instead of 10 on one busy core. Encoding the latents took a third of that pass.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from ambient_sd.audit.closest import MOST_BY_CHANCE, owners_of
from ambient_sd.audit.decision import CopyDecision
from ambient_sd.audit.features import EffLite0, Pixels
from ambient_sd.audit.metrics import kid, memorized
from ambient_sd.audit.neighbours import nearest
from ambient_sd.data.sources import ImageDataset
from ambient_sd.families import of_pipeline
from ambient_sd.training import validation
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.sheets import above, contact_sheet

# Guidance of 7.5 drives the colours of a fine-tuned model away from the originals and hides copies from a distance in pixels.
GUIDANCE_SCALE = 2.0
INFERENCE_STEPS = 15  # of DPM-Solver++
MAX_SEARCHED = 4096  # 12,288 numbers an image: 200 MB
MAX_DECIDED = 1000  # training images that the decision lays over the sampled ones
_SIDE, _PER_ROW = 64, 8


@dataclass(frozen=True)
class ProbeEvaluation:
    """Hold one evaluation.

    Attributes:
        step: optimizer steps done.
        copies: the copy rate with its 95 % Wilson interval.
        published: share of images with d1/d2 < 1/3.
        median_ratio: of d1/d2; score: median of the guard's.
        sheet: the images, each above the training image that it copies, or else its caption's own; on the main process only.
        kid: of the images for captions that are not trained; None where there are none.
        new_sheet: those images; on the main process only.
        own: share of images nearest to their caption's own training image; None where captions hardly tell images apart.
        blank: images that show too little to be compared; they are not among the n of `copies`.

    Example:
        >>> seen = ProbeEvaluation(100, Estimate.of_share(3, 32), published=0.1, median_ratio=0.8, score=2.0, sheet=None)
        >>> seen.record()["step"], seen.record()["n"]
        (100, 32)
    """

    step: int
    copies: Estimate
    published: float
    median_ratio: float
    score: float
    sheet: Image.Image | None
    kid: float | None = None
    new_sheet: Image.Image | None = None
    own: float | None = None
    blank: int = 0

    def describe(self) -> str:
        """Return it in one line."""
        quality = "" if self.kid is None else f"; KID x 1000 on new captions {1000 * self.kid:.1f}"
        own = "" if self.own is None else f"; nearest to their own training image {100 * self.own:.1f} %"
        total = self.copies.n + self.blank
        blank = f"; {self.blank} of {total} images are black, blank or too faint to be compared" if self.blank else ""
        rate = (
            f"copy rate {self.copies.show(1, 100, ' %')} of {self.copies.n} images"
            if self.copies.n
            else "copy rate not known"
        )
        return f"step {self.step}: {rate}{own}{quality}{blank}"

    def record(self) -> dict[str, float]:
        """Return the numbers, for curves and files."""
        score = self.score if math.isfinite(self.score) else None  # JSON has no NaN
        rest = (("guard_score", score), ("kid", self.kid), ("own", self.own), ("blank", self.blank or None))
        return {"step": self.step, "copies": self.copies.value, "copies_low": self.copies.low, "copies_high": self.copies.high,
                "published": self.published, "ratio": self.median_ratio, "n": self.copies.n,
                **{name: v for name, v in rest if v is not None}}  # fmt: skip


class Probe:
    """Measure how much a model in training copies, on a fixed set of its own captions.

    Args:
        images: the training set, checked (its keys tell copies apart).
        count: how many captions are probed, one image each; chosen by `seed`, the same at every evaluation.
        resolution: side of the images, pixels.
        seed: seed of captions and start noise.
        new_captions: captions that are not trained, on which quality is measured.
        read: each caption as the model reads it (`as_read`): those that it cuts to one text ask for the same images. None: all are read whole.

    Raises:
        UserError: fewer than two different training images: a copy is nearer to one of them than to the others.

    Example:
        >>> from ambient_sd.assets import IMAGES
        >>> from ambient_sd.data.sources import load_rows
        >>> Probe(load_rows(IMAGES, max_samples=3).check(), count=2, resolution=64, seed=0).real.shape
        torch.Size([3, 12288])
    """

    def __init__(
        self,
        images: ImageDataset,
        *,
        count: int,
        resolution: int,
        seed: int,
        new_captions: Sequence[str] = (),
        read: Sequence[str] | None = None,
    ) -> None:
        self.resolution, self.seed, self.new_captions = resolution, seed, list(new_captions)
        draw = random.Random(seed)
        captioned = [i for i, caption in enumerate(images.captions) if caption.strip()] or list(range(len(images)))
        chosen = sorted(draw.sample(captioned, min(count, len(captioned))))
        self.captions = [images.captions[i] for i in chosen]
        others = sorted(set(range(len(images))) - set(chosen))
        room = max(0, MAX_SEARCHED - len(chosen))
        searched = chosen + (others if len(others) <= room else sorted(draw.sample(others, room)))
        searched = images.one_of_each(searched)
        if len(searched) < 2:
            raise UserError(f"probe_steps with {len(searched)} different training image", rule="a copy is nearer to one than to the others",
                            remedy="train on more images, or leave --probe_steps out")  # fmt: skip
        # The probed ones first: they are always among those that decide.
        probed = {images.noise_keys[i] for i in chosen}
        searched.sort(key=lambda i: images.noise_keys[i] not in probed)
        self.labels = [images.noise_keys[i] for i in searched]
        # Of a caption any of its images is the own one; where most images share one, to be nearest to it says nothing.
        read = images.captions if read is None else read
        self.asked = [read[i] for i in chosen]
        self.owners = owners_of(read, images.noise_keys)
        shares = [len(self.owners[caption]) / len(set(self.labels)) for caption in self.asked]
        self.telling = sum(shares) / len(shares) <= MOST_BY_CHANCE
        # Beside a sample that is no copy the image of its caption tells more than the one that happens to be nearest.
        row_of = {label: row for row, label in enumerate(self.labels)}
        self.own_row = [row_of[images.noise_keys[i]] for i in chosen]
        self.vae: Any = None  # of the pipeline, once there is one
        self.device = torch.device("cpu")  # of the run, then
        self.features = Pixels(_SIDE)
        self.originals = [_centre(images[i].image) for i in searched]
        self.real = self.features(self.originals)
        deciding = max(MAX_DECIDED, len(probed))
        self._decided = images.subset(searched[:deciding]).images

    @cached_property
    def decision(self) -> CopyDecision:
        """The definition of a copy, made at the first evaluation."""
        labels = self.labels[: len(self._decided)]
        with validation.lent([] if self.vae is None else [self.vae], self.device):
            return CopyDecision.of(self._decided, labels, vae=self.vae, side=self.resolution)

    @cached_property
    def _quality(self) -> tuple[EffLite0, torch.Tensor]:
        """The features in which quality is measured, and those of as many training images."""
        features = EffLite0(device=self.device)
        rows = random.Random(self.seed).sample(self.originals, min(len(self.originals), max(2, len(self.new_captions))))
        return features, features(rows)

    def evaluate(self, pipe: Any, accelerator: Accelerator, step: int) -> ProbeEvaluation:
        """Sample the probe's images and measure them; to be called by every process. All return the main one's numbers."""
        self.vae, self.device = pipe.vae, accelerator.device
        if not of_pipeline(pipe).flow:
            # Fifteen of its steps draw better than 25 of DDIM, in less than two thirds of the time.
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        options: dict[str, Any] = {
            "resolution": self.resolution, "seed": self.seed, "accelerator": accelerator, "guidance_scale": GUIDANCE_SCALE,
            "steps": min(INFERENCE_STEPS, validation.INFERENCE_STEPS),
        }  # fmt: skip
        sampled = validation.sample(pipe, self.captions, 1, **options)
        new = validation.sample(pipe, self.new_captions, 1, **options).rows if self.new_captions else []
        images, scores = [row[0] for row in sampled.rows], [row[0] for row in sampled.scores]
        seen = None
        if accelerator.is_main_process:
            seen = self.measure(images, scores, step, [row[0] for row in new])
            if accelerator.num_processes == 1:
                return seen
        told = torch.zeros(10, dtype=torch.float64)
        if seen is not None:
            copies = seen.copies
            new_kid, own = (math.nan if value is None else value for value in (seen.kid, seen.own))
            told = torch.tensor(
                [
                    copies.value,
                    copies.low,
                    copies.high,
                    seen.published,
                    seen.median_ratio,
                    seen.score,
                    new_kid,
                    own,
                    copies.n,
                    seen.blank,
                ],
                dtype=torch.float64,
            )
        share, low, high, published, ratio, score, new_kid, own, n, blank = broadcast(
            told.to(accelerator.device)
        ).tolist()
        sheets = (None, None) if seen is None else (seen.sheet, seen.new_sheet)
        return ProbeEvaluation(
            step, Estimate(share, low, high, int(n)), published, ratio, score, sheets[0],
            None if math.isnan(new_kid) else new_kid, sheets[1], None if math.isnan(own) else own, int(blank),
        )  # fmt: skip

    def measure(
        self, images: Sequence[Image.Image], scores: Sequence[float], step: int, new: Sequence[Image.Image] = ()
    ) -> ProbeEvaluation:
        """Measure given images, and the quality of those for captions that are not trained."""
        near = nearest(self.features(images), self.real)
        published = memorized(near)
        decided = self.decision(images, published)
        seen = int(decided.compared.sum())
        copies = Estimate.of_share(int(decided.copy.sum()), seen) if seen else Estimate(0.0, 0.0, 1.0, 0)
        shown = [row if copy else own for row, own, copy in zip(decided.row.tolist(), self.own_row, decided.copy.tolist(), strict=False)]  # fmt: skip
        originals = [self.originals[i].resize(images[0].size) for i in shown]
        pairs = [above(*pair) for pair in zip(images, originals, strict=True)]
        marks = [", copy" if copy else "" for copy in decided.copy.tolist()]
        captions = [
            f"{prompt}\nscore {score:.3g}{mark}"
            for prompt, score, mark in zip(self.captions, scores, marks, strict=False)
        ]
        quality: float | None = None
        if len(new) > 1:
            features, real = self._quality
            quality = kid(features([_centre(image) for image in new]), real)
        return ProbeEvaluation(
            step, copies, float(published.double().mean()), float(near.ratio.median()),
            float(torch.tensor(scores).median()), contact_sheet(pairs, _PER_ROW, captions),
            quality, contact_sheet(list(new), _PER_ROW, self.new_captions) if new else None, self._own(near.index[:, 0].tolist()),
            len(images) - seen,
        )  # fmt: skip

    def _own(self, nearest_rows: Sequence[int]) -> float | None:
        """Return the share of images whose nearest training image is one of their caption."""
        if not self.telling:
            return None
        hits = [
            self.labels[row] in self.owners[caption] for row, caption in zip(nearest_rows, self.asked, strict=False)
        ]
        return sum(hits) / len(hits)


def add_evaluation(path: Path, record: Mapping[str, float]) -> None:
    """Add an evaluation to a file of JSON lines; those of later steps, which a resumed run repeats, are dropped.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "probe.jsonl"
        >>> for step in (100, 200, 150):  # it was resumed before step 150
        ...     add_evaluation(path, {"step": step, "copies": 0.0})
        >>> [json.loads(line)["step"] for line in path.read_text().splitlines()]
        [100, 150]
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < record["step"]]
    atomic_write(path, "".join(f"{line}\n" for line in [*kept, json.dumps(dict(record))]))


def _centre(image: Image.Image) -> Image.Image:
    """Return the central square at the probe's size: what is compared with a square image."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
