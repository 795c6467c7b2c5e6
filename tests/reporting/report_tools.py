"""A report of made-up figures, hostile text, and a parser that sees a page as a browser does."""

from __future__ import annotations

from html.parser import HTMLParser

from PIL import Image

from ambient_sd.audit.metrics import Row, difference
from ambient_sd.reporting.report import Report, RunSection, Sample
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
