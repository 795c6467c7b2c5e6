"""Line charts as SVG and the page around them: no script, no network, the same bytes for the same numbers.

An SVG carries its colours as attributes, so that the file can stand in a page, in a README, or alone.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from ambient_sd.reporting.report import escaped

_LEFT, _RIGHT, _TOP, _BOTTOM, _WIDE = 52.0, 600.0, 16.0, 214.0, 612
COLOURS = ("#2f6fb3", "#c2410c", "#0b6e69", "#5b4bb5", "#a1832a", "#7a7f8a")
_SOFT, _INK = "#5c656e", "#1c2126"


@dataclass(frozen=True)
class Line:
    """Hold one curve; `band` are its lower and upper ends, `dots` draws places instead of a line, `dashed` a closed form."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float]] = ()
    dots: bool = False
    dashed: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Mark:
    """Hold a straight line across a chart: at a place of x, or of y."""

    label: str
    at: float
    upright: bool = True
    strong: bool = False


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    marks: Sequence[Mark] = (),
    x_log: bool = True,
    y_log: bool = False,
    top: float | None = None,
) -> str:
    """Return one chart as SVG.

    Args:
        title: for screen readers; the caption says it to others.
        lines: one or more, of finite numbers (positive on a logarithmic axis).
        x_label: under the axis.
        marks: drawn across.
        top: upper end of a linear y axis; what lies above is cut off. The largest value if not given.
    """
    xs = [v for line in lines for v in line.x]
    ys = [v for line in lines for v in (*line.y, *(e for pair in line.band for e in pair))]
    high = top if top is not None else max(ys)
    low = min(ys) if y_log else min(0.0, *ys)
    x_ticks, y_ticks = _ticks(min(xs), max(xs), x_log), _ticks(low, high, y_log)
    low, high = (min(low, y_ticks[0]), max(high, y_ticks[-1])) if y_log or top is None else (low, high)
    x = _scale(min(xs), max(xs), x_log, _LEFT, _RIGHT)
    y = _scale(low, high, y_log, _BOTTOM, _TOP)
    parts = []
    for value in y_ticks:
        parts.append(_straight(_LEFT, _RIGHT, y(value), y(value), "#e3e3de"))
        parts.append(_text(_LEFT - 6, y(value) + 4, f"{value:.4g}", "end"))
    parts += [_text(x(value), _BOTTOM + 16, f"{value:.4g}", "middle") for value in x_ticks]
    parts.append(_text(_RIGHT, _BOTTOM + 32, x_label, "end"))
    for mark in marks:
        tone = "#1a6e4f" if mark.strong else "#8a949d"
        if mark.upright:
            parts.append(_straight(x(mark.at), x(mark.at), _TOP, _BOTTOM, tone, 2 if mark.strong else 1))
            parts.append(_text(x(mark.at) + 4, _TOP + 9, mark.label, "start", _INK))
        else:
            parts.append(_straight(_LEFT, _RIGHT, y(mark.at), y(mark.at), "#b3541e", 1, "4 3"))
            parts.append(_text(_RIGHT, y(mark.at) - 4, mark.label, "end"))
    for i, line in enumerate(lines):
        tone = COLOURS[(i if line.colour is None else line.colour) % len(COLOURS)]
        places = [(x(a), y(b)) for a, b in zip(line.x, line.y, strict=True)]
        if line.band:
            edge = [(x(a), y(b[1])) for a, b in zip(line.x, line.band, strict=True)]
            edge += [(x(a), y(b[0])) for a, b in zip(reversed(line.x), reversed(line.band), strict=True)]
            parts.append(f'<polygon points="{_points(edge)}" fill="{tone}" fill-opacity="0.15"/>')
        if line.dots:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{tone}"/>' for a, b in places]
        else:
            dash = ' stroke-dasharray="6 4"' if line.dashed else ""
            parts.append(f'<polyline points="{_points(places)}" fill="none" stroke="{tone}" stroke-width="2"{dash}/>')
    # The legend last, two a row.
    named = [(i, line) for i, line in enumerate(lines) if line.label]
    for k, (i, line) in enumerate(named):
        tone, at = COLOURS[(i if line.colour is None else line.colour) % len(COLOURS)], _LEFT + 280 * (k % 2)
        row = _BOTTOM + 52 + 18 * (k // 2)
        if line.dots:
            parts.append(f'<circle cx="{at + 9:.1f}" cy="{row - 4:.1f}" r="4" fill="{tone}"/>')
        else:
            parts.append(_straight(at, at + 18, row - 4, row - 4, tone, 2, "6 4" if line.dashed else ""))
        parts.append(_text(at + 24, row, line.label, "start", _INK))
    height = int(_BOTTOM + 44 + 18 * math.ceil(len(named) / 2))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {height}" role="img" aria-label="{escaped(title)}" '
        f'font-family="system-ui,sans-serif" font-size="11"><rect width="{_WIDE}" height="{height}" fill="#fff"/>'
        f"{''.join(parts)}</svg>"
    )


def figure(caption: str, note: str, inside: str) -> str:
    """Return a framed figure of a page."""
    return f"<figure><figcaption>{escaped(caption)}<small>{escaped(note, 1000)}</small></figcaption>{inside}</figure>"


def image(image: Image.Image, alt: str) -> str:
    """Return an <img> that holds its image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f'<img alt="{escaped(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table of texts, the first column as row heads."""
    top = "".join(f"<th scope=col>{escaped(h)}</th>" for h in head)
    body = "".join(
        f"<tr><th scope=row>{escaped(row[0])}</th>{''.join(f'<td>{escaped(c)}</td>' for c in row[1:])}</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def page(title: str, body: str) -> str:
    """Return a self-contained page; a content security policy says that it loads nothing."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escaped(title)}</title>'
        f"<style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _scale(low: float, high: float, log: bool, start: float, end: float) -> Callable[[float], float]:
    span = (math.log(high / low) if log else high - low) or 1.0

    def place(value: float) -> float:
        value = min(max(value, low), high)
        return start + (end - start) * (math.log(value / low) if log else value - low) / span

    return place


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Return round numbers inside [low, high], four to ten of them."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            ticks = [k * 10.0**d for d in decades for k in steps if low * 0.999 <= k * 10.0**d <= high * 1.001]
            if len(ticks) <= 10:
                return ticks or [low, high]
        return ticks[:: math.ceil(len(ticks) / 8)]
    size = 10.0 ** math.floor(math.log10((high - low or 1.0) / 4))
    step = next(k * size for k in (1, 2, 2.5, 5, 10) if (high - low) / (k * size) <= 6)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _straight(x1: float, x2: float, y1: float, y2: float, tone: str, width: int = 1, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{tone}" stroke-width="{width}"{dashes}/>'


def _text(x: float, y: float, text: str, anchor: str, tone: str = _SOFT) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{tone}">{escaped(text, 60)}</text>'


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in places)


_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1c2126;background:#fafaf8;margin:0}main{max-width:52rem;margin:auto;padding:1.5rem}
h1{font-size:2rem;line-height:1.2;margin:.2em 0}h2{margin:2.2em 0 .3em}figure{margin:1.4rem 0;background:#fff;border:1px solid #ddd;
border-radius:8px;padding:14px}figcaption{font-weight:650;margin-bottom:8px}small{display:block;font-weight:400;color:#5c656e}
svg,img{max-width:100%;height:auto;display:block}svg{width:100%}.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem}
td,th{border-top:1px solid #ddd;padding:.35rem .7rem;font-weight:400;text-align:left;font-variant-numeric:tabular-nums}
thead th{font-weight:650;border-top:0}.note{color:#5c656e;font-size:.9rem}pre{white-space:pre-wrap;background:#fff;border:1px solid #ddd;
border-radius:8px;padding:10px 12px;font-size:.85rem}
"""
