"""A CLIP of open_clip: its numbers are open_clip's own, and half a model, a pickle or a missing library end in one line.

open_clip needs torchvision, which the CPU build of torch of `make test` has none of: most of this runs in an environment of its own
(docs/slow.md).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ambient_sd.audit.clip_score import ClipScore
from ambient_sd.sampling import label
from ambient_sd.utils.errors import UserError

HERE = importlib.util.find_spec("open_clip") is not None
needs_open_clip = pytest.mark.skipif(not HERE, reason="open_clip_torch is not installed (docs/slow.md)")
PROMPTS = ["a", "red dog", "", "word " * 200, "a blue house"]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    g = np.random.default_rng(0)
    return [Image.fromarray(g.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in PROMPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole open_clip model, tiny, in the form of those on the hub; its scale of images is not the usual one."""
    import open_clip

    torch.manual_seed(0)
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    path = tmp_path_factory.mktemp("open-clip")
    (path / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(path / "tiny.json")
    scale = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": scale}))
    save_file(open_clip.create_model("tiny").state_dict(), path / "open_clip_model.safetensors")
    return path


@needs_open_clip
def test_the_score_is_open_clips_own_cosine(folder: Path, images: list[Image.Image]) -> None:
    import open_clip

    score = ClipScore(f"open_clip:{folder}", batch_size=2)
    found = score(images, PROMPTS)
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([prepare(p) for p in images]), normalize=True)
        text = model.encode_text(tokenizer(PROMPTS), normalize=True)
    torch.testing.assert_close(found, (image * text).sum(1).double(), atol=1e-5, rtol=1e-5)
    # Controls: another prompt gives another figure, and so would the usual scale of images.
    assert (found - score(images, PROMPTS[::-1]))[[0, 1, 3, 4]].abs().min() > 1e-4
    assert tuple(score.clip.mean) == (0.5, 0.4, 0.3)
    assert score([], []).shape == (0,)


@needs_open_clip
def test_half_a_model_a_pickle_and_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    def copy(name: str, weights: Any = None, config: Any = None) -> str:
        (made := tmp_path / name).mkdir()
        whole = load_file(folder / "open_clip_model.safetensors")
        if weights != {}:
            save_file(weights or whole, made / "open_clip_model.safetensors")
        (made / "open_clip_config.json").write_text(
            json.dumps(config or json.loads((folder / "open_clip_config.json").read_text()))
        )
        return f"open_clip:{made}"

    whole = load_file(folder / "open_clip_model.safetensors")
    assert ClipScore(copy("whole")).clip.size == 28
    missing = {k: v for k, v in whole.items() if k != "text_projection"}
    with pytest.raises(UserError, match=r"cannot be loaded; RuntimeError.*text_projection"):
        ClipScore(copy("half", missing))
    # open_clip itself would take the pickle.
    pickled = copy("pickled", {})
    torch.save(whole, Path(pickled.removeprefix("open_clip:")) / "open_clip_pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"is not whole; it must hold open_clip_config\.json and open_clip_model\.safetensors"
    ):
        ClipScore(pickled)
    few = json.loads((folder / "open_clip_config.json").read_text())
    few["model_cfg"]["text_cfg"]["vocab_size"] = 100
    small = {**whole, "token_embedding.weight": whole["token_embedding.weight"][:100].clone()}
    with pytest.raises(UserError, match="cannot be loaded; IndexError"):
        ClipScore(copy("few", small, few))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        ClipScore("open_clip:no/such-model-here")
    assert "NAME/TAG" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(HERE, reason="open_clip_torch is installed")
def test_without_open_clip_the_remedy_is_named_in_one_line() -> None:
    with pytest.raises(
        UserError, match=r"open_clip:ViT-g-14/laion2b_s12b_b42k needs open_clip; .*; pip install"
    ) as caught:
        ClipScore("open_clip:ViT-g-14/laion2b_s12b_b42k")
    assert "\n" not in str(caught.value)


def test_what_is_published_of_a_name_holds_no_local_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert label(f"open_clip:{tmp_path / 'mine'}") == "open_clip:mine"
    assert label("open_clip:/home/me/mine") == "open_clip:mine"
    assert label("open_clip:ViT-g-14/laion2b_s12b_b42k") == "open_clip:ViT-g-14/laion2b_s12b_b42k"
