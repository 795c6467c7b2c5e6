"""How a training begins, ends, is interrupted, and treats a folder in which another one has ended."""

from __future__ import annotations

import ast
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from ambient_sd.reporting import model_card
from ambient_sd.training import RunRecord, TrainConfig, checkpoints, processes, run
from ambient_sd.utils.errors import Interrupted, UserError, exits_on_user_error

ROOT = Path(__file__).parents[2]
UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
Settings = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def settings(tiny_base: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    root = tmp_path_factory.mktemp("manners")

    def make(name: str, **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 4, "max_train_steps": 1, "report_to": "none", "output_dir": str(root / name),
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


@pytest.fixture(scope="module")
def finished(settings: Settings) -> RunRecord:
    """A finished LoRA of one step, without checkpoints, and with a file of the user's beside it."""
    record = run(settings("finished", lora=True), progress=False)
    model_card.write_run_card(record)
    (record.output / "notes.txt").write_text("mine")
    return record


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# The start


def test_start_names_images_loss_and_weights(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ambient_sd")
    run(settings("start", lora=True, gradient_accumulation_steps=2), progress=False)
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("images ")]
    rows = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert rows["images"].startswith("8 at 32 px")
    assert rows["objective"] == "ambient, noise level s_n = 1, v_prediction"
    assert rows["batch"] == "4 x 2 accumulated x 1 process = 8 samples a step"
    assert rows["steps"] == "1, about 1 epochs"
    assert rows["trained"] == "LoRA of rank 4, 4,992 parameters"
    assert rows["device"] == "cpu, float32"
    assert len({len(line) - len(line.split(maxsplit=1)[1]) for line in said.splitlines()}) == 1, "aligned"


# Interruptions


def checkpoint(folder: Path, step: int) -> Path:
    """A whole checkpoint of nothing."""
    optimizer = {"state": {}, "param_groups": []}
    return checkpoints.save(
        folder, step, write_weights=lambda _: None, optimizer=optimizer, state={"identity": {}}, limit=None
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_names_newest_whole_checkpoint(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_text_to_image_ambient.py", "--hub_token", "secret"])
    config = settings("interrupted", output_dir=str(tmp_path / "a folder"))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, processes.interruptible(config):
        checkpoint(tmp_path / "a folder", 2)
        (checkpoint(tmp_path / "a folder", 4) / "trainer_state.json").unlink()
        os.kill(os.getpid(), number)
        time.sleep(5)
    folder = tmp_path / "a folder"
    assert str(caught.value) == (
        f"interrupted; the newest checkpoint is {folder}/checkpoint-2; resume with: python train_text_to_image_ambient.py "
        f"--config '{folder}/train_config.yaml' --resume_from_checkpoint latest"
    )
    assert caught.value.status == status
    assert signal.getsignal(number) is before


def test_interruption_without_a_checkpoint_promises_none(settings: Settings, tmp_path: Path) -> None:
    checkpoint(tmp_path / "old", 2)
    os.utime(tmp_path / "old" / "checkpoint-2", (0, 0))  # of the run that is being overwritten
    config = settings("early", output_dir=str(tmp_path / "old"), overwrite=True)
    with pytest.raises(Interrupted, match="before the first checkpoint"), processes.interruptible(config):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_only_the_first_process_speaks(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Interrupted) as caught, processes.interruptible(settings("second")):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert str(caught.value) == ""


def test_command_ends_on_one_line_and_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    for error, line, status in (
        (Interrupted("resume with this", status=143), "ambient-sd: resume with this\n", 143),
        (Interrupted(""), "", 130),
        (KeyboardInterrupt(), "ambient-sd: interrupted\n", 130),
    ):

        @exits_on_user_error
        def main(error: BaseException = error) -> None:
            raise error

        with pytest.raises(SystemExit) as left:
            main()
        assert (capsys.readouterr().err, left.value.code) == (line, status)


def test_interrupted_run_resumes_by_its_own_command(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2, "lora": True}
    straight = run(settings("straight", **values), progress=False)
    monkeypatch.setattr(sys, "argv", ["train_text_to_image_ambient.py"])

    def press(step: int, _: dict[str, float]) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    config = settings("pressed", **values)
    with pytest.raises(Interrupted, match="checkpoint-2; resume with: ") as caught:
        run(config, progress=False, on_step=press)
    from ambient_sd.training.config import parse

    words = str(caught.value).partition("train_text_to_image_ambient.py ")[2].split()
    rest = run(parse(words), progress=False)
    assert (rest.first_step, rest.losses) == (2, straight.losses)
    assert (straight.output / LORA).read_bytes() == (rest.output / LORA).read_bytes()


@pytest.mark.slow
def test_ctrl_c_under_a_launcher_prints_our_line_once(settings: Settings, tmp_path: Path) -> None:
    config = settings("launched", output_dir=str(tmp_path / "out"))
    names = (
        "pretrained_model_name_or_path",
        "train_data_dir",
        "resolution",
        "train_batch_size",
        "report_to",
        "output_dir",
    )
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    job = subprocess.Popen(
        [*launch, "train_text_to_image_ambient.py", *(f"--{n}={getattr(config, n)}" for n in names), "--max_train_steps=100000",
         "--checkpointing_steps=2", "--checkpoints_total_limit=1"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        until = time.monotonic() + 200
        while not list((tmp_path / "out").glob("checkpoint-*")) and time.monotonic() < until and job.poll() is None:
            time.sleep(0.2)
        os.killpg(job.pid, signal.SIGINT)
        said = job.communicate(timeout=120)[1]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert said.count("ambient-sd: interrupted; the newest checkpoint is ") == 1
    assert f"--config {tmp_path}/out/train_config.yaml --resume_from_checkpoint latest" in said
    assert "accelerate.commands.launch --multi_gpu --num_processes 2" in said
    assert "ambient_sd/training/" not in said, "no traceback of ours"


# Folders


def test_finished_training_is_not_overwritten(settings: Settings, finished: RunRecord) -> None:
    before = contents(finished.output)
    with pytest.raises(UserError, match=rf"holds a finished training: {LORA}.*--overwrite") as caught:
        run(settings("finished"), progress=False)
    assert "\n" not in str(caught.value)
    assert contents(finished.output) == before


def test_overwriting_replaces_only_what_is_ours(settings: Settings, finished: RunRecord) -> None:
    checkpoint(finished.output, 7)
    for name in ("validation/step-9.png", "probe/step-9.png", "probe.jsonl"):
        (finished.output / name).parent.mkdir(exist_ok=True)
        (finished.output / name).write_text("old")
    record = run(settings("finished", overwrite=True), progress=False)
    kept = contents(record.output)
    assert kept["notes.txt"] == b"mine"
    assert not {LORA, "validation/step-9.png", "probe/step-9.png", "probe.jsonl"} & kept.keys()
    assert checkpoints.find_all(record.output) == []
    assert "overwrite" not in kept["train_config.yaml"].decode()
    assert len(kept["losses.jsonl"].splitlines()) == 1
    pipe = StableDiffusionPipeline.from_pretrained(record.output)
    assert pipe.unet.state_dict().keys() == load_file(record.output / UNET).keys()


def test_overwriting_spares_a_model_that_no_training_wrote(settings: Settings, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes((tiny_base / "model_index.json").read_bytes())
    with pytest.raises(UserError, match="this is something else"):
        run(settings("other", output_dir=str(tmp_path), overwrite=True), progress=False)


def test_overwriting_and_resuming_exclude_each_other(settings: Settings) -> None:
    with pytest.raises(UserError, match="overwrite and resume_from_checkpoint"):
        settings("both", overwrite=True, resume_from_checkpoint="latest")


def test_failing_card_leaves_the_result(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no\nroom")

    record = run(settings("cardless", lora=True), progress=False)
    monkeypatch.setattr(model_card, "describe_run", fail)
    model_card.write_run_card(record)
    assert f"no model card: no room; the results in {record.output} are whole" in caplog.text
    assert (record.output / LORA).is_file() and not (record.output / "README.md").exists()


# The floors


def test_training_imports_nothing_from_above() -> None:
    for path in (ROOT / "ambient_sd" / "training").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            above = [
                n for n in names if n.startswith(("ambient_sd.reporting", "ambient_sd.commands", "ambient_sd.cli"))
            ]
            assert not above, f"{path.name} imports {above}"


def test_record_describes_the_run(finished: RunRecord) -> None:
    first, second, last = finished.describe().splitlines()
    assert first.startswith("1 steps in ") and "8 images" in first
    assert second.startswith(f"loss {finished.loss:.4f}")
    assert last == f"results in {finished.output}"
    facts = json.loads((finished.output / "card.json").read_text())
    assert (facts["steps"], facts["batch"], facts["images"]) == (1, 4, 8)
