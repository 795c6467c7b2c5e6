"""Charts by matplotlib as inline SVG: they follow the page's colours, dark or light, and equal numbers give equal bytes.

The palette below is that of `templates/style.css`. Whatever matplotlib draws in one of these colours becomes `var(--name, colour)`, so that a
page's style decides, and a file of its own (`standalone`) has the colour itself. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from ambient_sd.reporting.report import Histogram, show, span, unit_of
from ambient_sd.utils.errors import one_line

if TYPE_CHECKING:
    from pathlib import Path

    from ambient_sd.training.keeping import Kept
    from ambient_sd.utils.estimate import Estimate

PALETTE = {
    "card": "#ffffff", "ink": "#1b1c20", "soft": "#5d626d", "line": "#e2dfd7", "run0": "#c2410c", "run1": "#0b6e69", "run2": "#5b4bb5",
    "run3": "#2f6fb3", "run4": "#a1832a", "held": "#7a7f8a", "train": "#9a7b2f", "copy": "#a31621",
}  # fmt: skip
SERIES = tuple(PALETTE[name] for name in ("run3", "run0", "run1", "run2", "run4", "held"))
_NAMES = {colour: name for name, colour in PALETTE.items()}
_WIDE = 5.0  # inches, 72 units of the drawing each
_TEXT = 11
_BINS = 24
_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "ambient_sd", "text.parse_math": False, "font.size": _TEXT, "axes.unicode_minus": True,
    "text.color": PALETTE["ink"], "axes.edgecolor": PALETTE["line"], "axes.labelcolor": PALETTE["soft"], "axes.labelsize": _TEXT,
    "xtick.color": PALETTE["line"], "ytick.color": PALETTE["line"], "xtick.labelcolor": PALETTE["soft"], "ytick.labelcolor": PALETTE["soft"],
    "xtick.labelsize": 10, "ytick.labelsize": 10, "grid.color": PALETTE["line"], "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 10, "figure.facecolor": "none",
    "axes.facecolor": "none", "path.simplify": False,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Hold one curve of a chart.

    Attributes:
        label: for the legend; "" leaves it out.
        x, y: equally many finite numbers.
        band: lower and upper ends of an interval at each x.
        dots: draw single points and no line. dashed: dash it, as for a closed form. marker: points on the line.
        colour: place in `SERIES`, or a colour; None: the next one.
        bars: intervals at the last so many points, each as (low, high) in x and in y.
        texts: a short text beside each point.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float]] = ()
    dots: bool = False
    dashed: bool = False
    colour: int | str | None = None
    marker: str = ""
    bars: Sequence[tuple[tuple[float, float], tuple[float, float]]] = ()
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Mark:
    """Hold a straight line across a chart, at a place of x (`upright`) or of y."""

    label: str
    at: float
    upright: bool = True
    strong: bool = False


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str = "",
    marks: Sequence[Mark] = (),
    x_scale: str = "log",
    y_scale: str = "linear",
    top: float | None = None,
    from_zero: bool = True,
    height: float = 3.6,
) -> Markup:
    """Return curves as an inline SVG.

    Args:
        title: for screen readers; the caption says it to others.
        lines: one or more, positive on a logarithmic axis.
        x_label, y_label: what the axes measure.
        marks: drawn across.
        x_scale, y_scale: "linear", "log" or "symlog" (linear below 1).
        top: upper end of y; values above it are drawn on it.
        from_zero: a linear y axis begins at 0, or below where values do; else at the smallest value.
        height: inches, at a width of 5.

    Example:
        >>> svg = chart("growth", [Line("a <b>", [1, 10], [0, 5])], x_label="x")
        >>> svg.startswith("<svg") and "a &lt;b&gt;" in svg
        True
    """
    with _figure(height + 0.19 * math.ceil(sum(bool(line.label) for line in lines) / 2)) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        _scale(axes, "x", x_scale)
        _scale(axes, "y", y_scale)
        texts: list[tuple[float, float, str, str]] = []
        for k, line in enumerate(lines):
            colour = (
                line.colour
                if isinstance(line.colour, str)
                else SERIES[(k if line.colour is None else line.colour) % len(SERIES)]
            )
            y = _below(line.y, top)
            if line.band:
                low, high = (_below([pair[side] for pair in line.band], top) for side in (0, 1))
                axes.fill_between(line.x, low, high, color=colour, alpha=0.18, linewidth=0, clip_on=False)
            style = (
                {"linestyle": "none", "marker": "o"}
                if line.dots
                else {"linestyle": "--" if line.dashed else "-", "marker": line.marker}
            )
            axes.plot(
                line.x,
                y,
                color=colour,
                linewidth=1.8,
                markersize=4.5,
                label=one_line(line.label, 44) or None,
                clip_on=False,
                **style,
            )
            ends = len(line.x) - len(line.bars)
            for at_x, at_y, ((x_low, x_high), (y_low, y_high)) in zip(
                line.x[ends:], line.y[ends:], line.bars, strict=True
            ):
                axes.errorbar(at_x, at_y, color=colour, alpha=0.6 if len(line.bars) == 1 else 0.25, linewidth=1, clip_on=False,
                              xerr=[[max(0.0, at_x - x_low)], [max(0.0, x_high - at_x)]],
                              yerr=[[max(0.0, at_y - y_low)], [max(0.0, y_high - at_y)]])  # fmt: skip
            texts += [
                (x, at_y, one_line(text, 12), colour) for x, at_y, text in zip(line.x, y, line.texts, strict=False)
            ]
        if y_scale == "linear":
            bottom, most = _ends(lines, top)
            axes.set_ylim((bottom if bottom < -0.1 * most else 0.0) if from_zero else bottom, most)
        elif y_scale == "symlog":
            axes.set_ylim(bottom=0)
        if x_scale == "symlog":
            axes.set_xlim(left=0)
        elif x_scale == "log":
            values = [v for line in lines for v in line.x]
            axes.set_xlim(min(values), max(values) if max(values) > min(values) else 2 * max(values))
        for k, mark in enumerate(mark for mark in marks if mark.upright):
            axes.axvline(
                mark.at,
                color=PALETTE["run1" if mark.strong else "held"],
                linewidth=2 if mark.strong else 1,
                clip_on=False,
            )
            axes.annotate(one_line(mark.label, 40), (mark.at, 1), xycoords=axes.get_xaxis_transform(), xytext=(4, -10 - 13 * k), textcoords="offset points")  # fmt: skip
        for mark in (mark for mark in marks if not mark.upright):
            axes.axhline(mark.at, color=PALETTE["copy"], linewidth=1, linestyle=(0, (4, 3)), clip_on=False)
            axes.annotate(one_line(mark.label, 40), (1, mark.at), xycoords=axes.get_yaxis_transform(), xytext=(0, 3), textcoords="offset points", ha="right", color=PALETTE["soft"], fontsize=10)  # fmt: skip
        axes.grid(True, axis="y")
        axes.set_xlabel(one_line(x_label, 60))
        axes.set_ylabel(one_line(y_label, 60))
        if any(line.label for line in lines):
            figure.legend(loc="outside lower left", ncols=2, handlelength=1.6, columnspacing=1.6)
        _beside(figure, axes, texts)
        return _svg(figure, title)


def _beside(figure: Any, axes: Any, texts: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each short text beside its point, where it is nearest to it and lies on no other text; where points are too near each other, none.

    Args:
        texts: x, y, text and colour.
    """
    if not texts:
        return
    figure.draw_without_rendering()  # the layout decides where points are
    unit = figure.dpi / 72
    taken: list[tuple[float, float, float, float]] = []
    for x, y, text, colour in texts:
        at_x, at_y = axes.transData.transform((x, y)) / unit
        wide, high = 4.2 * len(text), 6.0  # points, of digits at this size
        for right, up in ((3.0, 3.0), (3.0, -9.0), (-3.0 - wide, 3.0), (-3.0 - wide, -9.0)):
            box = (at_x + right, at_y + up, at_x + right + wide, at_y + up + high)
            if all(box[2] < o[0] or o[2] < box[0] or box[3] < o[1] or o[3] < box[1] for o in taken):
                taken.append(box)
                axes.annotate(text, (x, y), xytext=(right, up), textcoords="offset points", color=colour, fontsize=7)
                break


def intervals(title: str, rows: Sequence[tuple[str, str, Estimate]]) -> Markup:
    """Return figures of one measure as dots with their intervals on a common axis.

    Args:
        title: for screen readers.
        rows: (name, colour of `PALETTE`, figure), from top to bottom.
    """
    factor, unit = unit_of(rows[0][2].name)
    with _figure(0.2 + 0.62 * len(rows) + 0.35) as figure:
        axes = _bare(figure, len(rows))
        low = min(0.0, *(f.low for _, _, f in rows))
        high = max(f.high for _, _, f in rows)
        high = high if high > low else low + 1 / factor
        for i, (name, tone, one) in enumerate(rows):
            y, colour = len(rows) - 1 - i, PALETTE[tone]
            axes.plot(
                [one.low, one.high],
                [y, y],
                color=colour,
                alpha=0.45,
                linewidth=4,
                solid_capstyle="round",
                clip_on=False,
            )
            axes.plot([one.value], [y], color=colour, marker="o", markersize=8, clip_on=False)
            axes.text(0, y + 0.28, one_line(name, 36), transform=axes.get_yaxis_transform())
            axes.text(1, y + 0.28, f"{show(one)}  ({span(one)})", transform=axes.get_yaxis_transform(), ha="right")
        axes.set_xlim(low, high)
        _ticks(axes, factor, unit)
        return _svg(figure, title)


def histograms(of: Histogram) -> Markup | None:
    """Return one histogram per set of images, one below the other on one axis; None where every set is empty."""
    rows = [row for row in of.rows if row[2]]
    if not rows:
        return None
    shares = [_shares(of, values) for _, _, values in rows]
    top = max(max(share) for share in shares)
    with _figure(0.86 * len(rows) + 0.3) as figure:
        axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        figure.subplots_adjust(
            left=0.03,
            right=0.97,
            top=1 - 0.26 / figure.get_figheight(),
            bottom=0.3 / figure.get_figheight(),
            hspace=0.62,
        )
        width = (of.high - of.low) / _BINS
        for ax, (name, tone, values), share in zip(axes, rows, shares, strict=True):
            ax.bar(
                [of.low + width * k for k in range(_BINS)],
                share,
                width * 0.92,
                align="edge",
                color=PALETTE[tone],
                clip_on=False,
            )
            ax.axvline(of.cut, color=PALETTE["copy"], linewidth=1, linestyle=(0, (3, 3)), clip_on=False)
            ax.set(ylim=(0, top), xlim=(of.low, of.high), yticks=[])
            ax.spines["left"].set_visible(False)
            side = "left" if of.below else "right"
            ax.text(0, 1.1, one_line(name, 32), transform=ax.transAxes)
            ax.text(1, 1.1, f"{of.copies(values)} of {len(values)} {side} of the line", transform=ax.transAxes, ha="right",
                    color=PALETTE["soft"], fontsize=10)  # fmt: skip
            ax.tick_params(length=0)
        away = 0.08 * (of.high - of.low)  # two numbers on one another cannot be read
        ends = [end for end in (of.low, of.high) if abs(end - of.cut) > away]
        axes[-1].set_xticks([*ends, of.cut], [*(f"{end:g}" for end in ends), one_line(of.cut_label, 10)])
        return _svg(figure, of.title)


def bars(title: str, rows: Sequence[tuple[str, float]]) -> Markup:
    """Return named values, none below 0, as horizontal bars."""
    with _figure(0.24 * len(rows) + 0.1) as figure:
        axes = figure.add_axes((0.36, 0.02, 0.5, 0.96))
        places = range(len(rows), 0, -1)
        axes.barh(places, [value for _, value in rows], 0.72, color=PALETTE["run3"])
        axes.set(ylim=(0.4, len(rows) + 0.6), xlim=(0, max(1e-12, *(value for _, value in rows))))
        axes.axis("off")
        for y, (name, value) in zip(places, rows, strict=True):
            axes.annotate(
                one_line(name, 28), (0, y), xytext=(-6, 0), textcoords="offset points", ha="right", va="center"
            )
            axes.annotate(f"{value:.3g}", (value, y), xytext=(5, 0), textcoords="offset points", va="center")
        return _svg(figure, title)


def write_training_curve(path: Path, evaluations: Sequence[Mapping[str, float]], kept: Kept) -> None:
    """Write the evaluations of a training as a PNG: copy rate with its intervals above, quality below, and what was kept; beside the copy rate the
    share of images nearest to their own training image, where it was measured."""
    with _figure(4.4) as figure:
        figure.set_layout_engine("constrained")
        figure.set_facecolor(PALETTE["card"])
        quality = [e for e in evaluations if "kid" in e]
        top, *rest = figure.subplots(2 if quality else 1, 1, sharex=True, squeeze=False)[:, 0]
        steps = [e["step"] for e in evaluations]
        low, high = ([100 * e[name] for e in evaluations] for name in ("copies_low", "copies_high"))
        top.fill_between(steps, low, high, color=PALETTE["run0"], alpha=0.18, linewidth=0)
        top.plot(steps, [100 * e["copies"] for e in evaluations], color=PALETTE["run0"], marker="o", markersize=4, label="copies")  # fmt: skip
        if own := [e for e in evaluations if "own" in e]:
            top.plot([e["step"] for e in own], [100 * e["own"] for e in own], color=PALETTE["run2"], marker="s", markersize=4,
                     label="nearest to their own training image")  # fmt: skip
            top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
        top.axhline(100 * kept.allowed, color=PALETTE["held"], linestyle="--", linewidth=1)
        top.set(ylabel="of the images, %", ylim=(0, None))
        for axes in rest:
            axes.plot([e["step"] for e in quality], [1000 * e["kid"] for e in quality], color=PALETTE["run3"], marker="o", markersize=4)  # fmt: skip
            axes.set(ylabel="KID x 1000, new captions\n(lower is better)")
        for axes in (top, *rest):
            axes.grid(True, axis="y")
            if kept.step is not None:
                axes.axvline(kept.step, color=PALETTE["run1"], linewidth=1.5)
        if kept.step is not None:
            late = kept.step > max(steps) / 2
            top.annotate(f"kept: step {kept.step}", (kept.step, 1), xycoords=("data", "axes fraction"), xytext=(-4 if late else 4, -4),
                         textcoords="offset points", va="top", ha="right" if late else "left", color=PALETTE["run1"])  # fmt: skip
        (rest[-1] if rest else top).set_xlabel("optimizer steps")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=160, metadata={"Software": None})


def standalone(svg: Markup) -> str:
    """Return a chart as the text of an SVG file, on white."""
    space = '<svg xmlns="http://www.w3.org/2000/svg" style="background:#ffffff;font-family:system-ui,sans-serif" '
    return space + str(svg).removeprefix("<svg ") + "\n"


# --- matplotlib ------------------------------------------------------------------------------------------------------


@contextmanager
def _figure(height: float) -> Iterator[Any]:
    # Here, since commands without charts should not wait for the import. `Figure` alone: pyplot would keep global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(_RC), warnings.catch_warnings():
        # The page's font draws the text; which letters matplotlib's own lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Canvas(figsize=(_WIDE, height))


def _svg(figure: Any, title: str) -> Markup:
    """Return a figure as SVG for the body of a page: no prolog, no names of spaces, no ids but of markers, colours as variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(
        r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->|<clipPath.*?</clipPath>", "", body, flags=re.DOTALL
    )
    body = re.sub(r' (?:id="(?:figure|axes|patch|text|line2d|matplotlib|xtick|ytick|legend|PolyCollection|FillBetween\w*|LineCollection)\w*_\w+"|clip-path="[^"]*")', "", body)  # fmt: skip
    body = re.sub(r"\s*<defs>\s*</defs>", "", body.replace("xlink:href", "href"))
    body = re.sub(r"(style=\"[^\"]*?)font: ([\d.]+)px [^;\"]+", r"\1font-size: \2px", body)
    body = re.sub(r"#[0-9a-f]{6}", lambda m: f"var(--{_NAMES[m[0]]},{m[0]})" if m[0] in _NAMES else m[0], body)
    body = re.sub(r">\s+<", "><", body).strip()
    return Markup(
        f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(one_line(title, 200))}" stroke-linejoin="round">{body}'
    )


def _bare(figure: Any, rows: int) -> Any:
    high = figure.get_figheight()
    axes = figure.add_axes((0.02, 0.32 / high, 0.96, 1 - 0.36 / high))
    axes.set(ylim=(-0.4, rows - 0.2), yticks=[])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.grid(True, axis="x")
    axes.tick_params(length=0)
    return axes


def _ticks(axes: Any, factor: float, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    values = [v for v in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low * factor, high * factor)]
    texts = [f"{v:.6g}".replace("-", "−") for v in values]
    axes.set_xticks([v / factor for v in values], [*texts[:-1], texts[-1] + unit])
    axes.set_xlim(values[0] / factor, values[-1] / factor)
    labels = axes.get_xticklabels()
    labels[0].set_ha("left")
    labels[-1].set_ha("right")


def _scale(axes: Any, side: str, scale: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{side}axis")
    getattr(axes, f"set_{side}scale")(scale, **({"linthresh": 1} if scale == "symlog" else {}))
    if scale == "log":
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axis.set_minor_formatter(NullFormatter())
    if scale != "linear":
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.tick_params(which="minor", length=0)


def _below(values: Sequence[float], top: float | None) -> list[float]:
    return [value if top is None else min(value, top) for value in values]


def _ends(lines: Sequence[Line], top: float | None) -> tuple[float, float]:
    """Return the ends of y with some air, so that nothing is drawn beyond them."""
    values = [
        v
        for line in lines
        for v in (*line.y, *(end for pair in line.band for end in pair), *(end for bar in line.bars for end in bar[1]))
    ]
    low, high = min(values), max(values) if top is None else top
    air = 0.04 * (high - low or 1.0)
    return low - air, high + (air if top is None else 0.0)


def _shares(of: Histogram, values: Sequence[float]) -> list[float]:
    """Return the share of values in each bin; those beyond the ends count in the outer ones."""
    counts = [0] * _BINS
    for value in values:
        counts[min(max(int((value - of.low) / (of.high - of.low) * _BINS), 0), _BINS - 1)] += 1
    return [count / len(values) for count in counts]
