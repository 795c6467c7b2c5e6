"""The page of `ambient-sd inspect`: what is wrong with an image dataset, and its duplicates as images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ambient_sd.reporting import pages
from ambient_sd.reporting.sheets import data_uri

_GROUPS, _IMAGES, _SIDE = 300, 12, 128  # what a page shows at most; JSON has all


class Found(Protocol):
    """Say what the page needs of an inspection."""

    @property
    def source(self) -> str: ...
    @property
    def resolution(self) -> int: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def captions(self) -> Sequence[str]: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def sizes(self) -> Sequence[tuple[int, int]]: ...
    @property
    def faults(self) -> Sequence[Any]: ...
    @property
    def groups(self) -> Sequence[Any]: ...


def write(path: Path, found: Found, images: Any, counts: Sequence[tuple[str, int, str]]) -> Path:
    """Write the page of an inspection.

    Args:
        path: of the page.
        found: what was found.
        images: the readable images, in the rows of `found.names`.
        counts: (kind, how many, what it means) of each kind of fault.
    """
    name = Path(found.source).name or found.source
    groups = []
    for group in found.groups[:_GROUPS]:
        tiles = [
            {"uri": data_uri(images[i].image, _SIDE), "name": found.names[i], "caption": found.captions[i],
             "note": f"{found.sizes[i][0]} x {found.sizes[i][1]}{', mirrored' if mirrored else ''}"}
            for i, mirrored in list(zip(group.rows, group.mirrored, strict=True))[:_IMAGES]
        ]  # fmt: skip
        exact = len({found.keys[i] for i in group.rows}) == 1
        groups.append({"title": f"{len(group.rows)} {'exact copies' if exact else 'near-duplicates'}", "tiles": tiles,
                       "hidden": max(0, len(group.rows) - _IMAGES)})  # fmt: skip
    return pages.write(
        path, "inspect.html.j2", title=f"Images of {name}", answer=_answer(found),
        lead=f"The sizes were compared with a training resolution of {found.resolution} px.", groups=groups,
        hidden_groups=max(0, len(found.groups) - _GROUPS),
        counts=pages.Table(["kind", "rows", "what it means"], [(kind, n, meaning) for kind, n, meaning in counts], text=(2,)),
        faults=pages.Table(["kind", "row", "what is wrong"], [(f.kind, f.name, f.text) for f in found.faults], text=(1, 2)),
        next=_next(found, name), made={"ambient-sd inspect": name, "resolution": f"{found.resolution} px"},
    )  # fmt: skip


def _answer(found: Found) -> str:
    n = len(found.names)
    broken = sum(fault.kind in ("broken", "unlisted") for fault in found.faults)
    if broken:
        return f"{broken} {_rows(broken)} must be mended or removed: training refuses the dataset until then. {n} images can be read."
    parts = []
    if found.faults:
        parts.append(f"{len(found.faults)} {_rows(len(found.faults))} to look at")
    if found.groups:
        parts.append(f"{len(found.groups)} group{'s' * (len(found.groups) != 1)} of duplicates")
    return (
        f"All {n} images can be used; there are {' and '.join(parts)}."
        if parts
        else f"Nothing is wrong with these {n} images."
    )


def _rows(n: int) -> str:
    return "row" if n == 1 else "rows"


def _next(found: Found, name: str) -> list[pages.Next]:
    look = pages.command("ambient-sd", "inspect", name, "--resolution", found.resolution, "--html", "inspect.html")
    level = pages.command("ambient-sd", "level", name, "--model", "MODEL", "--resolution", found.resolution)
    return [
        *([pages.Next("Mend or remove the rows with faults, then look again:", look)] if found.faults else []),
        pages.Next(
            "See which noise level s_n these images propose; MODEL is the base that you want to fine-tune:", level
        ),
    ]
