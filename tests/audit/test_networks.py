"""Networks that the user brings: their numbers are those of transformers itself, and half a network is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from ambient_sd.audit.clip_score import ClipScore
from ambient_sd.audit.networks import Dinov2, Inception
from ambient_sd.audit.registry import choose
from ambient_sd.utils.errors import UserError


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    g = np.random.default_rng(0)
    return [Image.fromarray(g.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("clip")
    tokenizer = tiny.tiny_tokenizer()
    both = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**both, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config={**both, "image_size": 28, "patch_size": 14}, projection_dim=8)
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def scaled(images: list[Image.Image], mean: list[float], std: list[float]) -> Tensor:
    x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for p in images])
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_dinov2_gives_the_pooled_token_of_transformers_batch_by_batch(dino: Path, images: list[Image.Image]) -> None:
    feature = Dinov2(str(dino), size=28, batch_size=2)
    x = scaled(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino).eval()(pixel_values=x).pooler_output
    torch.testing.assert_close(feature(images), expected, atol=1e-5, rtol=1e-5)
    assert feature(iter(())).shape == (0, 16) and feature.distance == "cosine" and feature.thresholds[0] == 0.9
    assert Dinov2(str(dino)).size == 224


def test_clip_score_is_the_cosine_of_transformers_also_for_prompts_beyond_the_length(
    clip: Path, images: list[Image.Image]
) -> None:
    score = ClipScore(str(clip), batch_size=2)
    prompts = ["a", "red dog", "", "x" * 500, "a blue house"]
    found = score(images, prompts)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    x = scaled(images, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    for i, prompt in enumerate(prompts):  # one at a time: no padding that could leak in
        ids = tokenizer([prompt], return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            out = model(**ids, pixel_values=x[i : i + 1])
        assert float(found[i]) == pytest.approx(
            float(out.logits_per_image) / float(model.logit_scale.detach().exp()), abs=1e-5
        )
    with pytest.raises(UserError, match="one prompt per image"):
        score(images, prompts[:2])


def test_half_a_network_and_another_network_are_refused(dino: Path, clip: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    Dinov2Model.from_pretrained(dino).save_pretrained(half)
    weights = load_file(half / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights, such as layernorm\.weight"):
        Dinov2(str(half))
    with pytest.raises(UserError, match="is a clip"):
        Dinov2(str(clip))
    with pytest.raises(UserError, match="is a dinov2"):
        ClipScore(str(dino))
    (clip_alone := tmp_path / "alone").mkdir()
    CLIPModel.from_pretrained(clip).save_pretrained(clip_alone)
    with pytest.raises(UserError, match="the model 190 embeddings"):
        ClipScore(str(clip_alone))


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32).mean(dim=(2, 3))


class Optional_(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        out = x.to(torch.float32).mean(dim=(2, 3))
        return out if return_features else out[:, :1]


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32)


def test_inception_files_of_both_kinds_are_called_as_they_want(images: list[Image.Image], tmp_path: Path) -> None:
    flat = [Image.new("RGB", (40, 30), (i, 2 * i, 250)) for i in range(4)]
    for number, network in enumerate((Pooled(), Optional_())):
        path = tmp_path / f"{number}.pt"
        torch.jit.script(network).save(str(path))
        feature = Inception(path, batch_size=3)
        assert feature(flat).tolist() == [[i, 2 * i, 250] for i in range(4)] and len(feature.digest) == 64
        assert choose(["inception"], {"inception": str(path)})[0].name == "Inception"
    torch.jit.script(Wrong()).save(str(tmp_path / "wrong.pt"))
    with pytest.raises(UserError, match="does not take uint8"):
        Inception(tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="does not exist"):
        Inception(tmp_path / "none.pt")
