"""Which weight files a model is, by SHA-256: what ties an audit to the folder that it lies in.

Files are hashed as they are, so a digest is the one that the hub shows for the file, and needs no model to be loaded. Only the
denoising network and its adapter count: a training changes nothing else. A model of the hub is looked for in the local cache, never asked for.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ambient_sd.utils.hub_ids import resolve_model_id

ADAPTER_NAME = "pytorch_lora_weights.safetensors"
NETWORKS = ("unet", "transformer")  # a pipeline has one of them
# Whole or in parts; diffusers has written the variant before and behind the number of the part.
_NUMBER = r"(-\d{5}-of-\d{5})?"
_FILE = re.compile(rf"(diffusion_pytorch_)?model{_NUMBER}(\.(?P<variant>[\w-]+?))?{_NUMBER}\.safetensors")


def variants(part: Path) -> dict[str | None, list[Path]]:
    """Return the weight files in the folder of a pipeline's part by their variant; None is the plain one.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> list(variants(BASE / "unet"))
        [None]
    """
    found: dict[str | None, list[Path]] = {}
    for path in sorted(part.glob("*.safetensors")):
        if (match := _FILE.fullmatch(path.name)) is not None:
            found.setdefault(match["variant"], []).append(path)
    return found


def network_files(
    model: str, *, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None
) -> dict[str, str]:
    """Return name -> SHA-256 of the weight files of a pipeline's denoising network; empty where there are none, or it is not on this machine.

    Args:
        model: folder, one file, or hub id.
        revision: branch, tag or commit on the hub.
        variant: such as fp16; where there is none, the plain files are loaded, and are meant.
        cache_dir: where the hub's files are kept, if not in the usual place.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> list(network_files(str(BASE)))
        ['unet/diffusion_pytorch_model.safetensors']
    """
    folder = Path(name := resolve_model_id(model))
    if folder.is_file():
        return {folder.name: file_digest(folder)}
    if not folder.is_dir():
        found = [_cached(name, f"{part}/config.json", revision, cache_dir) for part in NETWORKS]
        if (first := next((path for path in found if path is not None), None)) is None:
            return {}
        folder = first.parents[1]
    files: dict[str, str] = {}
    for part in NETWORKS:
        there = variants(folder / part)
        paths = there.get(variant) or there.get(None, [])
        files |= {f"{part}/{path.name}": file_digest(path) for path in paths}
    return files


def adapter_files(adapter: str) -> dict[str, str]:
    """Return name -> SHA-256 of a LoRA's file: `adapter` is its folder, the file itself, or a hub id.

    Example:
        >>> adapter_files("no-such-folder")
        {}
    """
    path: Path | None = Path(adapter)
    assert path is not None
    if not path.is_file():
        path = path / ADAPTER_NAME if path.is_dir() else _cached(adapter, ADAPTER_NAME, None, None)
    return {path.name: file_digest(path)} if path is not None and path.is_file() else {}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, read in parts.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "empty"
        >>> path.touch()
        >>> file_digest(path)[:8]
        'e3b0c442'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached(repo: str, name: str, revision: str | None, cache_dir: str | None) -> Path | None:
    try:
        found = try_to_load_from_cache(repo, name, revision=revision, cache_dir=cache_dir)
    except (HFValidationError, OSError):
        return None
    return Path(found) if isinstance(found, str) else None
