"""Every image of a set as a row of numbers on disk: sharded over processes, resumable, read back in blocks.

    accelerate launch -m ambient_sd.audit.embedding DATA --features pixels,efflite0,sscd --out DIR

    DIR/<feature>/part-00007.parquet    rows [7 B, 8 B) of DATA: place, key, caption, size, thumbnail, embedding
    schema metadata                     feature, its parameters, digest of its weights, resolution, data, block

Block b holds the same images, in the same batches, whichever process computes it: any number of processes, resumed or not, gives the
same bits on machines of one kind with the same number of threads. A block gets its name when it is complete; an interrupted
block is computed again. Memory is one block of vectors and one batch of images.

`key` is the SHA-256 of the decoded image (`ambient_sd.data.sources`); `data` is a digest of names and captions, known
before anything is decoded, and `rows` of each block one of keys and captions. `EmbeddingStore.fingerprint` is that of the
whole set, the same as `ImageDataset.fingerprint`. `size` and `thumbnail` (16 x 16 RGB) are what near-duplicates are found by
(`ambient_sd.data.duplicates`): with them an audit need not decode the set again (`ambient_sd.audit.stored`).

It does not search (`ambient_sd.audit.neighbours`), resize, crop or merge: near-duplicates stay separate rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ambient_sd.audit.features import Distance, Features
from ambient_sd.audit.registry import FeatureOptions, choose
from ambient_sd.data.cache import fingerprint
from ambient_sd.data.dataset_options import DatasetOptions, reading
from ambient_sd.data.duplicates import SIDE, Thumbnails
from ambient_sd.data.sources import ImageDataset, ImageRow, load_rows
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.settings import REQUIRED, Parser, add_flags, check, from_flags, option
from ambient_sd.utils.weight_files import file_digest

logger = logging.getLogger(__name__)

VERSION = 1  # of what turns an image into a row; a change must raise it
_ABOUT, _ROWS = b"ambient_sd.embedding", b"ambient_sd.rows"
_BATCH = 64  # images decoded at once: a multiple of every extractor's own batch, so that blocks do not cut batches
_PART = re.compile(r"part-(\d{5,})\.parquet")
Dtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class About:
    """Hold everything that the rows of a store depend on; two stores with equal `About` hold the same numbers.

    Attributes:
        feature: name of the extractor.
        distance: the distance that its vectors are made for.
        dim: numbers per image.
        dtype: as which they are stored.
        resolution: side in pixels that every image is brought to.
        weights: SHA-256 of the network's weights; empty for pixels.
        device: cpu, cuda, ...: networks round differently there.
        data: SHA-256 over names and captions.
        count: images in the set.
        block: rows of a part.
        version: of the code that makes rows.

    Example:
        >>> about = About("pixels8", "euclidean", 192, "float32", 8, "", "cpu", "", count=5000, block=2048)
        >>> about.parts, about.rows_of(2)
        (3, range(4096, 5000))
    """

    feature: str
    distance: Distance
    dim: int
    dtype: Dtype
    resolution: int
    weights: str
    device: str
    data: str
    count: int
    block: int
    version: int = VERSION

    @property
    def parts(self) -> int:
        """Return the number of blocks."""
        return -(-self.count // self.block)

    def rows_of(self, part: int) -> range:
        """Return the places of the images in a block."""
        return range(part * self.block, min(self.count, (part + 1) * self.block))

    def unlike(self, other: About) -> str:
        """Return in words what differs from `other`; empty if nothing does."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name} {_short(mine[name])} and {_short(theirs[name])}" for name in mine if mine[name] != theirs[name]
        )


def _short(value: object) -> str:
    return str(value)[:12] or "none"


class EmbeddingStore:
    """Read what `embed_set` has written for one feature.

    Args:
        folder: holds the parts of one feature.
        about: of every part.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from ambient_sd.audit.features import Pixels
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> [stored] = embed_set(load_set(folder), [Pixels(4)], folder / "vectors")
        >>> EmbeddingStore.open(stored).shape
        (1, 48)
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder, self.about = folder, about
        self.distance: Distance = about.distance
        self.dim = about.dim

    @classmethod
    def open(cls, folder: str | Path, feature: str | None = None) -> EmbeddingStore:
        """Open a store; every part's footer is read, no vector is.

        Args:
            folder: what was given as `--out`, or the folder of one feature in it.
            feature: which one, where there are several.

        Raises:
            UserError: nothing is there, parts are missing or damaged, or belong to different features or data.
        """
        folder = _one_feature(Path(folder).expanduser(), feature)
        found = _parts(folder)
        if not found:
            raise UserError(f"{folder} holds no embeddings", rule="it must hold part-00000.parquet and so on")
        about: About | None = None
        for number, path in sorted(found.items()):
            mine, rows = _footer(path)
            about = about or mine
            if mine != about:
                raise UserError(
                    f"{path.name} in {folder} belongs to other embeddings", rule=about.unlike(mine),
                    remedy="embed into an empty folder",
                )  # fmt: skip
            if number >= about.parts or rows != len(about.rows_of(number)):
                raise UserError(
                    f"{path} has {rows} rows", rule="not those of its block", remedy="remove it and embed again"
                )
        assert about is not None
        missing = [number for number in range(about.parts) if number not in found]
        if missing:
            raise UserError(
                f"{len(missing)} of {about.parts} blocks are missing in {folder}, the first is part-{missing[0]:05d}",
                rule="the embedding was interrupted", remedy="give the same command again: it resumes",
            )  # fmt: skip
        return cls(folder, about)

    def __len__(self) -> int:
        return self.about.count

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, numbers per row)."""
        return self.about.count, self.dim

    def path(self, part: int) -> Path:
        """Return the file of a block."""
        return self.folder / f"part-{part:05d}.parquet"

    def blocks(self) -> Iterator[Tensor]:
        """Yield the vectors in the order of the images, float32 `(B, D)`, one block in memory at a time.

        Raises:
            UserError: a part is damaged.
        """
        for part in range(self.about.parts):
            yield self.block(part)

    def block(self, part: int) -> Tensor:
        """Return the vectors of a block, float32 `(B, D)`."""
        column = self._read(part, ["embedding"]).column("embedding").combine_chunks()
        values = np.asarray(column.flatten()).reshape(-1, self.dim)
        # A copy: pyarrow's buffers may not be written to, and torch would warn.
        return torch.from_numpy(values.astype(np.float32, copy=True))

    def gather(self, rows: Tensor) -> Tensor:
        """Return the vectors at `rows`, int64 `(n,)`, as float32 `(n, D)`; every block that holds one is read once."""
        found = torch.empty(len(rows), self.dim)
        part = rows // self.about.block
        for number in part.unique().tolist():
            here = part == number
            found[here] = self.block(number)[rows[here] - number * self.about.block]
        return found

    def thumbnails(self) -> Thumbnails:
        """Return the sizes and thumbnails of all images, in order."""
        found = Thumbnails()
        for part in range(self.about.parts):
            table = self._read(part, ["width", "height", "thumbnail"])
            sizes = zip(table.column("width").to_pylist(), table.column("height").to_pylist(), strict=True)
            found.extend(b"".join(table.column("thumbnail").to_pylist()), sizes)
        return found

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield key and caption of every image, in order."""
        for part in range(self.about.parts):
            table = self._read(part, ["key", "caption"])
            yield from zip(table.column("key").to_pylist(), table.column("caption").to_pylist(), strict=True)

    def fingerprint(self) -> str:
        """Return the SHA-256 over keys and captions that `ImageDataset.fingerprint` gives for the same set."""
        digest = hashlib.sha256()
        for key, caption in self.rows():
            digest.update(_line(key, caption))
        return digest.hexdigest()

    @property
    def digest(self) -> str:
        """Return a SHA-256 that changes with any image, caption, weight or setting; reads no vector."""
        digest = hashlib.sha256(json.dumps(asdict(self.about), sort_keys=True).encode())
        for part in range(self.about.parts):
            digest.update((pq.read_schema(self.path(part)).metadata or {}).get(_ROWS, b""))
        return digest.hexdigest()

    def require(self, images: ImageDataset) -> None:
        """Refuse a set that these embeddings were not made from.

        Raises:
            UserError: an image or caption differs.
        """
        if len(images) != len(self) or images.fingerprint() != self.fingerprint():
            raise UserError(
                f"the embeddings in {self.folder} are not those of {images.source}",
                rule=f"{len(self)} embedded images, {len(images)} in the set, and contents or captions differ",
                remedy="embed the set again into an empty folder",
            )  # fmt: skip

    def require_feature(self, feature: Features) -> None:
        """Refuse an extractor that did not make these embeddings.

        Raises:
            UserError: the store is of another feature, resolution, other weights or another version of the code.
        """
        have = (feature.name, getattr(feature, "size", None), weights_digest(feature), VERSION)
        about = self.about
        if have != (about.feature, about.resolution, about.weights, about.version):
            raise UserError(
                f"embeddings in {self.folder} are of {about.feature} at {about.resolution} px, weights {about.weights[:12] or 'none'}, version {about.version}",
                rule=f"images would be embedded by {have[0]} at {have[1]} px, weights {have[2][:12] or 'none'}, version {have[3]}",
                remedy="embed the training images again into an empty folder, or give those weights",
            )  # fmt: skip

    def _read(self, part: int, columns: list[str]) -> pa.Table:
        try:
            return pq.read_table(
                self.path(part), columns=columns, memory_map=True, partitioning=None, page_checksum_verification=True
            )
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path(part), error) from None


def _damaged(path: Path, error: object) -> UserError:
    return UserError(f"{path} cannot be read", rule=str(error), remedy="remove it and give the embedding command again")


def _parts(folder: Path) -> dict[int, Path]:
    names = os.listdir(folder) if folder.is_dir() else []
    return {int(match[1]): folder / name for name in names if (match := _PART.fullmatch(name))}


def _one_feature(folder: Path, feature: str | None) -> Path:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", rule="it must hold embeddings")
    if _parts(folder):
        if feature is not None and _footer(min(_parts(folder).values()))[0].feature != feature:
            raise UserError(f"{folder} holds no embeddings of {feature}", rule="they are of another feature")
        return folder
    inside = sorted(child.name for child in folder.iterdir() if child.is_dir() and _parts(child))
    if feature is None and len(inside) == 1:
        return folder / inside[0]
    if feature is None or feature not in inside:
        raise UserError(
            f"{folder} holds {'no' if feature else 'more than one set of'} embeddings" + (f" of {feature}" if feature else ""),
            rule=f"there are {', '.join(inside) or 'none'}",
        )  # fmt: skip
    return folder / feature


def _footer(path: Path) -> tuple[About, int]:
    """Return what a part says about itself, and its number of rows."""
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            raw = (file.schema_arrow.metadata or {})[_ABOUT]
            return About(**json.loads(raw)), file.metadata.num_rows
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "it holds no embeddings" if isinstance(error, KeyError) else error) from None


def _line(key: str, caption: str) -> bytes:
    return f"{key} {len(caption)} {caption}\n".encode("utf-8", "surrogatepass")  # as in ImageDataset.fingerprint


def load_set(source: str | Path, **options: Any) -> ImageDataset:
    """Open a set as `load_rows` does, whose `options` these are; captions may be missing, and a folder may be images alone.

    Raises:
        UserError: as for `load_rows`.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> load_set(folder).names
        ['a.png']
    """
    return load_rows(source, need_captions=False, **options)


def weights_digest(feature: Any) -> str:
    """Return a SHA-256 over an extractor's weights, of its network or model file; empty if it has none.

    Example:
        >>> from ambient_sd.audit.features import Pixels
        >>> weights_digest(Pixels())  # has none
        ''
    """
    if (known := getattr(feature, "digest", None)) is not None:  # a script is more than its weights
        return str(known)
    if isinstance(getattr(feature, "network", None), torch.nn.Module):
        return fingerprint(feature.network)
    if isinstance(getattr(feature, "path", None), Path):
        return file_digest(feature.path)
    return ""


def describe(feature: Any, images: ImageDataset, *, dtype: Dtype, block: int, device: str) -> About:
    """Return what the rows of `feature` on `images` depend on; no image is decoded.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from ambient_sd.audit.features import Pixels
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> describe(Pixels(4), load_set(folder), dtype="float16", block=64, device="cpu").dim
        48
    """
    return About(
        feature.name, feature.distance, feature.dim, dtype, feature.size, weights_digest(feature), device, names_digest(images),
        len(images), block,
    )  # fmt: skip


def names_digest(images: ImageDataset) -> str:
    """Return the SHA-256 over names and captions that `About.data` is; no image is decoded.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> len(names_digest(load_set(folder)))
        64
    """
    digest = hashlib.sha256()
    for name, caption in zip(images.names, images.captions, strict=True):
        digest.update(_line(name, caption))
    return digest.hexdigest()


def embed_set(
    images: ImageDataset,
    features: Sequence[Features],
    out: str | Path,
    *,
    dtype: Dtype = "float32",
    block: int = 2048,
    state: Any = None,
    progress: bool = False,
) -> list[Path]:
    """Embed every image by every extractor into `out`; to be called by every process.

    Args:
        images: the set, unchecked: each image is decoded once, here.
        features: extractors with `name`, `distance`, `dim`, `size`.
        out: folder for one folder per feature; what an interrupted call has left in it is kept and completed.
        dtype: as which vectors are stored; float16 halves the disk and rounds by 2^-11 of each number.
        block: images per file, a multiple of 64.
        state: accelerate's `PartialState`, for more than one process.
        progress: show a bar.

    Returns:
        The folder of each feature.

    Raises:
        UserError: the folder holds embeddings of something else or cannot be written, or an image does not decode.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from ambient_sd.audit.features import Pixels
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> embed_set(load_set(folder), [Pixels(4)], folder / "vectors")[0].name
        'pixels4'
    """
    if block < 1 or block % _BATCH:
        raise UserError(f"block {block}", rule=f"must be a multiple of {_BATCH}, such as 2048")
    rank, ranks = (0, 1) if state is None else (state.process_index, state.num_processes)
    device = "cpu" if state is None else state.device.type
    abouts = [describe(f, images, dtype=dtype, block=block, device=device) for f in features]
    folders = [Path(out).expanduser() / feature.name for feature in features]
    # One process looks and tells the others: a block may be written between two looks.
    todo = _agreed(lambda: _missing(images, abouts, folders, range(abouts[0].parts)), state)
    done = abouts[0].count - sum(len(abouts[0].rows_of(part)) for part in todo)
    with (
        tqdm(
            total=abouts[0].count, initial=done, desc="embedding", unit="img", disable=not progress or rank > 0
        ) as bar,
        ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // ranks)) as pool,
    ):
        for part in list(todo)[rank::ranks]:
            wanted = [i for i in range(len(features)) if i in todo[part]]
            rows = abouts[0].rows_of(part)
            _embed_block(images, rows, [(features[i], abouts[i], folders[i]) for i in wanted], pool)
            done = min(abouts[0].count, done + len(rows) * ranks)
            bar.update(done - bar.n)
    if ranks > 1:
        state.wait_for_everyone()
    return folders


def _agreed(look: Callable[[], dict[int, list[int]]], state: Any) -> dict[int, list[int]]:
    """Return what the first process finds, on every process; its mistake is everyone's."""
    if state is None or state.num_processes == 1:
        return look()
    from accelerate.utils import broadcast_object_list

    seen: list[Any] = [None]
    if state.process_index == 0:
        try:
            seen = [look()]
        except UserError as error:
            seen = [str(error)]
    (found,) = broadcast_object_list(seen)
    if isinstance(found, str):
        raise UserError(found)
    return found


def _missing(
    images: ImageDataset, abouts: Sequence[About], folders: Sequence[Path], parts: range
) -> dict[int, list[int]]:
    """Return block -> the features that lack it; refuse a folder of other embeddings."""
    todo: dict[int, list[int]] = {}
    for i, (about, folder) in enumerate(zip(abouts, folders, strict=True)):
        found = _parts(folder)
        for part in parts:
            if part not in found or not _whole(found[part], about, part, images):
                todo.setdefault(part, []).append(i)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from None
    return dict(sorted(todo.items()))


def _whole(path: Path, about: About, part: int, images: ImageDataset) -> bool:
    """Tell whether a block of an earlier run can be kept. Its first image is decoded, so that a changed set is noticed early."""
    try:
        mine, rows = _footer(path)
        key = pq.read_table(path, columns=["key"], partitioning=None).column("key")[0].as_py() if rows else ""
    except (UserError, pa.ArrowException, OSError) as error:
        logger.warning("%s is damaged and is computed again (%s)", path, error)
        return False
    first = about.rows_of(part)[0]
    if mine != about or rows != len(about.rows_of(part)):
        raise UserError(f"{path.parent} holds other embeddings", rule=mine.unlike(about) or "another number of rows",
                        remedy="name another folder with --out, or remove that one")  # fmt: skip
    if images[first].key != key:
        raise UserError(f"{path.parent} holds embeddings of other images", rule=f"{images.names[first]} has changed",
                        remedy="name another folder with --out, or remove that one")  # fmt: skip
    return True


def _embed_block(
    dataset: ImageDataset,
    rows: range,
    features: Sequence[tuple[Features, About, Path]],
    pool: ThreadPoolExecutor,
) -> None:
    """Decode the images of a block batch by batch, run every extractor over each batch, write a file per feature."""
    keys: list[str] = []
    thumbnails = Thumbnails()
    vectors: list[list[np.ndarray]] = [[] for _ in features]
    # A batch is decoded while the one before it is embedded.
    starts = list(range(rows.start, rows.stop, _BATCH))
    ahead = [pool.submit(dataset.__getitem__, i) for i in rows[:_BATCH]]
    for start in starts:
        batch: list[ImageRow] = [one.result() for one in ahead]
        ahead = [pool.submit(dataset.__getitem__, i) for i in range(start + _BATCH, min(start + 2 * _BATCH, rows.stop))]
        keys += [row.key for row in batch]
        images = [row.image for row in batch]
        for image in images:
            thumbnails.add(image)
        for (feature, about, _), held in zip(features, vectors, strict=True):
            found = feature(images)
            if not torch.isfinite(found).all():
                raise UserError(f"{feature.name} gives NaN or infinite values near {dataset.names[start]}")
            held.append(found.numpy().astype(about.dtype))
    captions = [dataset.captions[i] for i in rows]
    for (_, about, folder), held in zip(features, vectors, strict=True):
        path = folder / f"part-{rows.start // about.block:05d}.parquet"
        write_block(path, about, rows, keys, captions, np.concatenate(held), thumbnails)


def write_block(
    path: Path,
    about: About,
    rows: range,
    keys: Sequence[str],
    captions: Sequence[str],
    vectors: np.ndarray,
    thumbnails: Thumbnails,
) -> None:
    """Write the block of a store.

    Args:
        path: `EmbeddingStore.path` of the block.
        about: of the store.
        rows: places of the images.
        keys: their content keys.
        captions: their captions.
        vectors: `(B, dim)`, of the store's dtype.
        thumbnails: of the images, with their sizes.

    Raises:
        UserError: vectors are not finite, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> thumbnails = Thumbnails()
        >>> thumbnails.extend(bytes(2 * 3 * SIDE * SIDE), [(8, 8)] * 2)
        >>> about = About("made", "euclidean", 3, "float32", 1, "", "cpu", "", count=2, block=64)
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_block(folder / "part-00000.parquet", about, range(2), ["a", "b"], ["", ""], np.eye(2, 3, dtype=np.float32), thumbnails)
        >>> EmbeddingStore.open(folder).block(0).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if not np.isfinite(vectors).all():
        raise UserError(f"{about.feature} does not fit into {about.dtype}", remedy="use --dtype float32")
    digest = hashlib.sha256(b"".join(_line(k, c) for k, c in zip(keys, captions, strict=True))).hexdigest()
    metadata = {_ABOUT: json.dumps(asdict(about), sort_keys=True).encode(), _ROWS: digest.encode()}
    item = pa.field("element", pa.from_numpy_dtype(vectors.dtype), nullable=False)
    columns = [
        ("place", pa.int64(), pa.array(rows, pa.int64())),
        ("key", pa.string(), pa.array(keys, pa.string())),
        ("caption", pa.string(), pa.array(captions, pa.string())),
    ]
    pixels = pa.binary(3 * SIDE * SIDE)
    for name, values in zip(("width", "height"), zip(*thumbnails.sizes, strict=True), strict=True):
        columns.append((name, pa.int32(), pa.array(values, pa.int32())))
    columns.append(("thumbnail", pixels, pa.array([look.tobytes() for look in thumbnails.array()], pixels)))
    kind = pa.list_(item, about.dim)
    columns.append(("embedding", kind, pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=kind)))
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind, _ in columns], metadata=metadata)
    table = pa.table([values for *_, values in columns], schema=schema)
    buffer = io.BytesIO()
    # Vectors do not compress, and text is small beside them.
    pq.write_table(table, buffer, compression="none", use_dictionary=False, write_page_checksum=True)
    try:
        atomic_write(path, buffer.getvalue())
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"folder {folder} cannot be written", rule=error.strerror or str(error),
                     remedy="free some space or name another folder with --out; finished blocks stay")  # fmt: skip


@dataclass(frozen=True)
class EmbeddingSettings:
    """Say which images are embedded, and where the embeddings go.

    Raises:
        UserError: a value breaks its rule.

    Example:
        >>> EmbeddingSettings(data="my-images", output_dir=Path("vectors")).block
        2048
    """

    # fmt: off
    data: str = option(REQUIRED, "folder (with metadata.jsonl or .csv, or of images alone), parquet file, tar shards, or hub dataset", positional=True, metavar="DATA")
    output_dir: Path = option(REQUIRED, "folder for the embeddings; interrupted runs resume", alias="out")
    dtype: Dtype = option("float32", "precision of the embeddings")
    block: int = option(2048, "images per file", low=1)
    max_samples: int | None = option(None, "the first that many rows", low=1)
    # fmt: on

    def __post_init__(self) -> None:
        check(self)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(prog="python -m ambient_sd.audit.embedding", description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    for owner in (EmbeddingSettings, FeatureOptions, DatasetOptions):
        add_flags(parser, owner)
    args = parser.parse_args(argv)
    settings, rows = from_flags(EmbeddingSettings, args), from_flags(DatasetOptions, args)

    names, files = from_flags(FeatureOptions, args).chosen()
    images = load_set(settings.data, max_samples=settings.max_samples, **reading(rows))
    from accelerate import PartialState

    state = PartialState()
    left = [f"{images.unlisted} files in {images.source} are left out"] if images.unlisted else []
    for note in [*images.notes, *left] if state.is_main_process else ():
        print(note, flush=True)
    features = choose(names, files, state.device)
    folders = embed_set(
        images, features, settings.output_dir, dtype=settings.dtype, block=settings.block, state=state, progress=True
    )
    if state.is_main_process:
        for folder in folders:
            store = EmbeddingStore.open(folder)
            print(f"{store.about.feature}: {len(store)} x {store.dim} {store.about.dtype} in {folder}", flush=True)
    if state.num_processes > 1:
        state.destroy_process_group()


if __name__ == "__main__":
    main()
