"""A content-addressed folder of tensors: computed once for an image or caption, for every run that needs them.

    folder = name-SHA256(about)[:16]        about: all that decides the values (weights, preprocessing, seed), in words
    entry  = id -> tensors                  id: 16 bytes, a hash of the input (pixels and view, or caption)
    shard  = ids, tensors, crc32 per entry  one safetensors file, written aside and renamed when whole

An entry's key names everything it depends on, and an entry never changes. So nothing can be stale: other weights are another
folder, a changed image is another entry, and only added images are computed. The shards of an interrupted run are kept.
Shards are memory-mapped: a million latents take no memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ambient_sd.utils.errors import UserError

SHARD_BYTES = 64 * 1024**2
_IDS, _SUMS = "entry_ids", "entry_crc32"
_ID_BYTES = 16


def entry_id(*parts: str) -> bytes:
    """Return the 16-byte id of an entry that depends on these texts.

    Example:
        >>> len(entry_id("an image's key", "its view"))
        16
    """
    digest = hashlib.blake2b(digest_size=_ID_BYTES)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def fingerprint(module: torch.nn.Module, *more: str) -> str:
    """Return a SHA-256 over a module's class, config and weights, and further texts.

    The names under which weights were loaded do not count, nor do their files: only what is computed with.

    Example:
        >>> a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> fingerprint(a) == fingerprint(b), len(fingerprint(a))
        (False, 64)
    """
    config: Any = getattr(module, "config", {})
    config = dict(config) if isinstance(config, Mapping) else config.to_dict()
    config = {k: v for k, v in config.items() if not k.startswith("_") and "version" not in k and "dtype" not in k}
    digest = hashlib.sha256(json.dumps([type(module).__name__, config, *more], sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Store:
    """Keep entries of named tensors in one folder, and find them by their ids.

    Args:
        root: folder of all stores; made by `create`.
        name: first part of the folder's name, for people.
        about: all that the values depend on besides the id; no paths.

    Example:
        >>> import tempfile
        >>> store = Store(tempfile.mkdtemp(), "latents", {"vae": "its digest"})
        >>> store.create()
        >>> shard = store.add([entry_id("a")], [{"mean": torch.ones(2)}])
        >>> store.open([shard])
        >>> store.fault(shard), store.read([entry_id("a")])[0]["mean"].tolist(), store.missing([entry_id("b")])
        (None, [1.0, 1.0], [0])
    """

    def __init__(self, root: str | Path, name: str, about: Mapping[str, Any]) -> None:
        self.about = json.dumps(dict(about), sort_keys=True, indent=1)
        self.digest = hashlib.sha256(self.about.encode()).hexdigest()
        self.folder = Path(root) / f"{name}-{self.digest[:16]}"
        self._ids = np.empty(0, dtype=f"S{_ID_BYTES}")
        self._places = np.empty((0, 2), dtype=np.int64)
        self._shards: list[Any] = []
        self._names: list[str] = []

    def create(self) -> None:
        """Make the folder, with about.json for people to read, and remove what an interrupted run left half-written.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / "about.json", lambda path: path.write_text(self.about + "\n", encoding="utf-8"))
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def shards(self) -> list[str]:
        """Return the file names of all shards, whole or not."""
        return sorted(path.name for path in self.folder.glob("*.safetensors"))

    def fault(self, shard: str) -> str | None:
        """Read a whole shard and say what is wrong with it, or None."""
        try:
            with safe_open(self.folder / shard, "np") as file:
                if (file.metadata() or {}).get("about") != self.digest:
                    return "it belongs to another cache"
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except FileNotFoundError:
            return "it is gone"
        except (SafetensorError, OSError, ValueError) as error:
            return f"{type(error).__name__}: {str(error)[:120]}"
        try:
            ids, sums = tensors.pop(_IDS), tensors.pop(_SUMS)
            expected = _checksums(ids, tensors)
        except (KeyError, IndexError, ValueError):
            return "it lacks entries"
        wrong = np.flatnonzero(expected != sums)
        return f"{len(wrong)} of {len(sums)} entries fail their checksum" if len(wrong) else None

    def remove(self, shard: str) -> None:
        """Remove a shard; its entries will be computed again."""
        (self.folder / shard).unlink(missing_ok=True)

    def open(self, shards: Sequence[str]) -> None:
        """Index these shards, which `fault` has found whole; entries are read from them by memory mapping."""
        self._shards = [safe_open(self.folder / name, "pt") for name in shards]
        ids = [file.get_tensor(_IDS).numpy().tobytes() for file in self._shards]
        places = [(shard, row) for shard, raw in enumerate(ids) for row in range(len(raw) // _ID_BYTES)]
        every = np.frombuffer(b"".join(ids), dtype=f"S{_ID_BYTES}")
        # An entry that two runs have written at once is there twice, with the same bits: the first one is taken.
        self._ids, first = np.unique(every, return_index=True)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)[first]
        names = list(self._shards[0].keys()) if self._shards else []
        self._names = [name for name in names if name not in (_IDS, _SUMS)]

    def missing(self, ids: Sequence[bytes]) -> list[int]:
        """Return the places in `ids` of those that no opened shard holds, each id once."""
        wanted = np.array(list(ids), dtype=f"S{_ID_BYTES}")
        _, first = np.unique(wanted, return_index=True)
        first.sort()
        return first[~np.isin(wanted[first], self._ids)].tolist()

    def read(self, ids: Sequence[bytes]) -> list[dict[str, torch.Tensor]]:
        """Return the tensors of entries.

        Raises:
            KeyError: an entry is not in the opened shards.
        """
        wanted = np.array(list(ids), dtype=f"S{_ID_BYTES}")
        found = np.searchsorted(self._ids, wanted)
        if len(self._ids) == 0 or (self._ids[np.minimum(found, len(self._ids) - 1)] != wanted).any():
            raise KeyError("an entry is not in the cache")
        entries = []
        for shard, row in self._places[found].tolist():
            file = self._shards[shard]
            entries.append({name: file.get_slice(name)[row : row + 1][0].clone() for name in self._names})
        return entries

    def add(self, ids: Sequence[bytes], entries: Sequence[Mapping[str, torch.Tensor]]) -> str:
        """Write entries as one shard and return its name; it is not opened.

        Raises:
            UserError: the disk is full or may not be written.
        """
        tensors = {name: torch.stack([entry[name] for entry in entries]).contiguous() for name in entries[0]}
        raw = torch.frombuffer(bytearray(b"".join(ids)), dtype=torch.uint8).reshape(-1, _ID_BYTES)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        sums = torch.from_numpy(_checksums(raw.numpy(), arrays))
        name = f"{hashlib.sha256(b''.join(ids)).hexdigest()[:16]}.safetensors"
        content = {**tensors, _IDS: raw, _SUMS: sums}
        try:
            _write(self.folder / name, lambda path: save_file(content, path, metadata={"about": self.digest}))
        except (OSError, SafetensorError) as error:
            raise _unwritable(self.folder, error) from None
        return name


def _checksums(ids: np.ndarray[Any, Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return one CRC-32 per entry, over its id, then its tensors by name."""
    sums = np.empty(len(ids), dtype=np.int64)
    for row in range(len(ids)):
        value = zlib.crc32(ids[row].tobytes())
        for name in sorted(tensors):
            value = zlib.crc32(np.ascontiguousarray(tensors[name][row]).data, value)
        sums[row] = value
    return sums


def _write(path: Path, write: Any) -> None:
    """Write a file aside, bring it to the disk and give it its name: it is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _unwritable(folder: Path, error: Exception) -> UserError:
    reason = (getattr(error, "strerror", None) or str(error))[:160]
    return UserError(f"cache folder {folder} cannot be written", rule=reason,
                     remedy="free some space, or name another folder with --latent_cache_dir; what is in it stays")  # fmt: skip
