from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

# One thread: on networks this small a second one costs more than it brings, many times more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a tiny random SD2-shaped pipeline (v-prediction)."""
    folder = tmp_path_factory.mktemp("tiny-base")
    tiny.tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight small pictures with metadata.jsonl."""
    return tiny.tiny_folder(tmp_path_factory.mktemp("tiny-pictures"))
