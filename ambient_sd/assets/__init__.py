"""The embedded base model and images, how they were made, and the demo that trains and measures with them.

`BASE` is a pipeline folder that stock `StableDiffusionPipeline.from_pretrained` loads; `IMAGES` is a parquet file with
the columns image, text, key, split, name, aliases, style, code, category, group, subset_60, subset_300, subset_1000.
"""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).with_name("base")
IMAGES = Path(__file__).with_name("emoji.parquet")
