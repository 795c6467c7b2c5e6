"""Lemmas 4.1 and 4.2 of Shah et al. (ICML 2025) on real latents, in closed form: no network is trained or loaded but the VAE.

4.1  On finitely many images the optimum of the plain loss returns them. Above s_n the optimum of the ambient loss returns the
     noisy copies mapped back, `h = (y_n - (1 - a) y_t) / a` where y_t tells which copy it came from: the image
     plus noise of standard deviation

         s_n / sqrt(a),   a = 1 - s_n^2 / s_t^2

     (`y_t = y_n + s_t sqrt(a) xi`, so `h = x0 + s_n eps_n - s_n^2 xi / (s_t sqrt(a))`).
4.2  m independent noisy copies of an image average to noise s_n / sqrt(m). With delta the distance to the nearest other
     image and d numbers, `d1 / d2 = sqrt(s_n^2 d / m) / sqrt(delta^2 + s_n^2 d / m)`: a copy (below 1/3) from
     `m = 8 s_n^2 d / delta^2` on, without any denoiser. Ways in which a training makes two copies of one are measured too.

Everything is a function of images, level and seed. It says nothing of what a trained network learns of either optimum.

    python -m experiments.lemmas --out build/lemmas
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from PIL import Image

from ambient_sd.audit.metrics import MEMORIZED_RATIO
from ambient_sd.audit.neighbours import nearest
from ambient_sd.data.duplicates import shared_noise
from ambient_sd.data.latents import encode
from ambient_sd.data.noise import image_noise
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.data.stream import keyed_generator
from ambient_sd.data.views import View, ViewRule
from ambient_sd.families.encoders import ImageEncoder
from ambient_sd.oracle import ideal_ambient_denoiser, ideal_denoiser
from ambient_sd.reporting import pages
from ambient_sd.reporting.charts import Line, Mark, chart, standalone
from ambient_sd.reporting.sheets import contact_sheet, data_uri, png_bytes
from ambient_sd.sampling import own_device
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.files import atomic_write

COPIES = tuple(2**k for k in range(11))  # 1 to 1024
_WIDEST = 4000  # pixels of a sheet on the page
_FACTORS = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0, 14.0)  # s_t over s_n


@dataclass(frozen=True)
class Value:
    """Hold a mean over images with its 95 % bootstrap interval, beside the closed form."""

    value: float
    low: float
    high: float
    expected: float | None = None


@dataclass(frozen=True)
class Optimum:
    """Hold Lemma 4.1 at one noise level: of each optimum the error per number, and d1 / d2 to the clean images.

    `identified` is the share of inputs whose copy has a posterior weight above 0.99: where the closed form holds.
    """

    level: float
    plain: Value
    ambient: Value
    plain_ratio: Value
    ambient_ratio: Value
    identified: float


@dataclass(frozen=True)
class Leak:
    """Hold Lemma 4.2 at one number of copies: residual noise per number, d1 / d2, share of copies (d1 / d2 < 1/3)."""

    copies: int
    residual: Value
    ratio: Value
    share: float


def optima(x0: torch.Tensor, y_n: torch.Tensor, s_n: float, seed: int) -> tuple[list[Optimum], dict[float, Any]]:
    """Measure both optima at inputs made from the noisy copies; return the figures and the outputs by level.

    Args:
        x0: (M, C, h, w) clean latents. y_n: their noisy copies `x0 + s_n eps_n`.
        s_n: the noise level of the fixed copies. seed: of the fresh noise.
    """
    found, outputs = [], {}
    for factor in _FACTORS:
        s_t = s_n * factor
        a = 1 - 1 / factor**2
        xi = _noise(x0.shape, seed, "fresh", factor)
        y_t = y_n.double() + s_t * math.sqrt(a) * xi
        plain = ideal_denoiser(y_t, 1.0, s_t, x0)
        ambient = ideal_ambient_denoiser(y_t, 1.0, s_t, y_n, alpha_n=1.0, sigma_n=s_n)
        # E[y_n | y_t] back from the prediction: its distance to the copy tells whether the copy was recognised.
        weight = _own_weight(y_t, y_n.double(), s_t * math.sqrt(a))
        found.append(Optimum(
            s_t, _mean(_error(plain, x0), seed, 0.0), _mean(_error(ambient, x0), seed, s_n / math.sqrt(a)),
            _mean(ratios(plain, x0), seed), _mean(ratios(ambient, x0), seed), float((weight > 0.99).double().mean()),
        ))  # fmt: skip
        outputs[s_t] = {"input": y_t, "plain": plain, "ambient": ambient}
    return found, outputs


def leakage(
    x0: torch.Tensor, keys: Sequence[str], s_n: float, seed: int, copies: Sequence[int] = COPIES
) -> tuple[list[Leak], dict[int, torch.Tensor]]:
    """Average m noisy copies of each image under m noise seeds; return the figures and the averages by m.

    Args:
        x0: (M, C, h, w) clean latents. keys: of the images. s_n: the noise level of the fixed copies.
        seed: of the noises. copies: numbers m, ascending.
    """
    found, averages = [], {}
    total = torch.zeros(x0.shape, dtype=torch.float64)
    size, apart = x0[0].numel(), _nearest(x0)
    for k in range(max(copies)):
        # The first is the one that training uses; for the others any independent draws do, and these are faster.
        total += image_noise(keys, tuple(x0.shape[1:]), seed=seed) if k == 0 else _noise(x0.shape, seed, "copy", k)
        if (m := k + 1) in copies:
            average = x0 + s_n * total / m
            d1_squared = s_n**2 * size / m
            expected = float((d1_squared / (apart.square() + d1_squared)).sqrt().mean())
            ratio = ratios(average, x0)
            found.append(Leak(m, _mean(_error(average, x0), seed, s_n / math.sqrt(m)), _mean(ratio, seed, expected),
                              float((ratio < MEMORIZED_RATIO).double().mean())))  # fmt: skip
            averages[m] = average
    return found, averages


def ways_to_leak(encoder: ImageEncoder, images: ImageDataset, s_n: float, seed: int) -> list[dict[str, Any]]:
    """Return what is left of the noise in what a training shows of one image, for ways of making its copies.

    Each row: what is done, the residual noise of the best average in units of s_n, and its closed form.
    """
    still = ViewRule(images.sizes[0][0], True, False, True, seed)
    x0 = _encode(encoder, images, still, View())
    turned = _encode(encoder, images, still, View(flip=True)).flip(-1)  # mirrored as an image, and back as a latent
    shape, keys = tuple(x0.shape[1:]), images.keys
    eps = image_noise(keys, shape, seed=seed)
    again = image_noise(keys, shape, seed=seed + 1)
    other = _recompressed(images)
    copies = _encode(encoder, other, still, View())
    own = image_noise(other.keys, shape, seed=seed)
    both = _joined(images, other).check(near_duplicates=True)
    grouped = shared_noise(both.noise_keys, both.mirrored, shape, seed=seed)
    first, second = grouped[: len(images)], grouped[len(images) :]
    rolled = [eps.roll((-dy, -dx), (-2, -1)) for dy in (0, 1) for dx in (0, 1)]
    half, quarter = 1 / math.sqrt(2), 1 / 2
    rows: list[tuple[str, torch.Tensor, float]] = [
        ("ours: one copy, however many epochs", s_n * torch.stack([eps] * 4).mean(0), 1.0),
        ("ours: image and noise mirrored together, then mirrored back", s_n * (eps + eps.flip(-1).flip(-1)) / 2, 1.0),
        ("mirror the latent, then add the same noise (the paper's code)", s_n * (eps + eps.flip(-1)) / 2, half),
        (
            "mirror the image before the VAE, then add the same noise",
            (s_n * (eps + eps.flip(-1)) + turned - x0) / 2,
            half,
        ),
        ("four crops, one latent pixel apart, then add the same noise", s_n * torch.stack(rolled).mean(0), quarter),
        ("a new noise in each of two epochs", s_n * (eps + again) / 2, half),
        ("a JPEG copy under its own noise", (s_n * (eps + own) + copies - x0) / 2, half),
        ("a JPEG copy in the group of its image, one noise", (s_n * (first + second) + copies - x0) / 2, 1.0),
    ]
    found = []
    for name, residual, expected in rows:
        value = _mean(residual.double().square().flatten(1).mean(1).sqrt() / s_n, seed, expected)
        found.append({"way": name, **asdict(value)})
    return found


def ratios(found: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Return d1 / d2 of each latent against a set, (B,) float64; an exact copy has 0."""
    return nearest(found.double().flatten(1), data.double().flatten(1)).ratio


def _own_weight(y_t: torch.Tensor, y_n: torch.Tensor, fresh: float) -> torch.Tensor:
    squared = torch.cdist(y_t.flatten(1), y_n.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.softmax(-squared / (2 * fresh**2), 1).diagonal()


def _error(found: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    return (found.double() - x0.double()).square().flatten(1).mean(1).sqrt()


def _nearest(x0: torch.Tensor) -> torch.Tensor:
    flat = x0.double().flatten(1)
    return nearest(flat, flat, 1, exclude_self=True).distance[:, 0]


def _noise(shape: Sequence[int], seed: int, *purpose: object) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=keyed_generator("lemmas", seed, *purpose), dtype=torch.float64)


def _mean(values: torch.Tensor, seed: int, expected: float | None = None) -> Value:
    generator = keyed_generator("lemmas", seed, "interval")
    draws = values.double()[torch.randint(len(values), (1000, len(values)), generator=generator)].mean(1)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Value(float(values.mean()), low, high, expected)


def _encode(encoder: ImageEncoder, images: ImageDataset, rule: ViewRule, view: View) -> torch.Tensor:
    samples = [rule.see(images[i], view) for i in range(len(images))]
    return encode(encoder, samples, noise_seed=rule.noise_seed)


def _recompressed(images: ImageDataset) -> ImageDataset:
    """Return the images as JPEG files of quality 90."""
    files = []
    for i in range(len(images)):
        buffer = io.BytesIO()
        images[i].image.save(buffer, "JPEG", quality=90, subsampling=0)
        files.append(buffer.getvalue())
    return ImageDataset(files, images.captions, [f"{n} (JPEG)" for n in images.names], images.source).check()


def _joined(a: ImageDataset, b: ImageDataset) -> ImageDataset:
    files: list[bytes | Path] = []
    for one in (a, b):
        for i in range(len(one)):
            buffer = io.BytesIO()
            one[i].image.save(buffer, "PNG")
            files.append(buffer.getvalue())
    return ImageDataset(files, a.captions + b.captions, a.names + b.names, a.source)


def decoder(vae: Any) -> Callable[[torch.Tensor], list[Image.Image]]:
    """Return what turns latents, as the U-Net sees them, into images."""

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> list[Image.Image]:
        z = latents.to(vae.device, torch.float32) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels = torch.cat([vae.decode(one[None]).sample for one in z])
        levels = (
            ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        )
        return [Image.fromarray(array) for array in levels]

    return decode


def study(
    out: Path, *, data: str, model: str, row_filter: Sequence[tuple[str, str, str]], resolution: int, level: float, seed: int,
    shown: int = 6,
) -> dict[str, Any]:  # fmt: skip
    """Measure both lemmas; write lemmas.json, index.html, and each figure as a file of its own.

    Raises:
        UserError: images or model are unusable, or the level is not above 0.
    """
    from ambient_sd.families.base import check_base

    if not 0 < level < math.inf:
        raise UserError(f"level is {level}", rule="a noisy copy needs noise: above 0 and finite")
    base = check_base(model, resolution=resolution)
    images = load_rows(data, row_filter=row_filter).check(near_duplicates=True)
    images = images.subset(images.one_of_each()).check()
    if len(images) < shown:
        raise UserError(f"{len(images)} distinct images", rule=f"at least {shown} are shown")
    encoder = base.images().to(own_device())
    decode = decoder(encoder.vae)
    rule = ViewRule(resolution, True, False, True, seed)
    x0 = _encode(encoder, images, rule, View())
    y_n = x0.double() + level * image_noise(images.keys, tuple(x0.shape[1:]), seed=seed).double()
    first, outputs = optima(x0, y_n, level, seed)
    second, averages = leakage(x0, images.keys, level, seed)
    ways = ways_to_leak(encoder, images, level, seed)
    size, apart = x0[0].numel(), float(_nearest(x0).median())
    result = {
        "version": 1, "images": len(images), "numbers": size, "level": level, "seed": seed, "resolution": resolution,
        "model": base.label, "data": Path(data).name if Path(data).exists() else data, "nearest_median": apart,
        "copies_needed": (1 / MEMORIZED_RATIO**2 - 1) * level**2 * size / apart**2,
        "lemma_4_1": [asdict(o) for o in first], "lemma_4_2": [asdict(leak) for leak in second], "ways": ways,
    }  # fmt: skip
    sheets = {
        "lemma-4-1": _sheet_of_optima(decode, x0, y_n, outputs, shown),
        "lemma-4-2": _sheet_of_averages(decode, x0, averages, shown),
    }
    charts = {"lemma-4-1": _chart_of_optima(first), "lemma-4-2": _chart_of_leakage(second),
              "lemma-4-2-ratio": _chart_of_ratio(second)}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for name, sheet in sheets.items():
        atomic_write(out / f"{name}.png", png_bytes(sheet))
    for name, svg in charts.items():
        atomic_write(out / f"{name}.svg", standalone(svg))
    atomic_write(out / "lemmas.json", json.dumps(result, indent=1) + "\n")
    _write_page(out / "index.html", result, first, second, sheets, charts)
    return result


def _sheet_of_optima(
    decode: Callable[[torch.Tensor], list[Image.Image]], x0: torch.Tensor, y_n: torch.Tensor, outputs: dict[float, Any], shown: int
) -> Image.Image:  # fmt: skip
    cells, captions = decode(x0[:shown]), ["training image"] + [""] * (shown - 1)
    cells += decode(y_n[:shown])
    captions += ["noisy copy"] + [""] * (shown - 1)
    for level in list(outputs)[2:7:2]:
        for kind in ("input", "plain", "ambient"):
            cells += decode(outputs[level][kind][:shown])
            captions += [f"{kind} s {level:.2g}"] + [""] * (shown - 1)
    return contact_sheet([enlarged(c) for c in cells], columns=shown, captions=captions)


def _sheet_of_averages(
    decode: Callable[[torch.Tensor], list[Image.Image]], x0: torch.Tensor, averages: dict[int, torch.Tensor], shown: int
) -> Image.Image:  # fmt: skip
    cells, captions = [], []
    for m in list(averages)[::2]:
        cells += decode(averages[m][:shown])
        captions += [f"average of {m}" if m > 1 else "one copy"] + [""] * (shown - 1)
    cells += decode(x0[:shown])
    captions += ["the image"] + [""] * (shown - 1)
    return contact_sheet([enlarged(c) for c in cells], columns=shown, captions=captions)


def enlarged(image: Image.Image) -> Image.Image:
    """Return a small image at twice its size, pixel by pixel."""
    return image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST) if image.width <= 96 else image


def _chart_of_optima(found: Sequence[Optimum]) -> Markup:
    levels = [o.level for o in found]
    return chart(
        "Error of the two optima by noise level",
        [
            Line("ambient optimum", levels, [o.ambient.value for o in found], dots=True, colour=2),
            Line("s_n / sqrt(a)", levels, [o.ambient.expected or 0.0 for o in found], dashed=True, colour=2),
            Line("plain optimum", levels, [o.plain.value for o in found], dots=True, colour=1),
        ],
        x_label="noise level s_t",
    )


def _chart_of_leakage(found: Sequence[Leak]) -> Markup:
    m = [float(leak.copies) for leak in found]
    return chart(
        "Noise left in the average of m noisy copies",
        [
            Line("measured", m, [leak.residual.value for leak in found], dots=True),
            Line("s_n / sqrt(m)", m, [leak.residual.expected or 0.0 for leak in found], dashed=True, colour=0),
        ],
        x_label="copies m",
        y_scale="log",
    )


def _chart_of_ratio(found: Sequence[Leak]) -> Markup:
    m = [float(leak.copies) for leak in found]
    return chart(
        "How near the average is to its image",
        [
            Line("d1/d2, mean over images", m, [leak.ratio.value for leak in found], dots=True),
            Line("closed form", m, [leak.ratio.expected or 0.0 for leak in found], dashed=True, colour=0),
            Line("copy rate, d1/d2 < 1/3", m, [leak.share for leak in found], colour=1),
        ],
        x_label="copies m",
        marks=[Mark("1/3", MEMORIZED_RATIO, upright=False)],
        top=1.0,
    )


def _write_page(
    path: Path, result: dict[str, Any], first: Sequence[Optimum], second: Sequence[Leak], sheets: dict[str, Image.Image],
    charts: dict[str, Markup],
) -> None:  # fmt: skip
    n, level, needed = result["images"], result["level"], result["copies_needed"]
    pages.write_article(
        path,
        "Lemmas 4.1 and 4.2",
        f"One noisy copy of an image does not give it away; {needed:.0f} copies under fresh noise do.",
        [
            pages.Section(
                "Lemma 4.1: the best that a network can learn",
                ["Fed with a noisier version of an image's one noisy copy, the optimum of the plain loss returns the image. The optimum of the "
                 "ambient loss returns the copy mapped back: the image under noise of at least s_n, whatever the input."],
                [pages.Picture("Decoded", data_uri(sheets["lemma-4-1"], _WIDEST), "First rows: images and their one noisy copy; then input, plain "
                               "optimum and ambient optimum at three noise levels.")],
                [pages.Chart("Error per number", charts["lemma-4-1"], "dots: measured; dashed: closed form, which holds where the copy is recognised")],
                [pages.Table(["s_t", "plain: error", "ambient: error", "s_n / sqrt(a)", "plain: d1/d2", "ambient: d1/d2", "recognised"],
                             [[f"{o.level:.3g}", _show(o.plain), _show(o.ambient), f"{o.ambient.expected:.4f}", _show(o.plain_ratio),
                               _show(o.ambient_ratio), f"{o.identified:.0%}"] for o in first])],
                pages.terms("noise level s_n", "d1/d2", "interval"),
            ),
            pages.Section(
                "Lemma 4.2: two copies are one too many",
                [f"The average of m copies under m noises carries noise s_n/√m. For the median image {needed:.0f} copies make it a copy "
                 "(d1/d2 below 1/3), without any denoiser."],
                [pages.Picture("Decoded averages", data_uri(sheets["lemma-4-2"], _WIDEST), "m = 1, 4, 16, ..., 1024, and the image")],
                [pages.Chart("Noise left in the average", charts["lemma-4-2"], "both axes logarithmic"),
                 pages.Chart("How near the average is to its image", charts["lemma-4-2-ratio"], "d1: to its own image, d2: to the nearest other one")],
                [pages.Table(["m", "noise left", "s_n / sqrt(m)", "d1/d2", "closed form", "copies"],
                             [[leak.copies, _show(leak.residual), f"{leak.residual.expected:.4f}", _show(leak.ratio), f"{leak.ratio.expected:.3f}",
                               f"{leak.share:.0%}"] for leak in second])],
            ),
            pages.Section(
                "How a training makes the second copy without meaning to",
                ["Noise left in the average of all that is shown of one image, in units of s_n. At 1 nothing leaks.",
                 "Where an image passes the VAE again (mirrored, or as JPEG), the difference of the latents is part of what is left: somewhat "
                 "more than the noise alone."],
                tables=[pages.Table(["what is done", "measured", "closed form"],
                                    [[w["way"], f"{w['value']:.4f} [{w['low']:.4f}, {w['high']:.4f}]", f"{w['expected']:.4f}"] for w in result["ways"]])],
            ),
        ],
        lead=f"{n} images, {result['numbers']} numbers each, noise level s_n = {level:g}. Closed forms in float64; no network but the VAE.",
        made={"command": "python -m experiments.lemmas", "model": result["model"], "images": result["data"], "seed": result["seed"],
              "intervals": "95 %, bootstrap over images"},
    )  # fmt: skip


def _show(value: Value) -> str:
    return f"{value.value:.4f} [{value.low:.4f}, {value.high:.4f}]"


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    from ambient_sd.assets import BASE, IMAGES
    from ambient_sd.data.conditions import split_condition
    from ambient_sd.utils.quiet import quiet

    parser = argparse.ArgumentParser(
        prog="python -m experiments.lemmas", description="Lemmas 4.1 and 4.2 on real latents, as a page.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--data", default=str(IMAGES), help="images")
    parser.add_argument("--model", default=str(BASE), help="base whose VAE encodes them")
    parser.add_argument("--row_filter", nargs="+", default=["subset_60=true"], help="which rows")
    parser.add_argument("--resolution", type=int, default=64, help="pixels")
    parser.add_argument("--level", type=float, default=1.0, help="noise level s_n")
    parser.add_argument("--seed", type=int, default=0, help="of all noise")
    args = parser.parse_args(argv)
    quiet()
    found = study(
        args.out, data=args.data, model=args.model, row_filter=[split_condition(term) for term in args.row_filter],
        resolution=args.resolution, level=args.level, seed=args.seed,
    )  # fmt: skip
    one = found["lemma_4_2"][0]["residual"]["value"]
    print(f"{found['images']} images, s_n = {found['level']:g}: one copy keeps noise {one:.3f}; "
          f"{found['copies_needed']:.0f} copies make the median image a copy")  # fmt: skip
    print(f"Look at it: {args.out / 'index.html'}", flush=True)


if __name__ == "__main__":
    main()
