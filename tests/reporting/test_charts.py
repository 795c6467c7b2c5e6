"""Charts: points where the axes say, colours of the page, words as text, the same bytes again."""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from report_tools import HOSTILE, figure

from ambient_sd.reporting import charts, pages
from ambient_sd.reporting.charts import Line, Mark
from ambient_sd.reporting.report import Histogram, ratio_histogram


def dots(svg: str) -> list[tuple[float, float]]:
    """Return where markers are drawn, in the order of the drawing, without those of the axes and the legend."""
    return [
        (float(x), float(y))
        for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--run3', svg)
    ]


def test_a_chart_puts_points_where_its_axes_say() -> None:
    (x1, y1), (x2, y2), (x3, y3) = dots(charts.chart("t", [Line("", [1, 10, 100], [0, 5, 10], dots=True)], x_label="x"))
    assert x2 - x1 == pytest.approx(x3 - x2, rel=1e-3) and x2 > x1  # decades are equally wide
    assert y1 - y2 == pytest.approx(y2 - y3, rel=1e-3) and y1 > y2
    linear = dots(charts.chart("t", [Line("", [1, 10, 100], [0, 5, 10], dots=True)], x_label="x", x_scale="linear"))
    assert linear[1][0] - linear[0][0] < (linear[2][0] - linear[1][0]) / 5  # control


def test_values_above_the_top_lie_on_it() -> None:
    svg = charts.chart("t", [Line("", [1, 2, 3], [0.5, 9, 1.0], dots=True)], x_label="x", top=1.0)
    heights = [y for _, y in dots(svg)]
    assert heights[1] == pytest.approx(heights[2]) and heights[0] > heights[2]


def test_words_in_charts_are_text_and_no_formula() -> None:
    svg = charts.chart(HOSTILE, [Line("$x_1$ <b>", [1, 2], [1, 2])], x_label=HOSTILE, marks=[Mark("<i>", 1.5)])
    assert "$x_1$ &lt;b&gt;" in svg and "<b>" not in svg and "<script" not in svg and "\u202e" not in svg
    ET.fromstring(charts.standalone(svg))


def test_letters_that_the_font_lacks_cost_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "日本" in charts.bars("t", [("日本", 1.0)])


def test_a_chart_follows_the_page_and_stands_alone() -> None:
    svg = charts.intervals("t", [("plain", "run0", figure("copies", 0.5, 0.1))])
    assert "var(--run0,#c2410c)" in svg and "var(--ink,#1b1c20)" in svg
    assert not re.search(r"xmlns|<style|clip-path|<metadata|\bid=\"(?!m)", svg)
    assert 'xmlns="http://www.w3.org/2000/svg"' in charts.standalone(svg)


def test_the_palette_is_the_style_sheets() -> None:
    style = (Path(pages.__file__).parent / "templates" / "style.css").read_text()
    light = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", style.split("@media")[0]))
    dark = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", style.split("@media")[1]))
    assert {name: light[name] for name in charts.PALETTE} == charts.PALETTE
    assert set(dark) >= set(charts.PALETTE)


def test_equal_numbers_give_equal_bytes() -> None:
    def make(value: float) -> str:
        rows = [("a", "run0", [0.1, value]), ("b", "held", [])]
        return f"{charts.histograms(ratio_histogram(rows))}{charts.bars('t', [('a', value)])}"

    assert make(0.4) == make(0.4) != make(0.9)


def test_figures_and_their_intervals_are_written_beside_them() -> None:
    svg = charts.intervals(
        "t", [("plain", "run0", figure("copies", 0.5, 0.1)), ("held-out", "held", figure("copies", 0.0, 0.0))]
    )
    assert "50.0 %  (40.0 to 60.0)" in svg and "0.0 %" in svg and "plain" in svg


def test_a_histogram_counts_copies_on_the_right_side() -> None:
    values = [0.1, 0.2, 0.9, 2.0]
    below = charts.histograms(Histogram("t", "n", [("a", "run0", values)], 0.5, "1/2"))
    above = charts.histograms(Histogram("t", "n", [("a", "run0", values)], 0.95, "0.95", below=False))
    assert below is not None and "2 of 4 left of the line" in below
    assert above is not None and "1 of 4 right of the line" in above
    assert charts.histograms(Histogram("t", "n", [("a", "run0", [])], 0.5, "1/2")) is None


def test_bars_are_as_long_as_their_values() -> None:
    svg = charts.bars("t", [("a", 0.0), ("b", 1.0), ("c", 4.0), ("d", 2.0)])
    paths = re.findall(r'<path d="([^"]+)" style="fill: var\(--run3', svg)
    ends = [[float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)] for path in paths]
    lengths = [max(xs) - min(xs) for xs in ends]
    assert [length / lengths[2] for length in lengths] == pytest.approx([0, 0.25, 1, 0.5], abs=1e-3)
    assert "nan" not in charts.bars("t", [("flat", 0.0)])
    tokens = ["</text><script>alert(1)</script>", "\x00\x1b[2J", "&amp;\"'", "\u202e", "x" * 10_000, "\ud800"]
    root = ET.fromstring(charts.standalone(charts.bars("t", [(token, 1.0) for token in tokens])))
    assert "script" not in {element.tag.rpartition("}")[2] for element in root.iter()}
