"""The audit's page: all figures are on it, the images are in order, and equal reports give equal bytes."""

from __future__ import annotations

import re
from pathlib import Path

from report_tools import COPIES, HOSTILE, QUALITY, Page, image, report, row, run

from ambient_sd.reporting.audit_page import context, write_report
from ambient_sd.reporting.pages import render as render_template
from ambient_sd.reporting.report import Report, RunSection, Sample


def render(of: Report) -> str:
    return render_template("report.html.j2", **context(of))


def test_hostile_text_stays_text_everywhere() -> None:
    page = render(report(run(HOSTILE, 0.6, 14, HOSTILE), run("ambient", 0.05, 14, HOSTILE), text=HOSTILE))
    parsed = Page(page)
    assert "script" not in parsed.tags and "\u202e" not in page
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.text.count("<script>alert(1)</script>") >= 10  # shown to the reader, as text
    # Negative control: the parser does see a script and a handler where text is not escaped.
    raw = Page(page.replace("</main>", HOSTILE + "</main>"))
    assert "script" in raw.tags and "onerror" in [name for name, _ in raw.attributes]


def test_the_page_loads_nothing() -> None:
    page = render(report(run("plain", 0.6, 14), run("ambient", 0.05, 14)))
    assert not re.search(r"https?://|@import|url\(", page)
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    sources = [value for name, value in parsed.attributes if name in ("src", "href", "srcset", "data")]
    assert len(sources) >= 20 and all(
        s.startswith(("data:image/png;base64,", "data:image/webp;base64,", "#")) for s in sources
    )
    assert "default-src 'none'" in page


def test_every_figure_stands_with_interval_n_seed_and_its_held_out_twin() -> None:
    text = Page(render(report(run("plain", 0.6, 14), run("ambient", 0.05, 14)))).text
    for needed in (
        "60.0 %",
        "55.0 to 65.0",
        "5.0 %",
        "−55.0 points",
        "n = 240",
        "n = 300",
        "n = 60",
        "held-out",
        "seed 0",
    ):
        assert needed in text, needed


def test_galleries_put_the_most_copied_first_and_say_what_is_left_out() -> None:
    many = run("plain", 0.6, 14, samples=9)
    page = render(Report("t", "c", [many], 60, COPIES, QUALITY, shown=2))
    ratios = [float(r) for r in re.findall(r"d1/d2 (\d\.\d\d)", page)]
    assert ratios == sorted(ratios) and len(ratios) == 6
    assert "3 less copied samples are not on this page" in page


def test_side_by_side_shows_prompts_of_both_runs_in_their_own_order() -> None:
    page = render(report(run("plain", 0.6, 14), run("ambient", 0.05, 14)))
    assert "Same prompt, side by side" in page
    assert re.findall(r"<h3 dir=\"auto\">(.*?)</h3>", page) == [f"a red disc {i}" for i in range(5)]
    assert "side by side" not in render(report(run("plain", 0.6, 14)))


def test_the_same_report_gives_the_same_bytes_and_no_half_page(tmp_path: Path) -> None:
    one, two = (
        write_report(tmp_path / "deep" / f"{i}.html", report(run("plain", 0.6, 14), run("ambient", 0.05, 14)))
        for i in range(2)
    )
    assert one.read_bytes() == two.read_bytes()
    assert sorted(p.name for p in one.parent.iterdir()) == ["0.html", "1.html"]
    changed = write_report(one, report(run("plain", 0.5, 14), run("ambient", 0.05, 14)))
    assert changed.read_bytes() != two.read_bytes()


def test_large_images_go_in_as_thumbnails() -> None:
    big = [Sample(image(1, 512), "p", image(2, 512), 0.1, 1.0, True)]
    page = render(Report("t", "c", [RunSection("a", "o", [row(COPIES, 0.5, 0.1, 0)], big)], 60, COPIES, QUALITY))
    assert "data:image/webp" in page and len(page) < 60_000


def test_copies_are_framed_and_others_are_not() -> None:
    page = render(report(run("plain", 0.6, 14, samples=5)))  # three of them are copies
    assert page.count('class="card is-copy"') == page.count('class="badge copy"') == 3
    assert page.count('<article class="card">') == 2
