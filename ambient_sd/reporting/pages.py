"""Render a page from its template: one look, self-contained, and every text escaped.

A page loads nothing: images are data URIs, styles are inline, there is no script, and a content security policy says so.
Prompts, captions and file names come from strangers. The environment escapes whatever a template prints; before that it drops
control characters and those that turn the direction of writing, and cuts very long text. Only what is `Markup` already (charts, data URIs)
goes in as it is.

All pages extend `page.html.j2`: the answer as a sentence, the images that prove it, the figures, the method, the next command.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ambient_sd.reporting.sheets import data_uri
from ambient_sd.utils.errors import one_line
from ambient_sd.utils.files import atomic_write

_LONGEST = 4000  # characters of any one text on a page


@dataclass(frozen=True)
class Next:
    """Hold one command to run next: what it does, and the words of the line to copy."""

    what: str
    command: str


def command(*words: object) -> str:
    """Return a line for a shell; each word is quoted where it must be.

    Example:
        >>> command("ambient-sd", "sample", "my model", "--prompt", "it's")
        'ambient-sd sample \\'my model\\' --prompt \\'it\\'"\\'"\\'s\\''
    """
    return " ".join(shlex.quote(one_line(word, 300)) for word in words)


# One line for each term, shown where a page uses it.
TERMS = {
    "copy": "a generated image that is nearer to a training image than images that cannot be copies ever come",
    "copy rate": "the share of generated images that are copies",
    "p": "the chance that an image that is no copy comes this near to a training image",
    "residual": "what is left of the difference to the training image that explains the image best, after shift, scale and colour; 0 is identical",
    "d1/d2": "distance to the nearest training image (d1) over the distance to the second nearest (d2); below 1/3 is the published sign of a copy",
    "similarity": "cosine to the most similar training image, 1 at most",
    "edge-based copy rate": "the share with d1/d2 below 1/3 on edges alone, so that a change of colours hides nothing",
    "Fréchet distance (FD)": "how far the generated images as a set are from unseen real ones; 0 is the same distribution",
    "Kernel distance (KID)": "the same question by a kernel, which needs fewer images; 0 is the same distribution",
    "MiFID": "Fréchet distance that is made worse where images lie on training images",
    "density": "how deep the generated images lie among the real ones; 1 is as deep as real ones",
    "coverage": "the share of real images with a generated one nearby; more is better",
    "CLIP score": "how well image and prompt agree, by CLIP; more is better",
    "held-out": "real images of the same kind that the model has never seen: what chance alone gives",
    "interval": "the range that holds the true value in 95 of 100 repetitions",
    "score": "how strongly the prompt changes the predicted noise; high where an image may be a copy. It compares within one model, size and number of steps",
    "token attribution": "how far the score depends on each token, by its gradient; a first-order statement, no trial",
    "threshold": "the score from which an image is flagged",
    "noise level s_n": "the noise of the one noisy version of each image that ambient training sees; below that level it sees the image clean",
    "5-way prompt accuracy": "how often an image fits its own prompt better than four others; chance is 20 %",
    "CPU s/image": "seconds of processor time for one image",
    "alignment": "how much better an image fits its own prompt than others, judged by a diffusion model; more is better",
    "AUC": "the chance that a memorized prompt scores above an ordinary one; 0.5 is chance, 1 is perfect",
    "TPR@1%FPR": "the share of memorized prompts that are found when 1 % of the ordinary ones are flagged by mistake",
}  # fmt: skip


def terms(*names: str) -> list[tuple[str, str]]:
    """Return terms with their meanings, for the page to explain."""
    return [(name, TERMS[name]) for name in names]


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("ambient_sd.reporting"), autoescape=True, undefined=StrictUndefined, finalize=_cleaned,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters["uri"] = data_uri
    made.filters["cut"] = lambda text, limit: text if isinstance(text, Markup) else one_line(text, limit)
    return made


def _cleaned(value: Any) -> Any:
    # Lone surrogates, as in an undecodable file name, go as well: they would stop the write half way.
    return value if isinstance(value, Markup) else one_line(value, _LONGEST)


def render(template: str, **context: Any) -> str:
    """Return a page as text; the same context gives the same bytes.

    Args:
        template: name of a file in `templates/`.
        context: what it prints; a template that prints anything else fails.

    Example:
        >>> page = render("article.html.j2", title="t", answer="<b>yes</b>", lead="", sections=[], next=[], made={})
        >>> "&lt;b&gt;yes" in page and "default-src 'none'" in page
        True
    """
    return _environment().get_template(template).render(**context)


def write(path: str | Path, template: str, **context: Any) -> Path:
    """Render a page into a file, whole or not at all, and return its path."""
    path = Path(path)
    atomic_write(path, render(template, **context))
    return path


# --- parts of an article ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """Hold a chart with its caption; `note` says how to read it."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """Hold a large image, such as a sheet, with its caption."""

    title: str
    uri: Markup
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Hold a table; the first cell of a row is its head. Columns in `text`, counted from 0, hold sentences and may wrap."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    text: Sequence[int] = ()


@dataclass(frozen=True)
class Section:
    """Hold a part of an article: text, then pictures, charts and tables, then the terms they use."""

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    terms: Sequence[tuple[str, str]] = ()


def write_article(
    path: str | Path, title: str, answer: str, sections: Sequence[Section], *, lead: str = "", next: Sequence[Next] = (),
    made: Mapping[str, object] | None = None,
) -> Path:  # fmt: skip
    """Write a page of sections in the common look and return its path."""
    return write(
        path, "article.html.j2", title=title, answer=answer, lead=lead, sections=sections, next=next, made=made or {}
    )
