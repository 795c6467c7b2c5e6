"""Pushing to a hub: what goes, what stays, and how it fails; the training command and `ambient-sd push` against tests/hub_server.py."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_flow
import torch
import yaml
from diffusers import Flux2KleinPipeline
from hub_server import TOKEN, HubServer, reach
from PIL import Image

from ambient_sd.cli import main

ROOT = Path(__file__).parents[2]


class Here:
    """A command in this process, sent to a hub of its own: exit status, output and errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> None:
        self.patch, self.capsys, self.home = monkeypatch, capsys, home
        monkeypatch.chdir(home)

    def call(self, hub: str, work: Callable[[], object], token: str = "") -> subprocess.CompletedProcess[str]:
        reach(self.patch, hub, self.home, token)
        status = 0
        try:
            work()
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        return subprocess.CompletedProcess([], status, *self.capsys.readouterr())

    def run(self, hub: str, code: str) -> subprocess.CompletedProcess[str]:
        return self.call(hub, lambda: exec(code, {}))

    def train(
        self, hub: str, base: str | Path, images: Path, out: Path, token: str, *more: str
    ) -> subprocess.CompletedProcess[str]:
        given = ["--hub_token", token] if token else []
        script = str(ROOT / "train_text_to_image_ambient.py")
        self.patch.setattr(sys, "argv", [
            script, "--pretrained_model_name_or_path", str(base), "--train_data_dir", str(images), "--resolution", "32",
            "--train_batch_size", "2", "--max_train_steps", "2", "--checkpointing_steps", "1", "--output_dir", str(out),
            "--push_to_hub", "--hub_model_id", "name", *given, *more,
        ])  # fmt: skip
        return self.call(hub, lambda: runpy.run_path(script, run_name="__main__"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    return Here(monkeypatch, capsys, tmp_path)


def snippet(hub: HubServer) -> str:
    """Return the code of the card that lies on the hub, as it stands there."""
    (code,) = re.findall(r"```python\n(.*?)\n```", hub.files["README.md"].decode(), flags=re.S)
    return str(code)


def head(hub: HubServer) -> dict[str, Any]:
    return dict(yaml.safe_load(hub.files["README.md"].decode().split("\n---\n", maxsplit=1)[0].removeprefix("---\n")))


def assert_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("ambient-sd: error:")][-1]


@pytest.mark.parametrize("lora", [True, False])
def test_a_transformer_comes_back_from_the_hub(lora: bool, here: Here, tmp_path: Path, tiny_images: Path) -> None:
    base, out = tmp_path / "klein", tmp_path / "out"
    tiny_flow.tiny_klein_pipeline().save_pretrained(base)
    with HubServer() as hub:
        done = here.train(hub.url, base, tiny_images, out, TOKEN, "--report_to", "none", *(["--lora"] if lora else []))
        assert done.returncode == 0, done.stderr
        reach(here.patch, hub.url, here.home)
        theirs, ours, stock = (Flux2KleinPipeline.from_pretrained(base) for _ in range(3))
        if lora:
            theirs.load_lora_weights("owner/name")
            ours.load_lora_weights(out)
        else:
            theirs, ours = (Flux2KleinPipeline.from_pretrained(place) for place in ("owner/name", out))
    with torch.no_grad():
        assert torch.equal(theirs.encode_prompt("a disc")[0], stock.encode_prompt("a disc")[0]), "by its chat template"
    weights = [dict(pipe.transformer.state_dict()) for pipe in (theirs, ours, stock)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert any(name not in weights[2] or not torch.equal(value, weights[2][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_upload_fails_midway_then_a_retry_brings_results_and_nothing_else(
    here: Here, tmp_path: Path, tiny_base: Path, tiny_images: Path
) -> None:
    out = tmp_path / "out"
    with HubServer(fail_upload=2) as hub:
        # Training without validation prompts, the second of its uploads refused: the results stay and say how to retry.
        line = assert_one_line(here.train(hub.url, tiny_base, tiny_images, out, TOKEN))
        assert f"ambient-sd push {out} --repo owner/name" in line
        assert (out / "unet/diffusion_pytorch_model.safetensors").exists()
        assert not hub.files
        # Negative control: what must stay behind is really there.
        assert list(out.glob("checkpoint-*/*"))
        (out / "secrets.txt").write_text(TOKEN)
        (out / "unet" / "private.safetensors").write_text(TOKEN)
        (out / "validation").mkdir()
        (out / "validation" / "step-9.png").symlink_to(out / "secrets.txt")
        assert TOKEN not in (out / "train_config.yaml").read_text()
        done = here.call(hub.url, lambda: main(["push", str(out), "--repo", "owner/name"]), TOKEN)
        assert done.returncode == 0, done.stderr
        assert not [n for n in hub.files if "checkpoint" in n or "optim" in n or "log" in n or "private" in n]
        assert "secrets.txt" not in hub.files
        assert "validation/step-9.png" not in hub.files
        for name, data in hub.files.items():
            for secret in (TOKEN, str(tmp_path), str(tiny_base), str(tiny_images)):
                assert secret.encode() not in data, (name, secret)
        assert (head(hub)["license"], "base_model" in head(hub)) == ("other", False)
        code = (
            "import numpy, torch; from diffusers import StableDiffusionPipeline as P; "
            f"a, b = (P.from_pretrained(n, safety_checker=None) for n in ('owner/name', {str(out)!r})); "
            "assert all(torch.equal(x, y) for x, y in zip(a.unet.state_dict().values(), b.unet.state_dict().values())); "
            "assert a.scheduler.config.prediction_type == 'v_prediction'"
        )
        loaded = here.run(hub.url, f"{code}\n{snippet(hub)}")
        assert loaded.returncode == 0, loaded.stderr
        assert float(loaded.stdout) > 0
        with Image.open(tmp_path / "image.png") as image:
            assert image.size == (32, 32)


def test_lora_goes_to_the_hub_and_loads_from_there_as_its_card_says(
    here: Here, tmp_path: Path, tiny_base: Path, tiny_images: Path
) -> None:
    out, prompt = tmp_path / "out", "``` | </script> \u202e --- |\n---\nlicense: mit\n---"
    with HubServer() as hub:
        hub.others["owner/base"] = {
            path.relative_to(tiny_base).as_posix(): path.read_bytes() for path in tiny_base.rglob("*") if path.is_file()
        } | {"README.md": b"---\nlicense: openrail++\n---\n# A base\n"}
        done = here.train(
            hub.url, "owner/base", tiny_images, out, TOKEN, "--lora", "--rank", "2", "--lora_alpha", "6",
            "--learning_rate", "0.05", "--validation_prompt", prompt, "--num_validation_images", "1", "--output_kohya_format",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        names = {"README.md", "train_config.yaml", "validation/step-2.png"}
        names |= {f"pytorch_lora_weights{end}.safetensors" for end in ("", "_kohya")}
        assert set(hub.files) == names
        for name, data in hub.files.items():
            for secret in (TOKEN, str(tmp_path), str(tiny_base), str(tiny_images), str(Path.home()) + "/"):
                assert secret.encode() not in data, (name, secret)
        card = hub.files["README.md"].decode()
        found = head(hub)
        assert (found["license"], found["base_model"], found["base_model_relation"]) == ("openrail++", "owner/base", "adapter")  # fmt: skip
        for said in (
            "LoRA, rank 2, alpha 6",
            " of 1000 of this schedule",
            "| images | 8 |",
            "(validation/step-2.png)",
        ):
            assert said in card, said
        assert "</script>" not in card
        code = (
            "import torch\nfrom ambient_sd import AmbientSDPipeline as P\n"
            "def draw(lora):\n"
            "    pipe = P.from_pretrained('owner/base')\n"
            "    if lora: pipe.load_lora_weights(lora)\n"
            "    start = torch.Generator().manual_seed(0)\n"
            "    return pipe('a disc', num_inference_steps=2, generator=start, output_type='np').images[0]\n"
            f"base, there, here = draw(''), draw('owner/name'), draw({str(out)!r})\n"
            "assert (there == here).all() and (there != base).any()\n"
        )
        # The folder also holds kohya's file: the plain call takes the right one of the two.
        loaded = here.run(hub.url, f"{code}{snippet(hub)}")
        assert loaded.returncode == 0, loaded.stderr
        assert float(loaded.stdout) > 0
        assert (tmp_path / "image.png").exists()


@pytest.mark.parametrize(("writable", "token"), [(True, ""), (False, TOKEN)])
def test_no_token_or_no_right_to_write_ends_before_anything_is_written(
    here: Here, tmp_path: Path, tiny_base: Path, tiny_images: Path, writable: bool, token: str
) -> None:
    with HubServer(writable=writable) as hub:
        hub.exists = True  # a repository of somebody else's, which `create_repo(exist_ok=True)` accepts
        line = assert_one_line(here.train(hub.url, tiny_base, tiny_images, tmp_path / "out", token))
    assert ("owner/name" if token else "name on the hub") in line
    assert not (tmp_path / "out").exists()


def test_a_hub_out_of_reach_ends_before_anything_is_written(
    here: Here, tmp_path: Path, tiny_base: Path, tiny_images: Path
) -> None:
    with HubServer() as hub:
        gone = hub.url
    assert "ConnectError" in assert_one_line(here.train(gone, tiny_base, tiny_images, tmp_path / "out", TOKEN))
    assert not (tmp_path / "out").exists()
