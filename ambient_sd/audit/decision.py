"""The one definition of a copy: an image that is nearer to a training image than images are that cannot be copies.

    D(x)  residual of x beside the training image t that explains it best                    `ambient_sd.audit.registration`
    r(x)  D(x) / D(t), where D(t) is the residual of t beside the other training images: members of a series do not shield one another
    p(x)  share of images that cannot be copies with r at least as small: 2 min over both blurs (Bonferroni), the largest over the nulls

    copy  p <= 1 %, and p is a discovery at a false-discovery rate of 5 % (Benjamini & Hochberg 1995);
          or D <= 0.1: the two differ by colour, blur or pose alone

An image that is not square is also looked at by its middle, and one with a wide border by what that frames (`looks_of`): its p is the least
of its looks times their number (Bonferroni).

An image that shows hardly anything (deviation below `registration.FLAT`: thin lines on white, a sample that is black) has no D that means anything.
Of it D = |x - t| / deviation of t, in place, still or mirrored: at most 0.1 it is a copy; above, it cannot be compared, D is infinite, and it
counts as neither (`Decided.compared`).

The null, images that cannot be copies: real images that the model never saw (held-out), and images of the base model for the same captions. Without
either, the training images beside each other, each without itself. p is conformal, (1 + number at least as near) / (n + 1) (Vovk et al. 2005). Below
the null's 5 % quantile q it is 5 % (r / q)^k, since distances to nearest neighbours have a power-law tail (Amsaleg et al., KDD 2015); k comes from the
5 % and the 20 % quantile and is at most `STEEPEST`. So p is not bounded by 1 / n, and a few images of the null that are twins of training images (the
same heart in another colour) hide no copy. Images of the null with D <= 0.1 leave it, and are counted.

d1 / d2 < 1/3 stays beside it as the published measure (`metrics.memorized`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ambient_sd.audit.neighbours import workers
from ambient_sd.audit.registration import FLAT, SCALES, Poses, Registered, deviation, prepare, register
from ambient_sd.families.encoders import rendered
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.sheets import as_rgb

RULE = "registration-3"  # stored with figures: those of another rule do not compare
HELDOUT, BASE = "held-out images", "images of the base model"  # the nulls' names
RENDERED = 256  # pixels; of larger images an autoencoder changes nothing that is left at 64
RATE = 0.05  # of false discoveries among the copies
EACH = 0.01  # of images that are no copies
SAME = 0.1  # residual of two images that differ by colour, blur and pose alone
BLANK = 1 / 255  # deviation of a training image below which it shows nothing at all
FRAMED = 0.85  # share of a side below which what a border frames is looked at by itself: poses find smaller ones badly, and none below 0.72
MOST_SQUARES = 21  # of one long image
_EVEN = 12  # of 255: a line of a border differs by no more, JPEG included
LEAST = 20  # images in a null
MOST = 512  # images in a null, training images that stand for it included
STEEPEST = 8.0
_ANCHOR, _SECOND = 0.05, 0.2
_SMALLEST = 1e-4


@dataclass(frozen=True)
class Null:
    """Hold r of images that cannot be copies, by blur, ascending, and how many twins of training images were left out.

    Example:
        >>> Null("held-out images", {0.7: torch.ones(30), 1.5: torch.ones(30)}).n
        30
    """

    name: str
    ratios: Mapping[float, Tensor]
    twins: int = 0

    @property
    def n(self) -> int:
        return len(self.ratios[SCALES[0]])


@dataclass(frozen=True)
class Decided:
    """Hold the decision for each image.

    Attributes:
        copy: bool `(N,)`. p: float64 `(N,)`.
        row: int64 `(N,)`, the training image that explains each best.
        residual, ratio: D and r at the finest blur, float64 `(N,)`; D is infinite where an image shows too little to be compared.

    Example:
        >>> one = torch.tensor([0.05], dtype=torch.float64)
        >>> len(Decided(copy=torch.tensor([True]), p=one, row=torch.tensor([3]), residual=one, ratio=one))
        1
    """

    copy: Tensor
    p: Tensor
    row: Tensor
    residual: Tensor
    ratio: Tensor

    def __len__(self) -> int:
        return len(self.copy)

    @property
    def compared(self) -> Tensor:
        """Return which images show enough to be compared, bool `(N,)`; the others are no evidence of anything."""
        return torch.isfinite(self.residual) | self.copy


Rendition = Callable[[Sequence[Image.Image]], Sequence[Image.Image]]


def through_vae(vae: Any, side: int, batch: int = 16) -> Rendition:
    """Return a rendition: images encoded and decoded by an autoencoder, the nearest to a copy that its model can come.

    Args:
        vae: an autoencoder of diffusers; its mode is decoded.
        side: pixels that images are brought to, a multiple of its factor.
        batch: images at a time.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> through_vae(tiny_pipeline().vae, 32)([Image.new("RGB", (48, 32), "red")])[0].size
        (32, 32)
    """
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(vae_scale_factor=1)  # `side` is a multiple already

    def through(images: Sequence[Image.Image]) -> list[Image.Image]:
        out: list[Image.Image] = []
        with torch.no_grad():
            for start in range(0, len(images), batch):
                some: Any = [as_rgb(image) for image in images[start : start + batch]]
                pixels: Any = processor.preprocess(some, height=side, width=side)
                out += processor.postprocess(
                    rendered(vae, pixels.to(vae.device, vae.dtype)).float().cpu(), output_type="pil"
                )
        return out

    return through


@dataclass
class CopyDecision:
    """Decide which images are copies of a training set.

    Args:
        training: the training images, no two equal ones; each is read once.
        labels: one per training image, equal for near-duplicates; None: all differ.
        unseen: name -> images that cannot be copies ("held-out", "base model"); at most `MOST` of each are used, evenly spaced.
        renditions: functions that return images as a generated copy shows them: through the model's autoencoder.
        mirrored: a mirror image is a copy too.
        progress: show a bar.

    Raises:
        UserError: fewer than two different training images.

    Example:
        >>> from PIL import Image
        >>> import numpy as np
        >>> draw = lambda seed: Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64))
        >>> decide = CopyDecision([draw(0), draw(1)])  # too few for a null: a copy has a residual of at most 0.1
        >>> decide([draw(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT), draw(200)]).copy.tolist()
        [True, False]
    """

    training: Sequence[Image.Image]
    labels: Sequence[Hashable] | None = None
    unseen: Mapping[str, Sequence[Image.Image]] = field(default_factory=dict)
    renditions: Sequence[Rendition] = ()
    mirrored: bool = True
    progress: bool = False

    @classmethod
    def of(
        cls, training: Sequence[Image.Image], labels: Sequence[Hashable] | None = None, *, heldout: Sequence[Image.Image] = (),
        base: Sequence[Image.Image] = (), vae: Any = None, side: int = 0, mirrored: bool = True, progress: bool = False,
    ) -> CopyDecision:  # fmt: skip
        """Build the decision as every command does.

        Args:
            training, labels, mirrored, progress: as above.
            heldout: images that the model never saw. base: images of the base model for the same captions.
            vae: the model's autoencoder; where it samples at `side` <= `RENDERED` pixels, training images are searched as the
                autoencoder renders them too. The cost is one pass of it over the training images.
        """
        unseen = {name: images for name, images in ((HELDOUT, heldout), (BASE, base)) if len(images)}
        renditions = [through_vae(vae, side)] if vae is not None and side <= RENDERED else []
        return cls(training, labels, unseen, renditions, mirrored, progress)

    def __post_init__(self) -> None:
        count = len(self.training)
        given = list(range(count)) if self.labels is None else list(self.labels)
        if len(given) != count:
            raise UserError(f"{len(given)} labels for {count} training images", rule="one each")
        self._row, self._images, self._versions = self._views()
        given = [given[row] for row in self._row.tolist()]
        numbers: dict[Hashable, int] = {}
        self._label = torch.tensor([numbers.setdefault(name, len(numbers)) for name in given], dtype=torch.int64)
        if len(numbers) < 2:
            raise UserError(
                f"{len(numbers)} different training image", rule="an image is held against the others of its set"
            )
        self._poses = Poses(self._images)
        self._raw: dict[str, dict[float, Tensor]] = {}
        self._own: dict[int, tuple[Tensor, dict[float, Tensor]]] = {}
        self.nulls = [self._null(name, _some(images)) for name, images in self.unseen.items() if len(images)]
        self.nulls = [null for null in self.nulls if null.n >= LEAST]
        if not self.nulls and (own := self._leave_one_out()).n >= LEAST:
            self.nulls = [own]

    def _views(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the row of each view of a training image, the views prepared, and each rendition of them prepared.

        A trainer squeezes an image that is not square, or cuts a square from its middle or anywhere: the whole and `squares` are searched.
        """
        rows: list[int] = []
        parts: list[Tensor] = [prepare([])]
        versions: list[list[Tensor]] = [[prepare([])] for _ in self.renditions]
        for start in range(0, len(self.training), 16):  # images as they are take memory
            views: list[Image.Image] = []
            for row in range(start, min(start + 16, len(self.training))):
                image = self.training[row]
                every = [image, *squares(image)]
                rows += [row] * len(every)
                views += every
            parts.append(prepare(views))
            for version, rendition in zip(versions, self.renditions, strict=True):
                version.append(prepare(rendition(views)))
        return torch.tensor(rows, dtype=torch.int64), torch.cat(parts), [torch.cat(version) for version in versions]

    @property
    def rendered(self) -> Tensor | None:
        """Return the views of the training images in their first rendition, float32 `(V, 3, SIDE, SIDE)` in [0, 1]; None without one."""
        return self._versions[0] if self._versions else None

    def __call__(self, images: Sequence[Image.Image], published: Tensor | None = None) -> Decided:
        """Decide for images that were sampled together: the false-discovery rate is taken over them.

        Args:
            published: bool `(N,)`, marks of a published measure (`metrics.memorized`). They count where there is no null.
        """
        looks = [looks_of(image) for image in images]
        owner = torch.tensor([i for i, some in enumerate(looks) for _ in some], dtype=torch.int64)
        x = prepare([look for some in looks for look in some])
        row, residual, ratio = self._best(self._find(x, "copies"))
        d = residual[SCALES[0]]
        p = torch.ones(len(x), dtype=torch.float64)
        if self.nulls and len(x):
            p = torch.stack([combined(null, ratio) for null in self.nulls]).amax(0)
        faint = torch.nonzero((deviation(x) < FLAT) & (p > EACH)).flatten()
        if len(faint):  # what is left of it in another pose is compared with other images, or with nothing
            row[faint], apart = self._in_place(x[faint])
            d[faint] = torch.where(apart <= SAME, apart, torch.inf)
        p = (p * torch.tensor([len(some) for some in looks], dtype=torch.float64)[owner]).clamp(max=1)  # Bonferroni
        best = _least(owner, p - 2 * (d <= SAME) + 1e-6 * d.clamp(max=1e3), len(images))
        row, p, d, r = row[best], p[best], d[best], ratio[SCALES[0]][best]
        marks = discoveries(p) | (d <= SAME)
        if published is not None and not self.nulls:
            marks = marks | published
        return Decided(marks, p, self._row[row], d, r)

    @property
    def rule(self) -> str:
        """Return the rule as one sentence."""
        same = f"a residual of at most {SAME:g}: nothing but colour, blur or pose tells it from a training image"
        if not self.nulls:
            return f"A copy has {same}. There were fewer than {LEAST} images that cannot be copies, too few to judge what else is near."
        by = " and ".join(f"{null.n} {null.name}" for null in self.nulls)
        return f"A copy is nearer to a training image than {by} are, at p of at most {EACH:.0%} and {RATE:.0%} false discoveries; or it has {same}."

    def p_of_null(self, name: str) -> Tensor | None:
        """Return p of the images of a null, each judged without itself, float64 `(n,)`; None if there is no such null."""
        if all(null.name != name for null in self.nulls):
            return None
        ratios = self._raw[name]
        out = []
        for i in range(len(ratios[SCALES[0]])):
            others = {s: torch.cat([v[:i], v[i + 1 :]]).sort().values for s, v in ratios.items()}
            out.append(combined(Null(name, others), {s: v[i : i + 1] for s, v in ratios.items()}))
        return torch.cat(out)

    def background(self, name: str) -> Tensor | None:
        """Return which images of a null would be called copies, each judged without itself, twins included; None if there is no such null."""
        p = self.p_of_null(name)
        if p is None:
            return None
        twins = next(null.twins for null in self.nulls if null.name == name)
        return torch.cat([discoveries(p), torch.ones(twins, dtype=torch.bool)])

    def _in_place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the view nearest to each image pixel by pixel, and the difference over the view's deviation; infinite where the view is blank."""
        t = self._images.flatten(1)
        views = [x, x.flip(3)] if self.mirrored else [x]
        exact = "donot_use_mm_for_euclid_dist"  # a difference of products would round more than such images differ by
        apart = torch.stack([torch.cdist(view.flatten(1), t, compute_mode=exact) for view in views]).amin(0)
        spread = (self._images - self._images.mean((2, 3), keepdim=True)).flatten(1).norm(dim=1)
        ratio = (apart / spread.clamp_min(_SMALLEST)).masked_fill(spread < BLANK * t.shape[1] ** 0.5, torch.inf)
        least = ratio.min(1)
        return least.indices, least.values.double()

    # --- the surroundings of training images -----------------------------------------------------------------------------

    def _find(self, x: Tensor, what: str, barred: Tensor | None = None) -> Registered:
        step = 16

        def one(start: int) -> Registered:
            no = None if barred is None else barred[start : start + step]
            return register(
                x[start : start + step], self._images, not_allowed=no, renditions=self._versions, poses=self._poses,
                mirrored=self.mirrored,
            )  # fmt: skip

        starts = range(0, len(x), step)
        if not starts:
            return register(x, self._images)
        # Batches need nothing of one another; threads that meet after every small operation would wait most of the time.
        with workers() as pool:
            found = (pool.map if pool else map)(one, starts)
            bar = tqdm(found, what, len(starts), unit_scale=step, unit="img", disable=not self.progress, leave=False)
            parts = list(bar)
        return Registered(
            torch.cat([p.index for p in parts]), {s: torch.cat([p.residual[s] for p in parts]) for s in SCALES}
        )

    def _register_own(self, rows: Sequence[int]) -> None:
        """Register training images against the others, once each."""
        new = sorted(set(rows) - self._own.keys())
        if not new:
            return
        barred = self._label[new][:, None] == self._label[None, :]
        found = self._find(self._images[new], "training images", barred)
        for place, row in enumerate(new):
            self._own[row] = (found.index[place], {s: found.residual[s][place] for s in SCALES})

    def _scale(self, row: int, without: int | None = None) -> dict[float, float]:
        """Return the residual of the nearest OTHER training image; one that differs by colour, blur or pose alone is no other."""
        index, residual = self._own[row]
        # A row can stand here twice, found still and in another pose: it is the same image in both.
        usable = ~torch.isin(index, index[residual[SCALES[0]] <= SAME])
        if without is not None:
            usable &= self._label[index] != self._label[without]
        return {s: float(residual[s][usable].min()) if bool(usable.any()) else math.inf for s in SCALES}

    def _best(
        self, found: Registered, own: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[float, Tensor], dict[float, Tensor]]:
        """Return per query the row that explains it best, and D and r by blur; `own`: the queries are these training images."""
        best = found.residual[SCALES[0]].argmin(1, keepdim=True)
        rows = found.index.gather(1, best)[:, 0]
        self._register_own(rows.tolist())
        residual: dict[float, Tensor] = {}
        ratio: dict[float, Tensor] = {}
        scales = [self._scale(row, None if own is None else own[i]) for i, row in enumerate(rows.tolist())]
        for s in SCALES:
            residual[s] = found.residual[s].gather(1, best)[:, 0].double()
            around = torch.tensor([one[s] for one in scales], dtype=torch.float64).clamp(_SMALLEST, 1.0)
            ratio[s] = residual[s] / around
        return rows, residual, ratio

    # --- images that cannot be copies ------------------------------------------------------------------------------------

    def _null(self, name: str, images: Sequence[Image.Image]) -> Null:
        _, residual, ratio = self._best(self._find(prepare(images), name))
        return self._kept(name, residual, ratio)

    def _leave_one_out(self) -> Null:
        """Return the null of training images, one of each label, beside the others."""
        # Of an image with several views the second, its middle, is what a square sample of it would show.
        first = list({int(label): row for row, label in reversed(list(enumerate(self._label.tolist())))}.values())
        first = [row + 1 if row + 1 < len(self._row) and self._row[row + 1] == self._row[row] else row for row in first]
        rows = sorted(first)[:: max(1, -(-len(first) // MOST))]
        self._register_own(rows)
        found = Registered(
            torch.stack([self._own[row][0] for row in rows]),
            {s: torch.stack([self._own[row][1][s] for row in rows]) for s in SCALES},
        )
        _, residual, ratio = self._best(found, rows)
        return self._kept("training images among themselves", residual, ratio)

    def _kept(self, name: str, residual: Mapping[float, Tensor], ratio: Mapping[float, Tensor]) -> Null:
        twin = residual[SCALES[0]] <= SAME
        self._raw[name] = {s: ratio[s][~twin] for s in SCALES}
        return Null(name, {s: v.sort().values for s, v in self._raw[name].items()}, int(twin.sum()))


def _some(images: Sequence[Image.Image]) -> list[Image.Image]:
    step = max(1, -(-len(images) // MOST))
    chosen = [images[i] for i in range(0, len(images), step)]
    return [(squares(image) or [image])[0] for image in chosen]


def squares(image: Image.Image) -> list[Image.Image]:
    """Return the middle square of an image, those at its ends, and of a long image more in between, at most half a side apart, as far as a
    pose reaches; none of an image that is square within 5 %.

    Example:
        >>> [square.size for square in squares(Image.new("RGB", (96, 64)))]
        [(64, 64), (64, 64), (64, 64)]
        >>> len(squares(Image.new("RGB", (192, 64))))
        5
    """
    wide, high = image.size
    side, room = min(wide, high), abs(wide - high)
    if wide + high - side <= 1.05 * side:
        return []
    count = min(MOST_SQUARES, max(3, math.ceil(room / (side / 2)) + 1))
    places = [round(room * i / (count - 1)) for i in range(count)]
    order = [room // 2, 0, room, *(at for at in places[1:-1] if abs(at - room // 2) > side // 8)]
    return [image.crop((at, 0, at + side, side) if wide > high else (0, at, side, at + side)) for at in order]


def looks_of(image: Image.Image) -> list[Image.Image]:
    """Return the ways in which a generated image is laid over training images: as it is; of one that is not square its middle too; of one with
    a border wider than a pose reaches, what the border frames.

    Example:
        >>> framed = Image.new("RGB", (64, 64), "white")
        >>> framed.paste(Image.effect_noise((64, 32), 99).convert("RGB"), (0, 16))
        >>> [look.size for look in looks_of(framed)]
        [(64, 64), (64, 32)]
    """
    return [image, *squares(image)[:1], *_unframed(image)]


def _unframed(image: Image.Image) -> list[Image.Image]:
    """Return what a border of one colour frames where that is less than `FRAMED` of a side, else nothing."""
    pixels = np.asarray(as_rgb(image), np.int16)
    inside = []
    for axis in (1, 0):
        lines = pixels if axis == 1 else pixels.swapaxes(0, 1)
        busy = np.flatnonzero(np.abs(lines - lines[:, :1]).max((1, 2)) > _EVEN)
        if not len(busy):
            return []
        inside.append((int(busy[0]), int(busy[-1]) + 1))
    (top, bottom), (left, right) = inside
    if (bottom - top) >= FRAMED * image.height and (right - left) >= FRAMED * image.width:
        return []
    if min(bottom - top, right - left) < 8:
        return []
    return [image.crop((left, top, right, bottom))]


def _least(owner: Tensor, key: Tensor, n: int) -> Tensor:
    """Return for each of n owners the place of its least key, int64 `(n,)`.

    Example:
        >>> _least(torch.tensor([0, 1, 1]), torch.tensor([0.3, 0.2, 0.1]), 2).tolist()
        [0, 2]
    """
    order = key.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]
    return order[torch.searchsorted(owner[order].contiguous(), torch.arange(n))]


def combined(null: Null, ratio: Mapping[float, Tensor]) -> Tensor:
    """Return p over both blurs, float64 `(N,)`: `min(1, 2 min_s p_s)` (Bonferroni).

    Example:
        >>> null = Null("", {s: torch.linspace(0.5, 1.5, 99, dtype=torch.float64) for s in SCALES})
        >>> [round(float(p), 2) for p in combined(null, {s: torch.tensor([0.7, 1.5], dtype=torch.float64) for s in SCALES})]
        [0.42, 1.0]
    """
    each = torch.stack([tail(null.ratios[s], ratio[s]) for s in SCALES])
    return (len(SCALES) * each.amin(0)).clamp(max=1)


def tail(null: Tensor, values: Tensor) -> Tensor:
    """Return the share of a null with values at least as small, float64 `(N,)`; a power law below the null's 5 % quantile.

    Args:
        null: ascending, `(n,)`. values: `(N,)`, at least 0.

    Example:
        >>> null = torch.linspace(0.5, 1.5, 99, dtype=torch.float64)
        >>> [round(float(v), 3) for v in tail(null, torch.tensor([1.0, 0.1], dtype=torch.float64))]
        [0.51, 0.0]
    """
    n = len(null)
    p = (1 + torch.searchsorted(null, values, right=True).double()) / (n + 1)
    finite = null[torch.isfinite(null)].clamp_min(_SMALLEST)
    if len(finite) < LEAST - 1:
        return p
    low, high = torch.quantile(finite, torch.tensor([_ANCHOR, _SECOND], dtype=torch.float64)).tolist()
    steep = min(STEEPEST, math.log(_SECOND / _ANCHOR) / max(math.log(high / low), 1e-9))
    carried = _ANCHOR * (values / low).clamp(max=1).pow(steep)
    return torch.where(values < low, carried, p)


def discoveries(p: Tensor, rate: float = RATE, each: float = EACH) -> Tensor:
    """Mark the discoveries of Benjamini & Hochberg (1995) among those with p at most `each`, bool `(N,)`.

    The largest k with p_(k) <= rate k / N: the k smallest are discoveries.

    Example:
        >>> discoveries(torch.tensor([0.0001, 0.8, 0.009, 0.03])).tolist()
        [True, False, True, False]
    """
    if not len(p):
        return torch.zeros(0, dtype=torch.bool)
    order = p.sort().values
    passed = torch.nonzero(order <= rate * torch.arange(1, len(p) + 1) / len(p)).flatten()
    if not len(passed):
        return torch.zeros(len(p), dtype=torch.bool)
    return (p <= order[passed[-1]]) & (p <= each)
