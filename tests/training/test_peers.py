"""Two processes of a run: one that falls silent, fails, or is missed ends the other in one line; one that only is done does not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# One process a case and rank, forked: what is imported is imported once. Prints what the one that stays said and its exit status.
FORKED = """
import json, os, signal, socket, sys, threading, time
import torch
from torch import distributed
from ambient_sd.training import processes
from ambient_sd.utils.errors import exits_on_user_error

processes._BEAT, processes._SILENT, processes._GRACE, processes._MISSED = 0.2, 4.0, 2.0, 4.0
distributed.distributed_c10d._get_default_store  # loaded before the fork


def watched(case):
    return int(case == "frozen")  # there the first one, which holds what they met through


def leave(case):
    if case in ("silent", "frozen"):
        os.kill(os.getpid(), signal.SIGSTOP)
    elif case == "failed":
        raise KeyError("its own")
    elif case == "missed":
        time.sleep(600)


@exits_on_user_error
def train(case, rank):
    distributed.init_process_group("gloo")
    with processes.report_peer_failure():
        distributed.all_reduce(torch.ones(1))
        if rank != watched(case):
            leave(case)
        distributed.barrier()
        if case == "done" and not rank:
            time.sleep(6)  # longer than silence may last
    if case == "done" and not rank:
        print("trained", file=sys.stderr)


def start(case, port, rank, log):
    if (child := os.fork()) == 0:
        os.dup2(log, 2)
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = 1
        try:
            train(case, rank)
            code = 0
        except SystemExit as left:
            code = left.code
        except KeyError:
            time.sleep(600)  # its connections stay open
        finally:
            os._exit(code)
    return child


running = {}
for case in sys.argv[1:]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = os.memfd_create(case)
    running[case] = [start(case, port, rank, log if rank == watched(case) else os.open(os.devnull, os.O_WRONLY)) for rank in (0, 1)], log
said = {}
for case, (children, log) in running.items():
    other = children.pop(1 - watched(case))
    code = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    said[case] = [code, os.pread(log, 10000, 0).decode()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    script = tmp_path_factory.mktemp("peers") / "forked.py"
    script.write_text(FORKED)
    cases = ["silent", "failed", "missed", "frozen", "done"]
    done = subprocess.run([sys.executable, script, *cases], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return {case: (code, text) for case, (code, text) in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        ("silent", "process 0 has lost another process of this run, and ends; process 1 was last heard of 4 s ago"),
        ("failed", "process 0 has lost another process of this run, and ends; process 1 has failed"),
        ("missed", "process 0 has lost another process of this run, and ends; process 1 has been waited for for 0.0666667 minutes"),
        ("frozen", "process 1 has lost another process of this run, and ends; the first process or its machine cannot be reached"),
    ],
)  # fmt: skip
def test_a_peer_that_is_lost_ends_this_process(said: dict[str, tuple[int, str]], case: str, rule: str) -> None:
    code, text = said[case]
    assert code == 2
    assert text.startswith(f"ambient-sd: error: {rule}"), text
    assert text.rstrip().endswith("resume with --resume_from_checkpoint latest") and len(text.splitlines()) == 1


def test_a_peer_that_is_done_ends_nobody(said: dict[str, tuple[int, str]]) -> None:
    assert said["done"] == (0, "trained\n")
