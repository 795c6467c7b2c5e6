"""`ambient-sd level`: look at the nature level that a picture set proposes, before training and without a network.

The table of `ambient_sd.data.levels` in the terminal, as a page with curves, and as JSON. The pictures are encoded as
`--ambient_level auto` would see them: same crop, mirroring, VAE draws; of a large set only those that are measured.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from ambient_sd.audit.report import escaped
from ambient_sd.data.latents import ViewRule, encode_all
from ambient_sd.data.levels import COPY, IDENTIFIED, TARGET, Levels, as_text, marks, measure, representatives
from ambient_sd.data.sources import load_rows
from ambient_sd.errors import UserError
from ambient_sd.files import write_whole
from ambient_sd.training.base import check_base
from ambient_sd.training.config import TrainConfig, split_condition

_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 596.0, 14.0, 208.0


def level(config: TrainConfig, *, progress: bool = False) -> Levels:
    """Measure the pictures of a run's settings.

    Args:
        config: of a training; pictures, base, resolution, views and noise seed are used.
        progress: show bars.

    Raises:
        UserError: base or pictures are unusable, or too few.
    """
    base = check_base(config)
    pictures = load_rows(
        config.source, config.image_column, config.caption_column, config.dataset_split, config.max_train_samples, config.seed,
        row_filter=[split_condition(term) for term in config.row_filter or ()], local=config.train_data_dir is not None,
    ).check(progress, near_duplicates=True)  # fmt: skip
    rule = ViewRule(config.resolution, config.center_crop, config.random_flip, True, config.noise_seed)
    rows, total = representatives(pictures)
    vae = base.load("vae").requires_grad_(False).eval()
    x0 = encode_all(vae, pictures, rule, rows, progress=progress)
    return measure(x0, total=total, max_level=base.schedule.max_level)


def run(
    data: str,
    model: str,
    *,
    resolution: int = 512,
    image_column: str = "image",
    caption_column: str = "text",
    split: str | None = None,
    row_filter: list[str] | None = None,
    center_crop: bool = False,
    random_flip: bool = False,
    html_path: Path | None = None,
    json_path: Path | None = None,
) -> Levels:
    """Print the table and write what is asked for."""
    for path in (html_path, json_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written", rule="its folder does not exist", remedy="create it first")
    config = TrainConfig(
        pretrained_model_name_or_path=model, train_data_dir=data, resolution=resolution, image_column=image_column,
        caption_column=caption_column, dataset_split=split, row_filter=row_filter, center_crop=center_crop,
        random_flip=random_flip, ambient_level="auto",
    )  # fmt: skip
    found = level(config, progress=True)
    print(as_text(found), flush=True)
    if json_path is not None:
        write_whole(json_path, json.dumps({"version": 1, "resolution": resolution, **found.as_dict()}, indent=1) + "\n")
    if html_path is not None:
        write_whole(html_path, page(found, Path(data).name if Path(data).exists() else data))
    return found


def page(found: Levels, name: str) -> str:
    """Return the self-contained page: two charts over the noise level, and the table."""
    ratios, weights = found.ratio_quantiles, found.own_quantiles
    charts = [
        _chart("What a noisy copy gives away", "d1/d2 of the copy, linearly denoised: median, 5 to 95 %", found,
               [r[1] for r in ratios], ratios, 1.5, [(COPY, "copy 1/3"), (TARGET, "2/3")]),
        _chart("Does a noisy copy tell which picture it was?", "posterior weight of the true picture: mean, 5 to 95 %",
               found, found.own, weights, 1.0, [(IDENTIFIED, "1/2")]),
    ]  # fmt: skip
    rows = "".join(
        f"<tr><td>{'–' if at is None else f'{at:.2g}'}</td><th>{escaped(text)}</th></tr>" for at, text in marks(found)
    )
    drawn = "" if found.used == found.pictures else f" {found.used} of them were measured and stand for the rest."
    body = (
        f"<h1>s<sub>n</sub> = {found.proposed:g}</h1><p>Proposed for {escaped(name, 80)}: {escaped(found.reason)}.</p>"
        f"{''.join(charts)}<table>{rows}</table>"
        f"<p class=note>{found.pictures} distinct pictures, {found.numbers} numbers each; nearest other picture "
        f"{found.nearest[1]:.2f} per number (5 to 95 %: {found.nearest[0]:.2f} to {found.nearest[2]:.2f}).{drawn} "
        "A proposal from geometry, before training; what a trained network copies is for an audit to say.</p>"
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f'<meta http-equiv=Content-Security-Policy content="{policy}"><title>Nature level of {escaped(name, 80)}</title>'
        f"<style>{_STYLE}</style><main>{body}</main></html>\n"
    )


def _chart(
    title: str,
    note: str,
    found: Levels,
    line: tuple[float, ...] | list[float],
    band: tuple[tuple[float, float, float], ...],
    top: float,
    cuts: list[tuple[float, str]],
) -> str:
    low, high = math.log(found.levels[0]), math.log(found.levels[-1])

    def x(level: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (math.log(level) - low) / (high - low)

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * min(value, top) / top

    points = [(x(s), y(v)) for s, v in zip(found.levels, line, strict=True)]
    edge = [(x(s), y(q[2])) for s, q in zip(found.levels, band, strict=True)]
    edge += [(x(s), y(q[0])) for s, q in reversed(list(zip(found.levels, band, strict=True)))]
    parts = [f'<svg viewBox="0 0 610 236" role=img aria-label="{escaped(title)}">']
    for value in (0, top / 3, 2 * top / 3, top):
        parts.append(f"<line class=grid x1={_LEFT} x2={_RIGHT} y1={y(value):.1f} y2={y(value):.1f} />")
        parts.append(f"<text x={_LEFT - 6} y={y(value) + 4:.1f} text-anchor=end>{value:.2g}</text>")
    for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50):
        parts.append(f"<text x={x(tick):.1f} y=224 text-anchor=middle>{tick:g}</text>")
    for value, label in cuts:
        parts.append(f"<line class=cut x1={_LEFT} x2={_RIGHT} y1={y(value):.1f} y2={y(value):.1f} />")
        parts.append(f"<text x={_RIGHT} y={y(value) - 4:.1f} text-anchor=end>{escaped(label)}</text>")
    for at, label in ((found.copy, "copy"), (found.proposed, "proposed"), (found.collapse, "collapse")):
        if at is not None:
            kind = "mark chosen" if label == "proposed" else "mark"
            parts.append(f'<line class="{kind}" x1={x(at):.1f} x2={x(at):.1f} y1={_TOP} y2={_BOTTOM} />')
            parts.append(f"<text x={x(at) + 4:.1f} y={_TOP + 8} >{label} {at:.2g}</text>")
    parts.append(f'<polygon points="{_points(edge)}"/><polyline points="{_points(points)}"/></svg>')
    return f"<figure><figcaption>{escaped(title)}<small>{escaped(note)}; by noise level s</small></figcaption>{''.join(parts)}</figure>"


def _points(places: list[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in places)


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c2126;background:#fafaf8;margin:0}main{max-width:46rem;margin:auto;padding:1.5rem}
h1{font-size:2.2rem;margin:.2em 0 0}figure{margin:1.6rem 0;background:#fff;border:1px solid #ddd;border-radius:8px;padding:12px}
figcaption{font-weight:650}figcaption small{display:block;font-weight:400;color:#5c656e}svg{width:100%;height:auto;display:block}
text{font-size:11px;fill:#5c656e}.grid{stroke:#e6e6e2}.cut{stroke:#b3541e;stroke-dasharray:4 3}.mark{stroke:#8a949d}
.chosen{stroke:#1a6e4f;stroke-width:2}polygon{fill:#2f6fb3;opacity:.18}polyline{fill:none;stroke:#2f6fb3;stroke-width:2}
table{border-collapse:collapse}td,th{border-top:1px solid #ddd;padding:.35rem .7rem;font-weight:400;text-align:left}
td{font-variant-numeric:tabular-nums;font-weight:650}.note{color:#5c656e;font-size:.9rem}
"""
