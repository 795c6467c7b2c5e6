"""What a process says when another one of its run has died.

Gloo and NCCL notice a closed connection and raise; the launcher ends what is left on its machine. Neither says what to do. A
process that hangs without dying is noticed by torch's time limit only (10 minutes under NCCL, 30 under gloo): it must be
longer than the first process needs to write a checkpoint while the others wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ambient_sd.utils.errors import UserError

_SIGNS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "ncclSystemError",
    "remote process exited",
)


@contextlib.contextmanager
def report_peer_failure() -> Iterator[None]:
    """Turn the error that the death of another process raises here into one line that says how to go on.

    Raises:
        UserError: another process of the run has died.
    """
    try:
        yield
    except RuntimeError as error:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not several or not any(sign in str(error) for sign in _SIGNS):
            raise
        raise UserError(
            f"process {torch.distributed.get_rank()} has lost another process of this run, and ends",
            rule=str(error)[:200],
            remedy="the other's own message, or its machine, says why; then go on with --resume_from_checkpoint latest",
        ) from error
