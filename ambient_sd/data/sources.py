"""Images and captions from a source of any layout (`ambient_sd.data.layouts`), checked before use.

An image's `key` is the SHA-256 of its decoded RGB content, size included. Whatever is fixed per image (its noise,
its VAE sample, its view) follows from the key, so a copy under another name or in another lossless format shares all of it.

It does not resize or encode anything; near-duplicates are found by `ambient_sd.data.duplicates`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ambient_sd.data import layouts
from ambient_sd.data.dataset_options import AUTO, UNLISTED
from ambient_sd.data.duplicates import Group, Thumbnails, find_groups, noise_keys
from ambient_sd.data.images import FRAMES, Undecodable, content_key, decode
from ambient_sd.data.layouts.layout import (
    HELDOUT,
    REGULARISATION,
    TRAINING,
    Ask,
    Fault,
    Picked,
    Request,
    Table,
    phrase,
    refuse_unlisted,
    with_trigger,
)
from ambient_sd.utils.errors import UserError, first_of

ROLES = (TRAINING, REGULARISATION, HELDOUT)


@dataclass(frozen=True)
class ImageRow:
    """Hold one decoded image.

    Attributes:
        image: RGB image, upright (EXIF orientation applied), transparency laid on white.
        caption: its caption, possibly empty.
        key: `content_key(image)`.
        name: file name or row, for messages.
        noise_key: key of what is fixed for it and its near-duplicates; empty means `key`.
        mirrored: it is the mirror image of the image that `noise_key` belongs to.

    Example:
        >>> image = Image.new("RGB", (8, 8))
        >>> ImageRow(image, "a black square", content_key(image), "a.png").mirrored
        False
    """

    image: Image.Image
    caption: str
    key: str
    name: str
    noise_key: str = ""
    mirrored: bool = False


class ImageDataset(Sequence[ImageRow]):
    """Hold rows of images and captions; an image is decoded anew at each access.

    Args:
        images: per row the encoded bytes, or the path of the file.
        captions: per row the caption.
        names: per row a name for messages.
        source: where the rows come from, for messages.
        more_captions: per row the captions after its first one; none of any if not given.
        rows: per row its plain columns, for `column`.
        repeats: how often an epoch of training holds each row; once if not given.

    Attributes:
        unlisted: number of files in the folder that hold or may hold images and were left out on request.
        animated: names of the rows with more than one frame, of which the first is the image; known after `check`.
        skipped: files that were left out on request, because they are missing or do not decode.
        regularisation: rows of the source that are no training images but keep a class as it was; None if there are none.
        heldout: rows that the source sets apart for validation; None if there are none.
        notes: what a user should know of how the source was read, a line each.
        asks: what the source asks of a training beside its images.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> atomic = (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red square"}')
        >>> rows = load_rows(folder).check()
        >>> len(rows), rows[0].caption, rows.images[0].size
        (1, 'a red square', (8, 8))
    """

    def __init__(
        self,
        images: Sequence[bytes | Path],
        captions: Sequence[str],
        names: Sequence[str],
        source: str,
        more_captions: Sequence[Sequence[str]] = (),
        rows: Sequence[Mapping[str, Any]] = (),
        repeats: Sequence[int] = (),
    ) -> None:
        self._rows = rows
        self.repeats = list(repeats) or [1] * len(captions)
        self.more_captions = [tuple(more) for more in more_captions] or [()] * len(captions)
        self._images, self.captions, self.names, self.source = images, list(captions), list(names), source
        self.keys: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.noise_keys: list[str] = []
        self.mirrored: list[bool] = []
        self.groups: list[Group] = []
        self.unlisted = 0
        self.animated: list[str] = []
        self.skipped: list[Fault] = []
        self.regularisation: ImageDataset | None = None
        self.heldout: ImageDataset | None = None
        self.notes: list[str] = []
        self.asks: tuple[Ask, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> ImageRow:  # type: ignore[override]  # slices have no use here
        try:
            image = decode(self._images[index])
        except Undecodable as error:
            raise UserError(f"{self.names[index]} in {self.source} cannot be read", rule=str(error)) from None
        key = content_key(image)
        shared = (self.noise_keys[index], self.mirrored[index]) if self.noise_keys else (key, False)
        return ImageRow(image, self.captions[index], key, self.names[index], *shared)

    @property
    def images(self) -> Sequence[Image.Image]:
        """Return the images alone, each decoded when it is asked for; of a checked dataset one that has changed since is refused."""
        return Picked(self._same_image, range(len(self)))

    def _same_image(self, index: int) -> Image.Image:
        row = self[index]
        if self.keys and row.key != self.keys[index]:
            raise UserError(f"{row.name} in {self.source} is not the image that it was", remedy="leave the images alone while they are used")  # fmt: skip
        return row.image

    def subset(self, indices: Sequence[int]) -> ImageDataset:
        """Return the rows `indices` in that order, unchecked."""
        rows = list(indices)
        captions, names = [self.captions[i] for i in rows], [self.names[i] for i in rows]
        more = [self.more_captions[i] for i in rows]
        plain = Picked(self._rows.__getitem__, rows) if len(self._rows) else ()
        repeats = [self.repeats[i] for i in rows]
        return ImageDataset(Picked(self._images.__getitem__, rows), captions, names, self.source, more, plain, repeats)

    def column(self, name: str) -> list[str]:
        """Return a column's values as texts, an empty one where a row has none.

        Raises:
            UserError: no row has such a column.
        """
        rows = [self._rows[i] for i in range(len(self._rows))]
        if not any(name in row for row in rows):
            known = sorted({key for row in rows for key in row})
            raise UserError(f"{self.source} has no column {name!r}", rule=f"its columns are {', '.join(known) or 'none'}",
                            remedy="check the spelling")  # fmt: skip
        return ["" if row.get(name) is None else str(row[name]) for row in rows]

    def one_of_each(self, rows: Sequence[int] | None = None) -> list[int]:
        """Return of each group of duplicates (`noise_keys` where there are any, else `keys`) the first of `rows`, or of all.

        Two copies are equally near to an image: d1 / d2 would be 1.
        """
        groups = self.noise_keys or self.keys
        rows = range(len(self)) if rows is None else rows
        return list({groups[i]: i for i in reversed(rows)}.values())[::-1]

    def captions_of(self, index: int) -> list[str]:
        """Return all captions of a row, its first one first."""
        return [self.captions[index], *self.more_captions[index]]

    @property
    def all_captions(self) -> list[str]:
        """Return the captions of all rows, in their order."""
        return [caption for i in range(len(self)) for caption in self.captions_of(i)]

    def check(self, progress: bool = False, near_duplicates: bool = False) -> ImageDataset:
        """Decode every image once and record `keys` and `sizes`; return self.

        With `near_duplicates` their `groups` are found, and `noise_keys` and `mirrored` follow them; otherwise
        `noise_keys` are `keys`.

        Training calls this before any model loads: a broken file found in hour three would cost the three hours.

        Raises:
            UserError: images cannot be decoded; the first ones are named.
        """
        keys, sizes, broken, thumbnails = [], [], [], Thumbnails()
        animated: list[str] = []
        for i in tqdm(range(len(self)), desc="checking images", disable=not progress, leave=False):
            try:
                image = decode(self._images[i])
            except Undecodable as error:
                broken.append(f"{self.names[i]} ({error})")
                continue
            keys.append(content_key(image))
            sizes.append(image.size)
            if image.info.get(FRAMES):
                animated.append(self.names[i])
            if near_duplicates:
                thumbnails.add(image)
        if broken:
            raise UserError(
                f"{len(broken)} of {len(self)} images in {self.source} cannot be read: {first_of(broken)}",
                rule="every image must decode",
                remedy="replace the files or remove their rows",
            )
        self.animated = animated
        return self.known(keys, sizes, find_groups(keys, thumbnails) if near_duplicates else [])

    def known(self, keys: Sequence[str], sizes: Sequence[tuple[int, int]], groups: Sequence[Group]) -> ImageDataset:
        """Record what `check` finds, found elsewhere: keys and sizes per row, groups of duplicates; return self."""
        self.keys, self.sizes, self.groups = list(keys), list(sizes), list(groups)
        self.noise_keys, self.mirrored = noise_keys(self.keys, self.groups)
        return self

    def fingerprint(self) -> str:
        """Return a SHA-256 over keys and captions in their order, and repeats other than one, running `check` if nothing has."""
        if not self.keys:
            self.check()
        digest = hashlib.sha256()
        for key, caption, more, repeats in zip(self.keys, self.captions, self.more_captions, self.repeats, strict=True):
            digest.update(f"{key} {len(caption)} {caption}\n".encode("utf-8", "surrogatepass"))
            for other in more:
                digest.update(f"+ {len(other)} {other}\n".encode("utf-8", "surrogatepass"))
            if repeats != 1:
                digest.update(f"x {repeats}\n".encode())
        return digest.hexdigest()


def load_rows(
    source: str | Path,
    image_column: str = "image",
    caption_column: str = "text",
    split: str | None = None,
    max_samples: int | None = None,
    seed: int | None = None,
    *,
    row_filter: Sequence[tuple[str, str, str]] = (),
    config_name: str | None = None,
    cache_dir: str | None = None,
    local: bool = False,
    several_captions: bool = False,
    need_captions: bool = True,
    unlisted: str = "refuse",
    layout: str = AUTO,
    caption_extension: str | None = None,
    instance_prompt: str | None = None,
    trigger_word: str | None = None,
    skip_broken: bool = False,
    faults: list[Fault] | None = None,
) -> ImageDataset:
    """Open a source of images and captions.

    Args:
        source: folder, file, pattern or hub dataset id, in any layout of `ambient_sd.data.layouts`.
        image_column: column of the images: bytes, or a struct of bytes and path; a folder uses file_name instead.
        caption_column: column of the captions, one text per row.
        split: of a hub dataset (default train); of a local source the value of its column `split`.
        max_samples: keep at most that many rows.
        seed: draws which rows `max_samples` keeps; the first ones if not given.
        row_filter: (column, operator, value) conditions, operator one of = <= >=; rows must meet all of them.
        config_name: configuration of a hub dataset.
        cache_dir: where hub downloads are kept.
        local: `source` is a path whatever its form: a mistyped folder is then not searched on the hub.
        need_captions: without, a row that has none gets an empty one, and a folder without a list is all images in it.
        several_captions: a row's caption may be a list of texts too; its first one is the caption where one is asked for.
        unlisted: what to do with images in a local folder that would not be read (`ambient_sd.data.walk`): not in its list,
            of an unsupported kind, hidden, or perhaps in an archive. "refuse", or "ignore": they are left out, and
            `ImageDataset.unlisted` counts them.
        layout: how images and captions are kept, one of `LAYOUT_NAMES`; auto: the first layout that recognizes the source.
        caption_extension: ending of caption files.
        instance_prompt: caption of a row that has none.
        trigger_word: put before each caption that lacks it, and in place of [trigger].
        skip_broken: leave out what is missing or does not decode; `ImageDataset.skipped` names it. Each image is decoded once more.
        faults: collects the faults of single rows, which are then left out (a row without caption stays, with an empty
            one); without it the first fault raises.

    Returns:
        The rows, images not yet decoded (`ImageDataset.check` does that).

    Raises:
        UserError: the source does not exist, has no images, lacks a column or a file, or no row is left; images in it
            would be left out, or lie behind a link that cannot be followed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> atomic = (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red square"}')
        >>> load_rows(folder).captions
        ['a red square']
    """
    if unlisted not in UNLISTED:
        raise UserError(f"unlisted is {unlisted!r}", rule=f"it must be {' or '.join(UNLISTED)}")
    request = Request(
        str(source), image_column, caption_column, need_captions, split, config_name, cache_dir, caption_extension,
        instance_prompt, skip_broken, layout != AUTO, faults,
    )  # fmt: skip
    table = layouts.read(request, layout, local=local)
    by_split = [("split", "=", split)] if split is not None and not table.split_done else []
    conditions = by_split + list(row_filter)
    kept = [i for i in range(len(table.rows)) if _meets(table, i, conditions)]
    roles = table.roles or [TRAINING] * len(table.rows)
    by_role = {role: [i for i in kept if roles[i] == role] for role in ROLES}
    kept = by_role[TRAINING]
    if not kept and not faults:
        text = " and ".join("".join(c) for c in conditions)
        raise UserError(
            f"{source} has no row" + (f" with {text}" if text else "s"), rule="at least one image is needed"
        )
    if max_samples is not None and max_samples < len(kept):
        chosen = kept[:max_samples] if seed is None else random.Random(seed).sample(kept, max_samples)
        kept = sorted(chosen)
    skipped: list[Fault] = []
    by_role[TRAINING] = kept
    if skip_broken and faults is None:
        by_role = {role: _decodable(table, rows, skipped) for role, rows in by_role.items()}

    def dataset(rows: Sequence[int]) -> ImageDataset:
        captions = [_captions(table, i, request, several_captions, trigger_word) for i in rows]
        return ImageDataset(
            Picked(table.image, rows), [c[0] for c in captions], [table.name(i) for i in rows], str(source),
            [c[1:] for c in captions], Picked(table.rows.__getitem__, rows), [table.repeats[i] for i in rows] if table.repeats else (),
        )  # fmt: skip

    found = dataset(by_role[TRAINING])
    # Last: a wrong row of the list is the nearer reason.
    if table.left and unlisted != "ignore":
        if faults is None:
            raise refuse_unlisted(request.path, table.left)
        faults.extend(Fault(name, "unlisted", f"it is {phrase(why)}") for name, why in table.left.items())
    found.unlisted, found.skipped, found.asks, found.notes = len(table.left), skipped, table.asks, list(table.notes)
    if skipped:
        names = first_of([fault.name for fault in skipped])
        found.notes.append(f"{len(skipped)} images are skipped, for they do not decode: {names}")
    found.regularisation, found.heldout = (
        dataset(by_role[role]) if by_role[role] else None for role in (REGULARISATION, HELDOUT)
    )
    return found


def _decodable(table: Table, rows: Sequence[int], skipped: list[Fault]) -> list[int]:
    """Return the rows whose images decode, and tell `skipped` of the others.

    Raises:
        UserError: none does.
    """
    kept = []
    for i in tqdm(rows, desc="looking for broken images", leave=False, delay=2):
        try:
            decode(table.image(i))
        except Undecodable as error:
            skipped.append(Fault(table.name(i), "broken", str(error)))
        else:
            kept.append(i)
    if rows and not kept:
        raise UserError(
            f"no image of {table.source} can be read: {skipped[0].name} ({skipped[0].text})",
            rule="at least one is needed",
        )
    return kept


def _captions(table: Table, index: int, request: Request, several: bool, trigger: str | None) -> list[str]:
    """Return the captions of a row, at least one."""
    column, given = request.caption_column, table.rows[index].get(request.caption_column)
    if given is None and request.instance_prompt is not None:
        given = request.instance_prompt
    captions = list(given) if several and isinstance(given, list) and given else [given]
    if not request.need_captions:
        captions = [captions[0] if isinstance(captions[0], str) else ""]
    rule, remedy = "", "write one, or an empty text for an image without caption"
    for caption in captions:
        if not isinstance(caption, str):
            rule = table.no_caption if caption is None else ""
            rule = rule or f"column {column!r} must hold a text there, not {type(caption).__name__}"
            if isinstance(caption, list) and caption and not several:
                remedy += "; --caption_mitigation mc takes a list of them"
        elif any("\ud800" <= c <= "\udfff" for c in caption) and request.need_captions:  # no tokenizer takes it
            rule = f"column {column!r} holds half a character (a lone surrogate) there"
    if rule:
        if request.faults is None:
            raise UserError(f"{table.name(index)} in {table.source} has no caption", rule=rule, remedy=remedy)
        request.faults.append(Fault(table.name(index), "captionless", rule))
        captions = [""]
    return [with_trigger(str(caption), trigger) if trigger else str(caption) for caption in captions]


def _meets(table: Table, index: int, conditions: Sequence[tuple[str, str, str]]) -> bool:
    row = table.rows[index] if conditions else {}
    for column, operator, wanted in conditions:
        if column not in row:
            raise UserError(
                f"{table.name(index)} of {table.source} has no column {column!r} to choose rows by",
                rule=f"its columns are {', '.join(map(str, row))}",
                remedy="correct the split or row filter",
            )
        have = row[column]
        if operator == "=":
            # The value comes from a command line: compare as the cell would be written there.
            if (str(have).lower() if isinstance(have, bool) else str(have)) != (
                wanted.lower() if isinstance(have, bool) else wanted
            ):
                return False
            continue
        try:
            if have is None or not (float(have) <= float(wanted) if operator == "<=" else float(have) >= float(wanted)):
                return False
        except (TypeError, ValueError):
            raise UserError(
                f"row filter {column}{operator}{wanted} compares {have!r}", rule=f"{operator} needs numbers"
            ) from None
    return True
