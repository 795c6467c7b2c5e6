"""Training pictures that were embedded before: what an audit takes from a folder of `ambient_sd.audit.embedding`.

A training set is embedded once and many models are audited against it. Vectors, content keys and the thumbnails by which
near-duplicates are found are read from the folder; no training picture is embedded again, and few are decoded:

    up to CHECKED pictures, drawn by the seed, to see that the embeddings are theirs: all of a small set
    BACKGROUND of them (`metrics`), whose mirror images the folder does not hold
    the originals that are shown beside copies

What this does not see: in a set of more than CHECKED pictures, one that was replaced under its name and caption since it was
embedded, if it is none of those. Of n pictures of which a share p was replaced, one is seen with 1 - (1 - p)^CHECKED:
63 % at p = 0.1 %. `EmbeddingStore.require` decodes every picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ambient_sd.audit.embedding import EmbeddingStore, names_digest
from ambient_sd.data.duplicates import find_groups
from ambient_sd.data.sources import PictureSet
from ambient_sd.data.stream import drawn
from ambient_sd.errors import UserError

CHECKED = 1000


def missing_features(folder: Path, features: Sequence[str]) -> list[str]:
    """Return those of `features` (`registry.labels`) that the folder holds nothing of."""
    return [name for name in features if not any((folder / name).glob("part-*.parquet"))]


def recall(stores: Sequence[EmbeddingStore], pictures: PictureSet, seed: int = 0, progress: bool = False) -> int:
    """Tell a picture set its keys, sizes and near-duplicates from its embeddings, as `PictureSet.check` finds them.

    Args:
        stores: one or more, of different features.
        pictures: the set, unchecked.
        seed: of the choice of pictures that are decoded and compared.

    Returns:
        How many were.

    Raises:
        UserError: the embeddings are of other pictures, captions or rows, or of different ones.
    """
    first, *others = stores
    again = "give the pictures that were embedded, or embed these into an empty folder"
    for store in stores:
        if len(store) != len(pictures):
            raise UserError(f"{store.folder} holds embeddings of other rows", remedy=again,
                            rule=f"{len(store)} pictures were embedded, {len(pictures)} are in {pictures.source}")  # fmt: skip
        if store.about.data != names_digest(pictures):
            raise UserError(f"{store.folder} holds embeddings of other rows", remedy=again,
                            rule=f"names or captions of {pictures.source} differ")  # fmt: skip
    content = first.fingerprint() if others else ""
    for store in others:
        if store.fingerprint() != content:
            raise UserError(f"{store.folder} and {first.folder} hold embeddings of different pictures", remedy=again)
    keys = [key for key, _ in first.rows()]
    chosen = drawn(len(keys), CHECKED, seed, "stored embeddings")
    for i in tqdm(chosen, desc="comparing pictures", disable=not progress, leave=False):
        if pictures[i].key != keys[i]:
            raise UserError(f"{first.folder} holds embeddings of other pictures", remedy=again,
                            rule=f"{pictures.names[i]} in {pictures.source} is another one")  # fmt: skip
    looks = first.looks()
    pictures.known(keys, looks.sizes, find_groups(keys, looks))
    return len(chosen)
