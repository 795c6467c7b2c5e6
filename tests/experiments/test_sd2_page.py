"""configs/study/sd2-laion10k.yaml and docs/sd2.md: the file plans a run at SD2's own size; the page's counts are the counted ones."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from safetensors.torch import save_file

from ambient_sd.training import plan_run, run
from ambient_sd.training.config import parse
from ambient_sd.utils.errors import UserError

ROOT = Path(__file__).parents[2]
FILE = ROOT / "configs" / "study" / "sd2-laion10k.yaml"
PAGE = (ROOT / "docs" / "sd2.md").read_text()


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("sd2_flops", ROOT / "benchmarks" / "sd2_flops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sd2(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD2.1's configurations around files without its weights."""
    folder = tmp_path_factory.mktemp("sd2")
    shutil.copytree(tiny_base, folder, dirs_exist_ok=True)
    for name, part in benchmark().parts().items():
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
        (part.config.save_pretrained if name == "text_encoder" else part.save_config)(folder / name)
        save_file(
            {},
            folder / name / ("model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"),
        )
    return folder


def variants() -> list[list[str]]:
    """The flags of every training command and row of the page, and of the file's head."""
    text = PAGE.replace("\\\n", " ")
    found = [
        shlex.split(m[1].rstrip("'")) for m in re.finditer(r"--config configs/study/sd2-laion10k.yaml([^\n]*)", text)
    ]
    rows = re.findall(r"\| `(--(?:objective|memorization)[^`.]*(?:\d[^`]*)?)` \|", PAGE)
    head = re.findall(r"^#   (--objective \S+ --ambient_level \S+(?: --\w+(?: [\d.]+)?)?)  ", FILE.read_text(), re.M)
    return found + [shlex.split(row) for row in [*rows, *head] if "..." not in row]


def test_the_file_and_every_variant_of_it_plan_a_run_at_full_size_up_to_the_missing_weights(
    sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny.tiny_folder(tmp_path / "laion-10k", count=8)
    listing = (folder / "metadata.jsonl").read_text().splitlines()
    # The page's duplicates: lines that come again.
    (folder / "metadata.jsonl").write_text("\n".join(listing + 4 * listing[:1]) + "\n")
    assert len(variants()) >= 10
    for flags in variants():
        # The images here are tiny.
        given = ["--config", str(FILE), "--pretrained_model_name_or_path", str(sd2), "--allow_upscaling"]
        config = parse([*given, *flags])
        plan = plan_run(config)
        assert (config.resolution, config.max_train_steps, config.learning_rate, config.lr_warmup_steps) == (
            256,
            100_000,
            5e-6,
            5000,
        )
        processes = 8 if config.train_batch_size == 2 else 1
        assert config.train_batch_size * config.gradient_accumulation_steps * processes == 16
        assert (len(plan.images), len(set(plan.images.keys))) == (12, 8)
        assert plan.objective.prediction_type == "v_prediction"
    with pytest.raises(UserError, match="text_encoder of model"):
        run(config, progress=False)


@pytest.mark.slow
def test_the_counts_on_the_page_are_the_counted_ones() -> None:
    found = benchmark().count(256)
    for name, text in (
        ("unet_forward", "forward | {:.3f} |"), ("unet_step", "all weights | {:.3f} |"), ("text", "text encoder | {:.3f} |"),
        ("vae_encode", "decode | {:.3f} /"), ("vae_decode", "/ {:.3f} |"),
    ):  # fmt: skip
        assert text.format(found[name]) in PAGE, name
    assert f"x {found['unet_step']:.3f} | {found['unet_step'] * 1600:.0f} |" in PAGE
    assert f"two halves, decoding | {(100 * found['unet_forward'] + found['vae_decode']) * 10:.0f} |" in PAGE
    assert f"moments of 866M numbers in float32 | {found['unet_million'] * 16e-3:.1f} |" in PAGE
    assert f"(bf16: about half) | {found['activations_gb'] * 16:.1f} |" in PAGE
    assert f"that is recomputed | {found['activations_checkpointed_gb'] * 16:.1f} |" in PAGE
    # An independent look at the largest number: a dense layer's pass costs 2 FLOPs a weight and place, backward twice that.
    assert found["unet_step"] / found["unet_forward"] == pytest.approx(3, rel=0.02)


def test_the_hours_on_the_page_follow_from_its_formula() -> None:
    for peak, slow, fast in ((312, "3.8", "1.9"), (989, "1.2", "0.6")):
        assert f"{863 / (3.6 * peak * 0.2):.1f}" == slow
        assert f"{863 / (3.6 * peak * 0.4):.1f}" == fast
        assert f"{fast} to {slow}" in PAGE


def test_the_file_is_the_protocol() -> None:
    settings = yaml.safe_load(FILE.read_text())
    assert settings["objective"] == "plain"
    assert settings["lr_scheduler"] == "constant_with_warmup"
    assert not settings.get("lora")
