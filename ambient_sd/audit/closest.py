"""Which real image is closest to a sample: sees blurred and redrawn copies long before the copy decision does.

The decision (`ambient_sd.audit.decision`) asks for a near-identical image. A small network's early copies are blurred: anyone recognizes
them, and the decision does not count them. This asks less, and knows which image to look for. Of all real images, trained and held out, by
pixels and by contours:

    own     share of samples for training captions whose closest real image is their caption's own training image
    new     the same for captions of held-out images, which were not trained: what a model can know of an image from its caption alone
    drawn   share of samples for held-out captions whose closest real image is a trained one; by chance the trained images' share of all

`own` far above `new` says that images were learned, not what captions mean. It is no decision about one image: a model that draws what a
caption says would have both high.

Pixels and contours, because a network that redraws an image keeps its layout: of a fine-tune whose samples anyone recognizes, 98 % are closest to
their own image by pixels, 95 % by contours, and 36 % by EfficientNet-Lite0, which sees the blur (docs/results/style-60.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ambient_sd.audit.metrics import Row, bootstrap, difference
from ambient_sd.audit.neighbours import nearest
from ambient_sd.utils.estimate import Estimate

OWN, NEW, DRAWN = NAMES = ("own", "new", "drawn")
FEATURES = ("pixels64", "edges16")
NEAREST = 10  # a sample shows what its caption says if the real image of that caption is among so many nearest ones
MOST_BY_CHANCE = 0.2
MOSTLY = 0.5  # of the images, beyond the base's: then an audit says that a model draws its training images
Set = tuple[Mapping[str, Tensor], Sequence[str]]  # features by name, and captions


def agreeing(near: Tensor, prompts: Sequence[str], captions: Sequence[str]) -> Tensor:
    """Return for each prompt whether a real image of that caption is among its nearest, bool `(N,)`.

    Args:
        near: int64 `(N, k)`, rows of real images. captions: of the real images.

    Example:
        >>> agreeing(torch.tensor([[1, 0], [1, 2]]), ["a", "a"], ["a", "b", "c"]).tolist()
        [True, False]
    """
    return torch.tensor(
        [any(captions[row] == prompt for row in rows) for rows, prompt in zip(near.tolist(), prompts, strict=True)]
    )


def own_closest(samples: Set, training: Set, heldout: Set, feature: str) -> Tensor:
    """Return which samples are closer to a real image of their caption than to all others, by a feature, bool `(N,)`.

    Args:
        samples, training, heldout: as in `closest`.

    Example:
        >>> real = {"pixels64": 10 * torch.eye(4)}
        >>> first, rest = ({"pixels64": real["pixels64"][some]} for some in (slice(2), slice(2, 4)))
        >>> own_closest((first, ["a", "c"]), (first, ["a", "b"]), (rest, ["c", "d"]), "pixels64").tolist()
        [True, False]
    """
    return agreeing(_closest(samples, training, heldout, feature), samples[1], [*training[1], *heldout[1]])


def _closest(samples: Set, training: Set, heldout: Set, feature: str) -> Tensor:
    """Return the row of the closest real image of each sample, training images first, int64 `(N, 1)`."""
    return nearest(samples[0][feature], torch.cat([training[0][feature], heldout[0][feature]]), 1).index


def closest(
    samples: Set, samples_new: Set, training: Set, heldout: Set, *, seed: int = 0, resamples: int = 1000
) -> dict[str, Estimate]:
    """Return `own`, `new` and `drawn` by each of `FEATURES`, such as `own-pixels64`; intervals resample captions.

    Args:
        samples, samples_new: features by name, `(N, D)`, of samples for training captions and for held-out ones, and these captions.
        training, heldout: features of the real images and their captions.

    Example:
        >>> real = dict.fromkeys(FEATURES, 10 * torch.eye(4))
        >>> some = lambda rows: {name: rows(points) for name, points in real.items()}
        >>> training, heldout = (some(lambda p: p[:2]), ["a", "b"]), (some(lambda p: p[2:]), ["c", "d"])
        >>> found = closest(training, (training[0], ["c", "d"]), training, heldout, resamples=10)
        >>> [found[f"{name}-pixels64"].value for name in NAMES]  # a model that knows its images and nothing else
        [1.0, 0.0, 1.0]
    """
    out = {}
    known = [*training[1], *heldout[1]]
    for feature in FEATURES:
        own, other = (_closest(some, training, heldout, feature) for some in (samples, samples_new))
        hits = {
            OWN: (agreeing(own, samples[1], known), samples[1]),
            NEW: (agreeing(other, samples_new[1], known), samples_new[1]),
            DRAWN: (other[:, 0] < len(training[1]), samples_new[1]),
        }
        for kind, (hit, groups) in hits.items():
            name = f"{kind}-{feature}"
            out[name] = bootstrap(hit, torch.mean, name=name, groups=groups, seed=seed, resamples=resamples, share=True)
    return out


def closest_rows(found: Mapping[str, Estimate]) -> list[Row]:
    """Return `own` and `new` by each feature as rows of a report; neither has a held-out figure, for both are of samples.

    Example:
        >>> names = [f"{kind}-{feature}" for kind in NAMES for feature in FEATURES]
        >>> rows = closest_rows({name: Estimate(0.5, 0.4, 0.6, 10, name) for name in names})
        >>> [row.name for row in rows]
        ['own-pixels64', 'own-edges16', 'new-pixels64', 'new-edges16']
    """
    return [Row(name, found[name], None, None) for kind in (OWN, NEW) for name in (f"{kind}-{f}" for f in FEATURES)]


def owners_of(captions: Sequence[str], labels: Sequence[Hashable]) -> dict[str, set[Hashable]]:
    """Return for each caption the labels of its images; near-duplicates share one, and any of them is the own image.

    Example:
        >>> owners_of(["a", "b", "a"], [0, 1, 2])
        {'a': {0, 2}, 'b': {1}}
    """
    out: dict[str, set[Hashable]] = {}
    for caption, label in zip(captions, labels, strict=True):
        out.setdefault(caption, set()).add(label)
    return out


def draws_its_images(row: Row) -> bool:
    """Tell whether a row says that a model draws its training images: `own` lies above the base's by more than half of the images, with its interval.

    Less can be what captions mean: a fine-tune that draws what a caption says, in the right style, comes near its image too.

    Example:
        >>> much, little = Estimate(0.9, 0.8, 1.0, 50), Estimate(0.3, 0.2, 0.4, 50)
        >>> [draws_its_images(Row("own-pixels64", much, little, excess)) for excess in (much, little, None)]
        [True, False, False]
    """
    return row.name.startswith(f"{OWN}-") and row.excess is not None and row.excess.low > MOSTLY


def own_rows(
    samples: Set,
    training: Set,
    heldout: Mapping[str, Tensor] | None,
    base: Set | None,
    *,
    duplicates: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> list[Row]:
    """Return `own` of the samples whose prompt is a training caption, beside the same of the base's samples for these captions.

    Args:
        samples, training: features by name and captions; of `FEATURES` those that are there are used.
        heldout: features of real images that were not trained: the more real images, the less is chance.
        base: samples of the base model for training captions, which knows the captions and not the images; its figure takes the place
            of the held-out one. None: there are none, and nothing says what captions alone give.
        duplicates: one label per training image, equal for near-duplicates, any of which is the own one.

    Returns:
        A row for each feature; none where captions tell images apart too little: chance, the mean share of the real images that bear a sample's
        caption, is above `MOST_BY_CHANCE`.

    Example:
        >>> real = dict.fromkeys(FEATURES, 10 * torch.eye(6))
        >>> rows = own_rows((real, list("abcdef")), (real, list("abcdef")), None, (real, list("bcdefa")), resamples=10)
        >>> [(row.name, row.generated.value, row.heldout.value, row.excess.value) for row in rows]
        [('own-pixels64', 1.0, 0.0, 1.0), ('own-edges16', 1.0, 0.0, 1.0)]
    """
    captions = list(training[1])
    labels: list[Hashable] = list(range(len(captions)) if duplicates is None else duplicates)
    owners = owners_of(captions, labels)
    own_of = Counter(labels)
    others = 0 if heldout is None else len(next(iter(heldout.values())))

    def asked(prompts: Sequence[str]) -> list[int]:
        return [i for i, prompt in enumerate(prompts) if prompt and prompt in owners]

    chosen = asked(samples[1])
    if not chosen or not (features := [name for name in FEATURES if name in samples[0] and name in training[0]]):
        return []
    share = [sum(own_of[label] for label in owners[samples[1][i]]) / (len(captions) + others) for i in chosen]
    chance = sum(share) / len(share)
    if chance > MOST_BY_CHANCE:
        return []

    sides = [(samples, chosen)]
    if base is not None and (of_base := asked(base[1])):
        sides.append((base, of_base))

    def rates(feature: str) -> list[Estimate]:
        """Return the share of each side; all sides in one pass over the training vectors, of which there can be a million."""
        rows = torch.cat([given[0][feature][some] for given, some in sides])
        near = nearest(rows, training[0][feature], 1)
        closer = torch.ones(len(rows), dtype=torch.bool)
        if heldout is not None:
            closer = near.distance[:, 0] <= nearest(rows, heldout[feature], 1).distance[:, 0]
        asked_for = [given[1][i] for given, some in sides for i in some]
        own = [labels[row] in owners[prompt] for row, prompt in zip(near.index[:, 0].tolist(), asked_for, strict=True)]
        hits, start, found = torch.tensor(own) & closer, 0, []
        details = (
            f"share of samples nearest to their caption's own training image; by chance {chance:.1%}",
            "images of the base for the same captions",
        )
        for (_, some), detail in zip(sides, details, strict=False):
            end = start + len(some)
            found.append(bootstrap(
                hits[start:end], torch.mean, name=f"{OWN}-{feature}", groups=asked_for[start:end], seed=seed, resamples=resamples,
                share=True, detail=detail,
            ))  # fmt: skip
            start = end
        return found

    out = []
    for feature in features:
        made, *known = rates(feature)
        out.append(Row(made.name, made, known[0] if known else None, difference(made, known[0]) if known else None))
    return out
