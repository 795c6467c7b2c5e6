"""The embedded base model and images, how they were made, and the demo that trains and measures with them.

`BASE` is a pipeline folder that stock `StableDiffusionPipeline.from_pretrained` loads. `IMAGES` is a parquet file with
the columns image, text, key, split, name, aliases, style, code, category, group, subset_60, subset_300, subset_1000: two styles, of which the base
was trained on a part. `STYLE` is one with the columns image, text, key, split, name, aliases, style, code, category: 60 images of a style that
the base has not seen (split `train`) and 149 others of it (split `heldout`).
"""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).with_name("base")
IMAGES = Path(__file__).with_name("emoji.parquet")
STYLE = Path(__file__).with_name("twemoji.parquet")
