"""The page: what it says follows from the figures, hostile text stays text, and nothing is loaded from anywhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from ambient_sd.audit.metrics import Row, difference
from ambient_sd.audit.neighbours import Neighbours, nearest
from ambient_sd.reporting.report import (
    Report,
    RunSection,
    Sample,
    contact_sheet,
    cut_sheet,
    find,
    make_samples,
    render,
    write_report,
)
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate

HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>\u202e&amp;"
COPIES, QUALITY = "memorized-pixels64", "FD-EffLite0-pca64"


def figure(name: str, value: float, half: float, n: int = 240) -> Estimate:
    return Estimate(value, value - half, value + half, n, name)


def row(name: str, value: float, half: float, held: float) -> Row:
    a, b = figure(name, value, half), figure(name, held, half, 300)
    return Row(name, a, b, difference(a, b), figure(name, held, half, 60) if name == COPIES else None)


def image(shade: int, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), (shade % 256, 40, 90))


def run(name: str, copies: float, quality: float, prompt: str = "a red disc", samples: int = 5) -> RunSection:
    return RunSection(
        name,
        f"objective of {prompt}",
        [row(COPIES, copies, 0.05, 0.0), row(QUALITY, quality, 1.0, 9.0)],
        [Sample(image(i), f"{prompt} {i}", image(i + 9), i / 10, 1.0, i < 3, 0.5, prompt) for i in range(samples)],
        {"note": prompt},
    )


def report(*runs: RunSection, text: str = "title") -> Report:
    return Report(text, f"ambient-sd demo {text}", runs, 60, COPIES, QUALITY, [0.8, 0.9], {text: text}, [text])


class Page(HTMLParser):
    """Collect tags, attributes and text as a browser's parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


# --- the sentence


@pytest.mark.parametrize(
    ("plain", "ambient", "kind", "words"),
    [
        ((0.60, 14.6), (0.05, 14.2), "better", "copies fewer training images than the plain run"),
        ((0.60, 14.6), (0.05, 14.2), "better", "no measurably worse quality"),
        ((0.60, 14.6), (0.05, 9.0), "better", "its images are better"),
        ((0.60, 14.6), (0.00, 85.0), "trade", "its images are worse"),
        ((0.10, 14.6), (0.08, 14.2), "unclear", "No clear difference"),
        ((0.10, 14.6), (0.08, 85.0), "unclear", "Its images are worse"),
        ((0.05, 14.6), (0.60, 14.2), "worse", "copies more"),
    ],
)
def test_the_sentence_follows_the_intervals(
    plain: tuple[float, float], ambient: tuple[float, float], kind: str, words: str
) -> None:
    found = find(report(run("plain", *plain), run("ambient", *ambient)))
    assert found.kind == kind and words in found.sentence
    assert f"{100 * ambient[0]:.1f} %" in found.sentence and f"{100 * plain[0]:.1f} %" in found.sentence


def test_one_run_is_judged_by_its_excess_over_held_out_images() -> None:
    assert find(report(run("model", 0.6, 14))).kind == "copies"
    assert find(report(run("model", 0.01, 14))).kind == "no-copies"


def test_a_deciding_measure_that_was_not_taken_is_named() -> None:
    with pytest.raises(UserError, match="FD-other"):
        find(Report("t", "c", [run("a", 0.1, 1), run("b", 0.1, 1)], 60, COPIES, "FD-other"))


# --- the page


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
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    sources = [value for name, value in parsed.attributes if name in ("src", "href", "srcset", "data")]
    assert len(sources) >= 20 and all(
        s.startswith(("data:image/png;base64,", "data:image/webp;base64,")) for s in sources
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


# --- samples and sheets


def test_samples_stand_beside_their_nearest_training_image() -> None:
    training = torch.eye(4) * 10
    near = nearest(torch.stack([training[2], training[0] * 0.5 + 4]), training)
    images = [image(i) for i in range(4)]
    one, two = make_samples(images[:2], ["a", "b"], images, near, scores=[1.5, None], training_prompts=list("wxyz"))
    assert one.nearest_image is images[2] and one.nearest_prompt == "y" and one.memorized and one.score == 1.5
    assert not two.memorized and two.score is None and two.ratio > 1 / 3
    with pytest.raises(UserError):
        make_samples(images, ["a"], images, near)


def test_contact_sheet_places_every_image_and_caption() -> None:
    sheet = contact_sheet([image(10 * i) for i in range(5)], columns=3, gap=2)
    assert sheet.size == (3 * 18 + 2, 2 * 18 + 2)
    assert [sheet.getpixel((2 + 18 * (i % 3), 2 + 18 * (i // 3)))[0] for i in range(5)] == [0, 10, 20, 30, 40]
    assert [p.tobytes() for p in cut_sheet(sheet, 5, 16, 3, gap=2)] == [image(10 * i).tobytes() for i in range(5)]
    assert contact_sheet([image(0)], columns=3, captions=["日本 red"]).height > 16 + 14
    for wrong in (
        {"images": []},
        {"images": [image(0)], "captions": ["a", "b"]},
        {"images": [image(0)], "columns": 0},
    ):
        with pytest.raises(UserError):
            contact_sheet(**wrong)  # type: ignore[arg-type]


def test_neighbours_of_cosine_features_can_be_shown_too() -> None:
    near = Neighbours(torch.tensor([[0.0, 0.5]]).double(), torch.tensor([[1, 0]]), "cosine")
    assert make_samples([image(0)], ["p"], [image(1), image(2)], near)[0].memorized
