"""What a study of a style adds to `experiments.measures`: runs are judged on captions that no run has seen.

Quality on training captions rewards copying: a run that hands its images back is as near to them as can be. Who fine-tunes for a style
asks for other things in it. So one set of samples is drawn for the training captions, to count copies, and another for the captions of the
held-out images, which are of the same style and of other concepts:

    distance, kid   Frechet distance and KID of these samples to all held-out images       `ambient_sd.audit.metrics.distances`
    agreement       share of samples whose caption's own real image is among the `NEAREST` nearest held-out images; chance is
                    NEAREST / n where captions differ
    style           share of samples that a classifier takes for this style
    NAME-new        share of these samples that are copies of a training image; NAME alone: of the samples for training captions
    own, new, drawn which of all real images, trained and held out, is closest to a sample     `ambient_sd.audit.closest`

All on EfficientNet-Lite0 features. The classifier is a logistic regression on features of real images, this style's and others', as
the model's autoencoder renders them: otherwise it could go by what the autoencoder leaves behind. It is tested on concepts, in either style,
that it was not trained on; `style, real` and `style, others` are the shares of these images that it calls this style.

Neither agreement nor style says that an image is good; a model that copies the held-out images would be best in both.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
import torch
from PIL import Image
from torch import Tensor

from ambient_sd.audit.closest import NEAREST, agreeing, closest
from ambient_sd.audit.decision import RENDERED, through_vae
from ambient_sd.audit.features import embed
from ambient_sd.audit.metrics import bootstrap, distances
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.registry import choose
from ambient_sd.audit.shares import COPIES
from ambient_sd.data.sources import ImageDataset
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write
from experiments.concepts import order
from experiments.measures import CONTOURS, Reals, measure_samples

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


def chance(prompts: Sequence[str], captions: Sequence[str], nearest_of: int) -> float:
    """Return the agreement where the nearest are drawn at random: `1 - C(n - m, k) / C(n, k)` for a caption of m of the n images, averaged."""
    n, k = len(captions), min(nearest_of, len(captions))
    missed = [math.comb(n - captions.count(prompt), k) / math.comb(n, k) for prompt in prompts]
    return 1 - sum(missed) / len(missed)


def closest_of(
    trained: tuple[Mapping[str, Tensor], Sequence[str]],
    new: tuple[Mapping[str, Tensor], Sequence[str]],
    reals: Reals,
    seed: int,
) -> dict[str, Estimate]:
    """Return which real image of a study is closest to its samples, `ambient_sd.audit.closest`: features of either set and their captions."""
    real = (reals.training, reals.captions), (reals.heldout, reals.heldout_captions)
    return closest(trained, new, *real, seed=seed)


def measure_new(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    reals: Reals,
    classifier: Classifier,
    seed: int,
    resamples: int = 1000,
    *,
    trained: tuple[Mapping[str, Tensor], Sequence[str]] | None = None,
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
    out = {}
    rows = distances(
        drawn[deep],
        reals.heldout[deep],
        reals.rendered,
        name=deep,
        groups=prompts,
        seed=seed,
        resamples=min(200, resamples),
    )
    for name, row in zip(("distance", "kid"), rows, strict=True):
        out |= {name: row.generated, f"{name} floor": row.heldout}
    out |= {f"{name}{NEW}": figures[name] for name in (COPIES, "copied", CONTOURS)}
    out |= {
        "agreement": bootstrap(agreeing(near, prompts, captions), torch.mean, name="agreement", **options),
        "agreement, nearest": bootstrap(agreeing(near[:, :1], prompts, captions), torch.mean, name="agreement, nearest", **options),
        "agreement chance": Estimate(by_chance, by_chance, by_chance, len(captions)),
        "style": bootstrap(classifier(drawn[deep]), torch.mean, name="style", **options),
        "style, real": classifier.real, "style, others": classifier.others,
    }  # fmt: skip
    if trained is not None:
        out |= closest_of(trained, (drawn, prompts), reals, seed)
    own = [captions.index(prompt) for prompt in prompts]
    return out, {"copies": each["copies"], "originals": each["originals"], "own": own}
