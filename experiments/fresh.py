"""A base to train from scratch: a pipeline folder whose U-Net has random weights and whose other parts are another base's.

The paper's small-data experiments train without text and from scratch. With `caption_dropout: 1` the trainer does the same
here: every caption is the empty one, and guidance scale 1 samples without text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ambient_sd.data.stream import keyed_seed
from ambient_sd.utils.errors import UserError


def fresh_base(base: str | Path, changes: Mapping[str, Any], seed: int, folder: Path) -> Path:
    """Write a copy of the pipeline `base` whose U-Net is of random weights; return the folder.

    Args:
        base: local pipeline folder.
        changes: entries of the U-Net's configuration that are to be others, such as `block_out_channels`.
        seed: of the weights.
        folder: where it goes; left as it is if it is there.

    Raises:
        UserError: the base is no local folder, or the configuration makes no U-Net.
    """
    base = Path(base)
    if not (base / "unet" / "config.json").is_file():
        raise UserError(f"from_scratch with base {base}", rule="it takes its VAE and text encoder from a local folder",
                        remedy="download the base, and name its folder")  # fmt: skip
    if folder.exists():
        return folder
    config = {k: v for k, v in json.loads((base / "unet" / "config.json").read_text()).items() if k[0] != "_"}
    unknown = sorted(set(changes) - set(config))
    if unknown:
        raise UserError(f"from_scratch has {', '.join(unknown)}", rule="entries of the U-Net's config.json")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(keyed_seed(seed, "fresh U-Net") % 2**63)
        try:
            unet: Any = UNet2DConditionModel(**{**config, **changes})
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"from_scratch {dict(changes)}", rule=f"{type(error).__name__}: {error}"[:200]) from None
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(base, part, ignore=lambda at, names: ["unet"] if Path(at) == base else [])
    unet.save_pretrained(part / "unet")
    part.rename(folder)
    return folder
