"""Lay images out on one sheet, with captions: contact sheets, and the sheets of a run's fixed prompts.

Pure images, so that training, sampling and reporting can all use it. Text is drawn with Pillow's own font, which knows Latin
letters alone; others become question marks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ambient_sd.utils.errors import UserError, one_line

GAP = 4  # pixels between the images of a sheet
_LINE = 13  # pixels a line of text
_LINES = 3  # of one caption part at most
_NARROWEST = 96  # pixels of a cell that carries text
_TEXT = "#1b1c20"


def as_rgb(image: Image.Image) -> Image.Image:
    """Return `image` as RGB, transparency laid on white, as a browser shows it.

    Example:
        >>> as_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    if image.mode == "RGB":
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def contact_sheet(
    images: Sequence[Image.Image], columns: int = 8, captions: Sequence[str] | None = None, gap: int = GAP
) -> Image.Image:
    r"""Lay images out on one white sheet, row by row, each cell as large as the largest image.

    Args:
        images: one or more.
        columns: images in a row.
        captions: a text under each image, wrapped to the cell's width; `"\n"` separates its parts. Cells that carry text are at
            least 96 pixels wide.
        gap: pixels between images.

    Returns:
        An RGB sheet.

    Raises:
        UserError: no images, no columns, or another number of captions.

    Example:
        >>> from PIL import Image
        >>> contact_sheet([Image.new("RGB", (64, 64))] * 3, columns=2).size
        (140, 140)
    """
    if not images or columns < 1 or (captions is not None and len(captions) != len(images)):
        raise UserError(
            f"contact sheet of {len(images)} images in {columns} columns",
            rule="needs images, at least one column, and one caption per image",
        )
    width, height = max(i.width for i in images), max(i.height for i in images)
    pen = _Pen()
    texts = []
    if captions is not None:
        width = max(width, _NARROWEST)
        texts = [pen.wrapped(caption, width) for caption in captions]
    text = _LINE * max(map(len, texts), default=0)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + text + gap)
        sheet.paste(as_rgb(image), (x, y))
        for k, line in enumerate(texts[i] if texts else ()):
            draw.text((x, y + height + k * _LINE), line, fill=_TEXT, font=pen.font)
    return sheet


def above(top: Image.Image, bottom: Image.Image) -> Image.Image:
    """Return two images of one width as one, `top` above `bottom`.

    Example:
        >>> from PIL import Image
        >>> above(Image.new("RGB", (64, 64)), Image.new("RGB", (64, 32))).size
        (64, 96)
    """
    both = Image.new("RGB", (top.width, top.height + bottom.height))
    both.paste(as_rgb(top), (0, 0))
    both.paste(as_rgb(bottom), (0, top.height))
    return both


def cut_sheet(sheet: Image.Image, number: int, side: int, columns: int, gap: int = GAP) -> list[Image.Image]:
    """Return the first `number` square images of a `contact_sheet` without captions.

    Example:
        >>> sheet = contact_sheet([Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")], columns=2)
        >>> [image.getpixel((0, 0)) for image in cut_sheet(sheet, number=2, side=8, columns=2)]
        [(255, 0, 0), (0, 0, 255)]
    """
    corners = ((gap + i % columns * (side + gap), gap + i // columns * (side + gap)) for i in range(number))
    return [sheet.crop((x, y, x + side, y + side)) for x, y in corners]


def prompt_sheet(
    rows: Sequence[Sequence[Image.Image]], prompts: Sequence[str], captions: Sequence[Sequence[str]], gap: int = GAP
) -> Image.Image:
    """Lay out one row of images for each prompt, the prompt above the row and a caption under each image.

    Args:
        rows: of equally many images of one size.
        prompts: one a row.
        captions: one an image, such as its score; "" where there is none.
        gap: pixels between images.

    Returns:
        An RGB sheet.

    Example:
        >>> from PIL import Image
        >>> prompt_sheet([[Image.new("RGB", (64, 64))] * 2], ["a cat"], [["1.2", "1.3"]]).size
        (204, 98)
    """
    if not rows or len(prompts) != len(rows) or [len(row) for row in captions] != [len(row) for row in rows]:
        raise UserError(
            f"sheet of {len(rows)} rows, {len(prompts)} prompts", rule="one prompt a row and one caption an image"
        )
    pen = _Pen()
    width, height = max(rows[0][0].width, _NARROWEST), rows[0][0].height
    sheet = Image.new(
        "RGB", (len(rows[0]) * (width + gap) + gap, len(rows) * (height + 2 * _LINE + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = gap + r * (height + 2 * _LINE + gap)
        draw.text(
            (gap, top - 2), pen.cut(prompts[r] or "(empty prompt)", sheet.width - 2 * gap), fill=_TEXT, font=pen.font
        )
        for c, image in enumerate(row):
            x = gap + c * (width + gap)
            sheet.paste(as_rgb(image), (x, top + _LINE))
            draw.text((x, top + _LINE + height), pen.cut(captions[r][c], width), fill=_TEXT, font=pen.font)
    return sheet


class _Pen:
    """Measure and break text in Pillow's own font."""

    def __init__(self) -> None:
        self.font = ImageFont.load_default()

    def _plain(self, text: str) -> str:
        return one_line(text, 400).encode("latin-1", "replace").decode("latin-1")

    def cut(self, text: str, width: int) -> str:
        """Return as much of a text as fits into `width` pixels; "..." says that there was more."""
        text = self._plain(text)
        if self.font.getlength(text) <= width:
            return text
        while text and self.font.getlength(text + "...") > width:
            text = text[:-1]
        return text.rstrip() + "..."

    def wrapped(self, caption: str, width: int) -> list[str]:
        """Return a caption's lines; each of its parts has three at most."""
        lines: list[str] = []
        for part in caption.split("\n"):
            words, made = self._plain(part).split(), [""]
            for k, word in enumerate(words):
                longer = f"{made[-1]} {word}".strip()
                if self.font.getlength(longer) <= width or not made[-1]:
                    made[-1] = longer
                elif len(made) < _LINES:
                    made.append(word)
                else:  # the last line says by its dots that words are missing
                    made[-1] = " ".join([made[-1], *words[k:]])
                    break
            lines += [self.cut(line, width) for line in made]
        return lines
