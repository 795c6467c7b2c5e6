"""What a study of a style adds to `experiments.measures`: runs are judged on captions that no run has seen.

Quality on training captions rewards copying: a run that hands its images back is as near to them as can be. Who fine-tunes for a style
asks for other things in it. So one set of samples is drawn for the training captions, to count copies, and another for the captions of the
held-out images, which are of the same style and of other concepts:

    distance, kid   Frechet distance and KID of these samples to all held-out images       `distances`, `ambient_sd.audit.metrics`
    agreement       share of samples whose caption's own real image is among the `NEAREST` nearest held-out images; chance is
                    NEAREST / n where captions differ
    style           share of samples that a classifier takes for this style
    NAME-new        share of these samples that are copies of a training image; NAME alone: of the samples for training captions
    own, new, drawn which of all real images, trained and held out, is closest to a sample                       `closest`

All on EfficientNet-Lite0 features. The classifier is a logistic regression on features of real images, this style's and others', as
the model's autoencoder renders them: otherwise it could go by what the autoencoder leaves behind. It is tested on concepts, in either style,
that it was not trained on; `style, real` and `style, others` are the shares of these images that it calls this style.

Neither agreement nor style says that an image is good; a model that copies the held-out images would be best in both.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
import torch
from PIL import Image
from torch import Tensor

from ambient_sd.audit.decision import RENDERED, through_vae
from ambient_sd.audit.features import embed
from ambient_sd.audit.metrics import PROJECT, Resampler, bootstrap, frechet_distance, kid, pca_basis
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.registry import choose
from ambient_sd.audit.shares import COPIES
from ambient_sd.data.sources import ImageDataset
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write
from experiments.concepts import order
from experiments.measures import CONTOURS, Reals, measure_samples

NEAREST = 10
OWN, OTHER, DRAWN = CLOSEST = ("own", "new", "drawn")
NEW = "-new"  # ends the names of copy figures of samples for captions that were not trained
FIGURES = ("agreement", "agreement chance", "style", "style, real", "style, others", COPIES + NEW, CONTOURS + NEW)
_TEST_SHARE = 3  # one concept in three tests the classifier
_PENALTY = 0.3  # times half the squared weights, on features of unit variance; 0.01 to 3 differ by 2 points of accuracy


@dataclass(frozen=True)
class Classifier:
    """Tell one style from others by a feature vector.

    Attributes:
        weights: float64 `(D,)`. bias: of the sum.
        real, others: share of the images of this style, and of others, that it calls this style; concepts that it was not trained on.
    """

    weights: Tensor
    bias: float
    real: Estimate
    others: Estimate

    def __call__(self, features: Tensor) -> Tensor:
        """Return which rows of `features`, `(N, D)`, are of this style, bool `(N,)`."""
        return features.double() @ self.weights + self.bias > 0


def train_classifier(features: Tensor, of_style: Sequence[bool], concepts: Sequence[str]) -> Classifier:
    """Train on two concepts in three, by hash, and test on the others; both classes have the same weight.

    Args:
        features: `(N, D)`. of_style: which rows are of the style. concepts: what each row shows.

    Raises:
        UserError: a side lacks images of the style or of others.
    """
    test = torch.tensor([int(order("style classifier", name), 16) % _TEST_SHARE == 0 for name in concepts])
    marks = torch.tensor(list(of_style))
    for side in (test, ~test):
        for one in (marks, ~marks):
            if int((side & one).sum()) < 4:
                raise UserError("style: too few images tell this style from others", rule="at least 4 a side, by concept, of either",
                                remedy="name more in `these` or `others`")  # fmt: skip
    rows = features.double()
    centre, scale = rows[~test].mean(0), rows[~test].std(0).clamp_min(1e-6)
    x, y = ((rows[~test] - centre) / scale).numpy(), np.where(marks[~test].numpy(), 1.0, -1.0)
    share = np.where(y > 0, 0.5 / (y > 0).sum(), 0.5 / (y < 0).sum())

    def loss(given: np.ndarray) -> tuple[float, np.ndarray]:
        margin = y * (x @ given[:-1] + given[-1])
        slope = -share * y * scipy.special.expit(-margin)
        gradient = np.append(x.T @ slope + _PENALTY * given[:-1], slope.sum())
        return float(share @ np.logaddexp(0, -margin) + _PENALTY / 2 * given[:-1] @ given[:-1]), gradient

    found = scipy.optimize.minimize(
        loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500}
    ).x
    weights = torch.from_numpy(found[:-1]) / scale
    bias = float(found[-1] - weights @ centre)
    called = rows @ weights + bias > 0
    tested = {name: called[test & one] for name, one in (("style, real", marks), ("style, others", ~marks))}
    real, others = (Estimate.of_share(int(hits.sum()), len(hits), name=name) for name, hits in tested.items())
    return Classifier(weights, bias, real, others)


def read_classifier(
    these: ImageDataset, others: ImageDataset, concept: str, vae: Any = None, side: int = 0, cache: Path | None = None
) -> Classifier:
    """Train on images of a style and of others, or read it from the folder `cache`, where it is kept.

    Args:
        vae, side: as in `CopyDecision.of`.
    """
    kept = None if cache is None else cache / f"style-{_fingerprint(these, others, concept, vae, side)}.json"
    if kept is not None and kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        real, other = (Estimate.from_dict(found[name]) for name in ("real", "others"))
        return Classifier(torch.tensor(found["weights"], dtype=torch.float64), found["bias"], real, other)
    features = choose(["efflite0"], device="cpu" if vae is None else vae.device)
    through = through_vae(vae, side) if vae is not None and side <= RENDERED else list
    rows = []
    for images in (these, others):
        for start in range(0, len(images), 64):
            rows += embed(
                through([images[i].image for i in range(start, min(start + 64, len(images)))]), features
            ).values()
    of_style = [True] * len(these) + [False] * len(others)
    made = train_classifier(torch.cat(rows), of_style, [*these.column(concept), *others.column(concept)])
    if kept is not None:
        record = {
            "weights": made.weights.tolist(),
            "bias": made.bias,
            "real": made.real.as_dict(),
            "others": made.others.as_dict(),
        }
        atomic_write(kept, json.dumps(record) + "\n")
    return made


def _fingerprint(these: ImageDataset, others: ImageDataset, concept: str, vae: Any, side: int) -> str:
    """Return a name for what a classifier depends on: images, concepts, and the weights of the autoencoder."""
    made = hashlib.sha256(
        repr(
            [these.fingerprint(), others.fingerprint(), these.column(concept), others.column(concept), side, _PENALTY]
        ).encode()
    )
    for name, value in ({} if vae is None else vae.state_dict()).items():
        made.update(name.encode() + value.float().cpu().numpy().tobytes())
    return made.hexdigest()[:16]


def agreeing(near: Tensor, prompts: Sequence[str], captions: Sequence[str]) -> Tensor:
    """Return for each prompt whether a real image of that caption is among its nearest, bool `(N,)`.

    Args:
        near: int64 `(N, k)`, rows of real images. captions: of the real images.
    """
    return torch.tensor(
        [any(captions[row] == prompt for row in rows) for rows, prompt in zip(near.tolist(), prompts, strict=True)]
    )


def chance(prompts: Sequence[str], captions: Sequence[str], nearest_of: int) -> float:
    """Return the agreement where the nearest are drawn at random: `1 - C(n - m, k) / C(n, k)` for a caption of m of the n images, averaged."""
    n, k = len(captions), min(nearest_of, len(captions))
    missed = [math.comb(n - captions.count(prompt), k) / math.comb(n, k) for prompt in prompts]
    return 1 - sum(missed) / len(missed)


def distances(
    drawn: Tensor, real: Tensor, rendered: Tensor, prompts: Sequence[str], seed: int, resamples: int = 200
) -> dict[str, Estimate]:
    """Return the Frechet distance and KID of samples to all held-out images, and of these as the autoencoder renders them: the floor.

    The Frechet distance is taken in the leading principal directions of the held-out images, 64 or half of their count. These images are a fixed
    test that all recipes share, so the interval resamples prompts alone. A resample repeats rows, which biases a distance upwards; the
    draws are moved so that their mean is the estimate. `quality_rows` halves the held-out images for a floor at equal n, which doubles
    the bias and widens the interval: for one model that is right, for many beside each other it hides what tells them apart.

    Args:
        drawn, real, rendered: features, `(N, D)`, `(M, D)` and `(M, D)`; KID uses the first min(N, M) rows.

    Example:
        >>> sets = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
        >>> found = distances(sets[0] + 1, sets[1], sets[1], [str(i) for i in range(40)], 0, resamples=5)
        >>> found["distance"].value > 1 > found["distance floor"].value
        True
    """
    basis, _ = pca_basis(real, min(PROJECT, len(real) // 2, real.shape[1]))
    near, count = real.double() @ basis, min(len(drawn), len(real))
    measures: dict[str, Callable[[Tensor], float]] = {
        "distance": lambda rows: frechet_distance(rows.double() @ basis, near),
        "kid": lambda rows: kid(rows[:count].double(), real[:count].double()),
    }
    out = {}
    for name, measure in measures.items():
        value, resampler = measure(drawn), Resampler(len(drawn), prompts, seed)
        draws = torch.tensor([measure(drawn[resampler.draw()]) for _ in range(resamples)], dtype=torch.float64)
        low, high = torch.quantile(draws - draws.mean() + value, torch.tensor([0.025, 0.975]).double()).tolist()
        out[name] = Estimate(value, low, high, len(drawn), name)
        floor = measure(rendered)
        out[f"{name} floor"] = Estimate(floor, floor, floor, len(real), f"{name} floor")
    return out


def closest(
    trained: Tensor, new: Tensor, prompts: Sequence[str], captions: Sequence[str], reals: Reals, seed: int
) -> dict[str, Estimate]:
    """Return which real image is closest to a sample: a measure that sees blurred and redrawn copies long before the copy decision does.

    The decision asks for a near-identical image, and a small network's early copies are blurred: anyone recognizes them, and the decision
    does not count them. This asks less. Of all real images of the study, trained and held out, by EfficientNet-Lite0 features:

        own     share of samples for training captions whose closest real image is their caption's own training image
        new     the same for captions of held-out images, which no run has seen: what a model can know of an image from its caption alone
        drawn   share of samples for held-out captions whose closest real image is a trained one; by chance the trained images' share of all

    `own` far above `new` says that images were learned, not what captions mean. It is no decision: a model that draws what a caption says
    would have both high. Intervals resample prompts.

    Args:
        trained, new: features of the samples for `prompts`, training captions, and for `captions`, those of held-out images.
    """
    deep = reals.features[1].name
    every = torch.cat([reals.training[deep], reals.heldout[deep]])
    known, n = [*reals.captions, *reals.heldout_captions], len(reals.training[deep])
    own, other = (nearest(rows, every, 1).index for rows in (trained, new))
    hits = {
        OWN: (agreeing(own, prompts, known), prompts),
        OTHER: (agreeing(other, captions, known), captions),
        DRAWN: (other[:, 0] < n, captions),
    }
    return {
        name: bootstrap(hit, torch.mean, name=name, groups=groups, seed=seed, share=True)
        for name, (hit, groups) in hits.items()
    }


def measure_new(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    reals: Reals,
    classifier: Classifier,
    seed: int,
    resamples: int = 1000,
    *,
    trained: tuple[Tensor, Sequence[str]] | None = None,
) -> tuple[dict[str, Estimate], dict[str, list[Any]]]:
    """Return the figures of samples for captions of held-out images; intervals resample prompts.

    Args:
        trained: features of the samples for training captions, and these captions, for `closest`.

    Returns:
        Figures by name, and of each image whether it is a copy (`copies`), the training image that explains it best (`originals`), and the
        held-out image of its caption (`own`).
    """
    drawn = embed(images, reals.features)
    figures, each = measure_samples(images, prompts, reals, seed, resamples, drawn=drawn)
    deep = reals.features[1].name
    captions = list(reals.heldout_captions)
    near = nearest(drawn[deep], reals.heldout[deep], min(NEAREST, len(captions))).index
    options: dict[str, Any] = {"groups": prompts, "seed": seed, "resamples": resamples, "share": True}
    by_chance = chance(prompts, captions, NEAREST)
    out = distances(drawn[deep], reals.heldout[deep], reals.rendered, prompts, seed, min(200, resamples))
    out |= {f"{name}{NEW}": figures[name] for name in (COPIES, "copied", CONTOURS)}
    out |= {
        "agreement": bootstrap(agreeing(near, prompts, captions), torch.mean, name="agreement", **options),
        "agreement, nearest": bootstrap(agreeing(near[:, :1], prompts, captions), torch.mean, name="agreement, nearest", **options),
        "agreement chance": Estimate(by_chance, by_chance, by_chance, len(captions)),
        "style": bootstrap(classifier(drawn[deep]), torch.mean, name="style", **options),
        "style, real": classifier.real, "style, others": classifier.others,
    }  # fmt: skip
    if trained is not None:
        out |= closest(trained[0], drawn[deep], trained[1], prompts, reals, seed)
    own = [captions.index(prompt) for prompt in prompts]
    return out, {"copies": each["copies"], "originals": each["originals"], "own": own}
