"""One image file to RGB pixels, alike for every purpose, and the key of its content.

An image's key is the SHA-256 of its decoded RGB content, size included: a copy under another name or in another lossless
format has the same. It does not resize; `ambient_sd.data.views` does.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FRAMES = "ambient_sd_frames"  # in a decoded image's info: the file has further frames


class Undecodable(Exception):
    """Say why the bytes of one image do not decode.

    Example:
        >>> try:
        ...     decode(b"no image")
        ... except Undecodable as error:
        ...     print(error)
        no image format that Pillow knows
    """


def content_key(image: Image.Image) -> str:
    """Return the SHA-256 of an RGB image's size and pixels, in hexadecimal.

    Example:
        >>> len(content_key(Image.new("RGB", (8, 8))))
        64
    """
    width, height = image.size
    digest = hashlib.sha256(f"{width}x{height} RGB\n".encode())
    for box in _strips(image):
        digest.update(image.crop(box).tobytes())
    return digest.hexdigest()


def decode(source: bytes | Path) -> Image.Image:
    """Decode an image to RGB: upright, the first frame, transparency laid on white.

    An image takes 8 bytes a pixel at most on the way, and 4 afterwards. A PNG's comments are skipped where they are too large for Pillow; no pixel depends on them.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
        >>> decode(buffer.getvalue()).getpixel((0, 0))  # transparency is laid on white
        (255, 255, 255)
    """
    try:
        try:
            return _decoded(io.BytesIO(source) if isinstance(source, bytes) else source)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
        data = source if isinstance(source, bytes) else source.read_bytes()
        try:
            return _decoded(io.BytesIO(_without_comments(data)))
        except ValueError as error:
            if "MAX_TEXT" in str(error):
                raise Undecodable(
                    "the text that holds its orientation is too large; save it without metadata"
                ) from None
            raise
    except Undecodable:
        raise
    except FileNotFoundError:
        raise Undecodable(f"there is no file {source.name if isinstance(source, Path) else ''}") from None
    except Image.UnidentifiedImageError:
        raise Undecodable("no image format that Pillow knows") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise Undecodable(
            f"it has more than {most} pixels, and so may be made to fill the memory; scale it down"
        ) from None
    except (
        Exception
    ) as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ... on bad bytes
        raise Undecodable(f"{type(error).__name__}: {error}") from None


def _decoded(file: io.BytesIO | Path) -> Image.Image:
    # A damaged file ends in one line, without Pillow's beside it.
    with warnings.catch_warnings(action="ignore"), Image.open(file) as opened:
        if opened.format == "EPS":  # Pillow would have Ghostscript run it
            raise ValueError("PostScript is a program; save it as an image")
        # A phone's MPO has a preview or a depth map behind its image.
        frames = opened.format != "MPO" and getattr(opened, "is_animated", False)
        opened.load()
        ImageOps.exif_transpose(opened, in_place=True)
        image: Image.Image = opened
        clear = image.info.get("transparency")
        # convert("RGB") would clip these at 255: one 16-bit image as white as the next, and under one key.
        if image.mode.startswith("I;16"):
            wide = np.asarray(image)
            image = Image.fromarray((wide >> 8).astype(np.uint8))
            if isinstance(clear, int):  # the grey that stands for nothing
                image.putalpha(Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8)))
        elif image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode} has no agreed white; save it with 8 or 16 bits per channel")
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            # convert("RGB") alone would bring out whatever colours lie hidden under transparent pixels.
            rgb = Image.new("RGB", image.size)
            for box in _strips(image):
                layer = image.crop(box).convert("RGBA")
                rgb.paste(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"), box)
        else:
            rgb = image.convert("RGB")
        rgb.info = {FRAMES: True} if frames else {}
        return rgb


def _strips(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Return boxes of some hundred lines each: a copy of an image of 100 megapixels costs 400 MB, one of a strip next to nothing."""
    return [(0, top, image.width, min(top + 512, image.height)) for top in range(0, image.height, 512)]


def _without_comments(data: bytes) -> bytes:
    """Return a PNG without its texts and colour profile, but for a text that holds its orientation."""
    kept, at = [data[:8]], 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind, start = data[at + 4 : at + 8], data[at + 8 : at + 40]
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or start.startswith(b"Raw profile type exif\0"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)
