"""Stored embeddings of the training images: what an audit reads from a folder of `ambient_sd.audit.embedding`.

A training set is embedded once and many models are audited against it. Vectors, content keys and the thumbnails by which
near-duplicates are found are read from the folder; no training image is embedded again, and few are decoded:

    up to CHECKED images, chosen by the seed, to verify that the embeddings are theirs: all of a small set
    BACKGROUND of them (`metrics`), whose mirror images the folder does not hold
    the originals that are shown beside copies

Limit: in a set of more than CHECKED images, one that was replaced under its name and caption since may be missed. If a share p was
replaced, this is noticed with probability 1 - (1 - p)^CHECKED: 63 % at p = 0.1 %. `EmbeddingStore.require` decodes every image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ambient_sd.audit.embedding import EmbeddingStore, names_digest
from ambient_sd.data.duplicates import find_groups
from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import drawn
from ambient_sd.utils.errors import UserError

CHECKED = 1000


def missing_features(folder: Path, features: Sequence[str]) -> list[str]:
    """Return those of `features` (`registry.labels`) that the folder holds nothing of.

    Example:
        >>> import tempfile
        >>> missing_features(Path(tempfile.mkdtemp()), ["pixels64"])
        ['pixels64']
    """
    return [name for name in features if not any((folder / name).glob("part-*.parquet"))]


def recall(stores: Sequence[EmbeddingStore], images: ImageDataset, seed: int = 0, progress: bool = False) -> int:
    """Give a dataset its keys, sizes and near-duplicates from its embeddings instead of `ImageDataset.check`.

    Args:
        stores: one or more, of different features.
        images: the set, unchecked.
        seed: of the choice of images that are decoded and compared.

    Returns:
        How many were.

    Raises:
        UserError: the embeddings are of other images, captions or rows, or of different ones.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from ambient_sd.audit.embedding import embed_set, load_set
        >>> from ambient_sd.audit.features import Pixels
        >>> folder, vectors = (Path(tempfile.mkdtemp()) for _ in range(2))
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> [stored] = embed_set(load_set(folder), [Pixels(4)], vectors)
        >>> recall([EmbeddingStore.open(stored)], load_set(folder))
        1
    """
    first, *others = stores
    again = "give the images that were embedded, or embed these into an empty folder"
    for store in stores:
        if len(store) != len(images):
            raise UserError(f"{store.folder} holds embeddings of other rows", remedy=again,
                            rule=f"{len(store)} images were embedded, {len(images)} are in {images.source}")  # fmt: skip
        if store.about.data != names_digest(images):
            raise UserError(f"{store.folder} holds embeddings of other rows", remedy=again,
                            rule=f"names or captions of {images.source} differ")  # fmt: skip
    content = first.fingerprint() if others else ""
    for store in others:
        if store.fingerprint() != content:
            raise UserError(f"{store.folder} and {first.folder} hold embeddings of different images", remedy=again)
    keys = [key for key, _ in first.rows()]
    chosen = drawn(len(keys), CHECKED, seed, "stored embeddings")
    for i in tqdm(chosen, desc="comparing images", disable=not progress, leave=False):
        if images[i].key != keys[i]:
            raise UserError(f"{first.folder} holds embeddings of other images", remedy=again,
                            rule=f"{images.names[i]} in {images.source} is another one")  # fmt: skip
    thumbnails = first.thumbnails()
    images.known(keys, thumbnails.sizes, find_groups(keys, thumbnails))
    return len(chosen)
