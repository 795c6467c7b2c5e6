"""Files that have their old or their new contents at any moment, as far as other processes and a kill can see.

Not here: waiting for the disk, which checkpoints need (`ambient_sd.training.durable`).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file aside and give it its name when it is whole; text as UTF-8. Folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        os.replace(part, path)
    except OSError:  # on a full disk, half a file would keep it full
        part.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """Return nested dicts and lists for JSON, which has no NaN and no infinity: such numbers are null there."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
