from __future__ import annotations

import gc
from pathlib import Path

import pytest
import tiny
import torch

# One thread: on networks this small a second one costs more than it brings, many times more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cheap_garbage_collection() -> None:
    """Each training ends in a full collection, which need not walk through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a tiny random SD2-shaped pipeline (v-prediction)."""
    folder = tmp_path_factory.mktemp("tiny-base")
    tiny.tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight small images with metadata.jsonl."""
    return tiny.tiny_folder(tmp_path_factory.mktemp("tiny-images"))


@pytest.fixture(scope="session")
def tiny_audit(tiny_base: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ambient-sd audit` writes about the tiny pipeline: a whole folder of it, with held-out images and a limit."""
    from ambient_sd.cli import main

    root = tmp_path_factory.mktemp("tiny-audit")
    heldout = tiny.image_folder(root / "heldout", [tiny.noise_image(100 + i) for i in range(6)])
    main(["audit", str(tiny_base), str(tiny_images), "--heldout", str(heldout), "--out", str(root / "audit"), "--features", "pixels,edges",
          "--max_prompts", "2", "--samples_per_prompt", "2", "--num_inference_steps", "2", "--attributed_prompts", "1", "--device", "cpu",
          "--fail-over", "0.99"])  # fmt: skip
    return root / "audit"
