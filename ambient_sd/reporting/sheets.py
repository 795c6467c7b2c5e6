"""Images as a page holds them: data URIs of thumbnails; and the sheets of `ambient_sd.utils.sheets`."""

from __future__ import annotations

import base64
import io

from markupsafe import Markup
from PIL import Image

from ambient_sd.utils.sheets import GAP, as_rgb, contact_sheet, cut_sheet, prompt_sheet

__all__ = ["GAP", "contact_sheet", "cut_sheet", "data_uri", "png_bytes", "prompt_sheet", "thumbnail"]

_LOSSLESS = 96  # images up to this side go in as they are; larger ones as WebP thumbnails


def thumbnail(image: Image.Image, side: int = 192) -> Image.Image:
    """Return an image as RGB with no side above `side` pixels; a smaller one keeps its size.

    Example:
        >>> from PIL import Image
        >>> thumbnail(Image.new("L", (512, 256))).size
        (192, 96)
    """
    small = as_rgb(image).copy()
    small.thumbnail((side, side))
    return small


def data_uri(image: Image.Image, side: int = 192) -> Markup:
    """Return an image as a data URI, small ones lossless; the same image gives the same text.

    Example:
        >>> from PIL import Image
        >>> data_uri(Image.new("RGB", (8, 8)))[:22]
        Markup('data:image/png;base64,')
    """
    small = thumbnail(image, side)
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS:
        kind = "png"
        small.save(buffer, "PNG", optimize=True)
    else:
        kind = "webp"
        small.save(buffer, "WEBP", quality=90, method=4)
    # Base64 has no character that HTML reads.
    return Markup(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")


def png_bytes(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
