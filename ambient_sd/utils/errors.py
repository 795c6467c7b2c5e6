"""One kind of error for every mistake that a user can make, and one way to end a command on it.

A message is one line: what is wrong, where, the rule that it breaks, and the remedy. A command prints that line to
stderr and exits with status 2, before anything expensive starts; any other exception is a bug and keeps its
traceback.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


class UserError(ValueError):
    """Raise for a mistake of the user's: `what` went wrong, `where`, which `rule` it breaks, and the `remedy`.

    Example:
        >>> print(UserError("level is -1", rule="it must be at least 0", remedy="leave it out"))
        level is -1; it must be at least 0; leave it out
    """

    def __init__(self, what: str, *, rule: str = "", remedy: str = "") -> None:
        # Values that come from files may hold line breaks or control characters: the promise is ONE line. A value without
        # end must not push rule and remedy out of it; a remedy may be a whole command.
        parts = [one_line(what, 340), one_line(rule, 240), one_line(remedy, 400)]
        super().__init__("; ".join(part for part in parts if part))


class Interrupted(KeyboardInterrupt):
    """Raise where Ctrl-C, or another signal, ends work that can be continued: one line on how, and the exit status.

    Args:
        text: what is kept and how to go on; a process that has nothing to add gives none.
        status: 128 and the signal's number; 130 for Ctrl-C.

    Example:
        >>> Interrupted("the images are kept; the same command resumes").status
        130
    """

    def __init__(self, text: str, *, status: int = 130) -> None:
        super().__init__(text)
        self.status = status


def one_line(text: object, limit: int = 600) -> str:
    """Return `text` on one line: control characters become spaces, and more than `limit` characters are cut.

    Example:
        >>> one_line("a text\tof two parts", limit=15)
        'a text of two …'
    """
    flat = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def first_of(names: Sequence[str], shown: int = 3) -> str:
    """Return the first names, and how many more there are.

    Example:
        >>> first_of(["a.png", "b.png", "c.png", "d.png"])
        'a.png, b.png, c.png and 1 more'
    """
    more = len(names) - shown
    return ", ".join(one_line(name, 120) for name in names[:shown]) + (f" and {more} more" if more > 0 else "")


def require_guidance(scale: float) -> None:
    """Raise a `UserError` unless a guidance scale is finite and above 1: where guidance is off nothing can be measured.

    Example:
        >>> try:
        ...     require_guidance(1.0)
        ... except UserError as error:
        ...     print(str(error).split(";")[0])
        guidance_scale is 1.0
    """
    if not 1 < scale < math.inf:
        raise UserError(
            f"guidance_scale is {scale}", rule="the guard measures guidance", remedy="give a finite scale above 1"
        )


def exits_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command's `main`: a mistake prints one line to stderr and exits with status 2, Ctrl-C with status 130.

    Under a launcher every process meets the same mistake, and one line is enough. The launcher stops the others as soon as one
    has ended, so they let the first one speak; what only they have met they still say, a little later.

    Example:
        >>> @exits_on_user_error
        ... def main(count):
        ...     return count + 1
        >>> main(1)
        2
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("RANK", "0") != "0":
                time.sleep(10)
            print(f"ambient-sd: error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt as error:
            line, status = (str(error), error.status) if isinstance(error, Interrupted) else ("interrupted", 130)
            if line:
                print(f"ambient-sd: {line}", file=sys.stderr, flush=True)
            sys.exit(status)

    return wrapper
