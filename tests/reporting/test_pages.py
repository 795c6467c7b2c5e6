"""All pages: what strangers wrote stays text, nothing is loaded, equal contexts give equal bytes, and a phone can show it."""

from __future__ import annotations

import html
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import UndefinedError
from report_tools import HOSTILE, Page, image, report, run

from ambient_sd.data.noise_level import NoiseLevels
from ambient_sd.data.sources import Fault
from ambient_sd.reporting import charts, compare_page, inspect_page, level_page, next_steps, pages, sample_page
from ambient_sd.reporting.audit_page import write_report
from ambient_sd.reporting.report import TokenAttribution
from ambient_sd.utils.errors import UserError

FOLDER = Path(pages.__file__).parent
EVIL = HOSTILE + "$x_1$"


def audit(path: Path, text: str) -> Path:
    one = report(run(text, 0.6, 14, text), text=text)
    token = TokenAttribution(text, [text, "b"], [0.2, 0.1], 0.05, text)
    group = {"value": text, "training": 4, "returned": 1, "copies": 2, "share": 0.25, "low": 0.1, "high": 0.5}
    return write_report(
        path, one.__class__(**{**vars(one), "tokens": [token], "groups": [group], "next": [pages.Next(text, text)]})
    )


def demo(path: Path, text: str) -> Path:
    return write_report(path, report(run(text, 0.6, 14, text), run("ambient", 0.05, 14, text), text=text))


def inspect(path: Path, text: str) -> Path:
    group = SimpleNamespace(rows=[0, 1], mirrored=[False, True])
    found = SimpleNamespace(
        source=text, resolution=32, names=[text, text], captions=[text, text], keys=["a", "b"], sizes=[(16, 16)] * 2,
        faults=[Fault(text, "broken", text)], groups=[group],
    )  # fmt: skip
    images = [SimpleNamespace(image=image(1)), SimpleNamespace(image=image(2))]
    return inspect_page.write(path, found, images, [("broken", 1, text)])


def level(path: Path, text: str) -> Path:
    found = NoiseLevels(
        images=12, used=12, numbers=256, levels=(0.1, 1.0, 10.0), own=(1.0, 0.9, 0.1), own_quantiles=((0.9, 1, 1),) * 3,
        ratio_quantiles=((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), (0.9, 1.0, 1.1)), nearest=(0.5, 0.6, 0.7), overlap=0.3, copy=0.4,
        collapse=5.0, speciation=3.0, proposed=1.1, reason=text,
    )  # fmt: skip
    return level_page.write(path, found, text, resolution=32)


def sample(path: Path, text: str) -> Path:
    (path.parent / "images").mkdir(exist_ok=True)
    image(3).save(path.parent / "images" / "a.png")
    attribution = {"words": [text, ""], "word_scores": [2.0, 1.0], "padding_score": 0.1}
    record: dict[str, Any] = {
        "file": "images/a.png", "prompt": text, "prompt_index": 0, "image_index": 0, "model": text, "lora_weights": text, "base_above": 1.0,
        "base": text, "sampler": text, "num_inference_steps": 5, "guidance_scale": 4.0, "run_seed": 0, "policy": None, "when": "always",
        "score": 12.0, "curve": [12.0], "flagged": True, "threshold": 10.0, "threshold_origin": text, "undecided": text, "mitigated": True,
        "first_score_before": 1.0, "first_score_after": 0.5, "decision_score": 1.0, "truncated": True, "nsfw": False, "attribution": attribution,
    }  # fmt: skip
    sample_page.write(path.parent, [record, {**record, "image_index": 1, "flagged": False, "attribution": None}], 2)
    return (path.parent / "index.html").rename(path)


def compare(path: Path, text: str) -> Path:
    figure = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    one = {"rule": text, "figures": {name: figure for name, *_ in compare_page.COLUMNS}, "peak_memory_mb": 12.0}
    detector = {"detector": text, "steps": 1, "generations": 2, "figures": [figure, figure]}
    result = {
        "settings": {"names": [text]}, "command": text, "rule": text, "prompts": 2, "mitigated_prompts": [text],
        "models": {text: {"memorized_prompts": 1, "clear_prompts": 1, "between": 0, "detectors": [detector], "mitigations": {"none": one, text: one}}},
    }  # fmt: skip
    return compare_page.write(path, result, [image(1)], {text: {"none": [image(2)], text: [image(3)]}})


def article(path: Path, text: str) -> Path:
    line = charts.Line(text, [1, 2], [1, 2])
    chart = pages.Chart(
        text, charts.chart(text, [line], x_label=text, y_label=text, marks=[charts.Mark(text, 1.5)]), text
    )
    section = pages.Section(text, [text], [], [chart], [pages.Table([text], [[text]], text)], [(text, text)])
    return pages.write_article(path, text, text, [section], lead=text, next=[pages.Next(text, text)], made={text: text})


ALL = [audit, demo, inspect, level, sample, compare, article]
of_all = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
Make = Callable[[Path, str], Path]


@of_all
def test_hostile_text_stays_text(make: Make, tmp_path: Path) -> None:
    page = make(tmp_path / "p.html", EVIL).read_text("utf-8")
    parsed = Page(page)
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert not [c for c in page if not c.isprintable() and c != "\n"]
    assert "<script>alert(1)" in html.unescape(parsed.text)
    raw = Page(page.replace("</main>", EVIL + "</main>"))  # the parser sees what is not escaped
    assert "script" in raw.tags and "onerror" in [name for name, _ in raw.attributes]


@of_all
def test_a_page_has_the_same_structure_whatever_was_written(make: Make, tmp_path: Path) -> None:
    plain, evil = (Page(make(tmp_path / "p.html", text).read_text("utf-8")) for text in ("words", EVIL))
    assert plain.tags == evil.tags


@of_all
def test_a_page_loads_nothing(make: Make, tmp_path: Path) -> None:
    page = make(tmp_path / "p.html", "words").read_text("utf-8")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html.unescape(page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    parsed = Page(page)
    sources = [value for name, value in parsed.attributes if name in ("src", "href", "srcset", "data")]
    assert all(s.startswith(("data:image/png;base64,", "data:image/webp;base64,", "#")) for s in sources)


@of_all
def test_equal_contexts_give_equal_bytes(make: Make, tmp_path: Path) -> None:
    one, again, other = (make(tmp_path / "p.html", text).read_bytes() for text in ("words", "words", "others"))
    assert one == again != other


@of_all
def test_a_page_answers_first_and_ends_with_commands_of_this_package(make: Make, tmp_path: Path) -> None:
    page = make(tmp_path / "p.html", "words").read_text("utf-8")
    assert page.index("<h1>") < page.index("<h2>") and page.count("<h1>") == 1
    for line in re.findall(r'<pre class="copy"><code>(.*?)</code>', page):
        assert re.match(r"ambient-sd |accelerate launch train_text|words", html.unescape(line)), line


def test_a_command_is_quoted_for_a_shell() -> None:
    assert pages.command("ambient-sd", "sample", "a b", "--prompt", "$(rm -rf ~); `id` 'x'\n", "--out", "o") == (
        "ambient-sd sample 'a b' --prompt '$(rm -rf ~); `id` '\"'\"'x'\"'\"'' --out o"
    )


def test_a_template_that_prints_what_is_not_there_fails() -> None:
    with pytest.raises(UndefinedError):
        pages.render("article.html.j2", title="t")


def test_undecodable_text_is_written_all_the_same(tmp_path: Path) -> None:
    assert "a b" in article(tmp_path / "p.html", "a\udce4b").read_text("utf-8")


def test_templates_and_style_are_installed_with_the_package() -> None:
    listed = (FOLDER.parents[1] / "setup.cfg").read_text()
    assert "ambient_sd.reporting = templates/*" in listed
    assert {p.suffix for p in (FOLDER / "templates").iterdir()} == {".j2", ".css"}


def test_no_module_outside_reporting_writes_html() -> None:
    tags = re.compile(
        r"<(?:!doctype|html|table|td|tr|p|div|figure|span|h[1-6]|svg|img)[ >]|import html$",
        re.IGNORECASE | re.MULTILINE,
    )
    package = FOLDER.parent
    found = [path.relative_to(package).as_posix() for path in sorted(package.rglob("*.py"))
             if FOLDER not in path.parents and tags.search(path.read_text("utf-8"))]  # fmt: skip
    assert found == []
    assert tags.search('f"<td>{x}</td>"')  # the pattern sees some


# --- in a browser


def widths(folder: Path, pages: list[str]) -> list[int]:
    """Return how wide each page gets on a phone of 390 px, asked of a browser."""
    frames = "".join(
        f'<iframe style="width:390px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>' for page in pages
    )
    script = "onload=()=>{o.textContent=[...document.querySelectorAll('iframe')].map(f=>f.contentDocument.documentElement.scrollWidth)}"
    probe = folder / "probe.html"
    probe.write_text(
        f'<!doctype html><meta charset="utf-8">{frames}<pre id="o"></pre><script>{script}</script>', encoding="utf-8"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000",
               "--dump-dom", probe.as_uri()]  # fmt: skip
    seen = subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout
    found = re.search(r'<pre id="o">([\d,]+)</pre>', seen)
    assert found is not None, seen[-500:]
    return [int(width) for width in found[1].split(",")]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_no_page_is_wider_than_a_phone(tmp_path: Path) -> None:
    texts = [make(tmp_path / "p.html", text).read_text("utf-8") for make in ALL for text in ("a word " * 30, "x" * 200)]
    wide = texts[0].replace("</main>", '<div style="width:600px">wide</div></main>')  # the browser would tell
    found = widths(tmp_path, [*texts, wide])
    assert found[-1] > 390
    assert max(found[:-1]) <= 390


# --- the commands to run next


def offered() -> list[str]:
    """Every command that a page may offer, but for those of the trainer's script."""
    model = {"model": "base", "lora_weights": "my lora", "num_inference_steps": 20, "guidance_scale": 4.0}
    kinds = ("copies", "copies-otherwise", "no-copies", "no-background")
    steps = [step for kind in kinds for of in (model, None) for step in next_steps.after_audit(kind, of)]
    return [step.command for step in (*steps, *next_steps.after_demo()) if step.command.startswith("ambient-sd")]


def test_the_commands_that_pages_offer_are_understood(tmp_path: Path) -> None:
    from ambient_sd.cli import parser_of

    lines = offered()
    for make in ALL:
        page = make(tmp_path / "p.html", "words").read_text("utf-8")
        codes = [html.unescape(line) for line in re.findall(r'<pre class="copy"><code>(.*?)</code>', page)]
        lines += [line for line in codes if line.startswith("ambient-sd ")]
    verbs = set()
    for line in lines:
        _, verb, *words = shlex.split(line)
        if verb != "demo":  # the command that a made-up report names as its own
            parser_of(verb).parse_args(words)
            verbs.add(verb)
    assert verbs >= {"audit", "calibrate", "sample", "push", "inspect", "level"}
    with pytest.raises(UserError):
        parser_of("audit").parse_args(["MODEL", "DATA", "--no-such-flag"])


def test_a_clean_audit_of_given_images_asks_for_nothing() -> None:
    assert next_steps.after_audit("no-copies", None) == []
    assert len(next_steps.after_audit("copies", None)) == 2
