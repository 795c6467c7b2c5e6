"""AmbientSDPipeline is the stock pipeline plus reports: same images, same folders, one-line refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import guard_tools as tools
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ambient_sd import AmbientSDPipeline, MemorizationGuard, policies
from ambient_sd.utils.errors import UserError


def load(kind: Any, folder: Path, **kwargs: Any) -> Any:
    pipe = kind.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, prompt: Any = "a cat", **kwargs: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, num_inference_steps=3, generator=generator, output_type="pt", **kwargs)


def test_images_are_bit_identical_to_the_stock_pipelines_and_carry_reports(tiny_base: Path) -> None:
    stock = run(load(StableDiffusionPipeline, tiny_base), tools.PROMPTS)
    pipe = load(AmbientSDPipeline, tiny_base)
    before = set(vars(pipe))
    out = run(pipe, tools.PROMPTS)
    assert torch.equal(stock.images, out.images) and out.nsfw_content_detected == stock.nsfw_content_detected
    assert [image.prompt for image in out.memorization] == tools.PROMPTS
    assert all(image.score > 0 for image in out.memorization)
    assert "encode_prompt" not in set(vars(pipe)) - before


def test_what_it_saves_loads_in_every_stock_class_and_samples_the_same(tiny_base: Path, tmp_path: Path) -> None:
    pipe = load(AmbientSDPipeline, tiny_base)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    expected = run(pipe).images
    for kind in (StableDiffusionPipeline, DiffusionPipeline, AutoPipelineForText2Image, AmbientSDPipeline):
        loaded = load(kind, tmp_path)
        assert type(loaded) is (AmbientSDPipeline if kind is AmbientSDPipeline else StableDiffusionPipeline)
        assert torch.equal(expected, run(loaded).images)


def test_guard_argument_chooses_scores_policy_or_a_guard_of_ones_own(tiny_base: Path) -> None:
    pipe = load(AmbientSDPipeline, tiny_base)
    plain = run(pipe)
    assert run(pipe, guard=False).memorization is None
    assert run(pipe, guard=True).memorization == plain.memorization
    mitigated = run(pipe, guard=policies.PromptOptimization(target=1e-3, max_steps=2))
    assert mitigated.memorization[0].mitigated and not torch.equal(mitigated.images, plain.images)
    own = MemorizationGuard(pipe, threshold=1e-9)
    assert run(pipe, guard=own).memorization[0].flagged is True
    with own:
        run(pipe, guard=own)
        assert run(pipe).memorization is own.report  # a guard that is on already goes on measuring
    assert len(own.history) == 3
    assert torch.equal(run(pipe).images, plain.images)


def test_guidance_off_is_unmeasured_by_default_and_refused_on_demand(tiny_base: Path) -> None:
    pipe = load(AmbientSDPipeline, tiny_base)
    assert run(pipe, guidance_scale=1.0).memorization is None
    with pytest.raises(UserError, match="guidance is off"):
        run(pipe, guidance_scale=1.0, guard=True)
    assert run(pipe).memorization is not None


def test_return_dict_false_gives_the_stock_tuple(tiny_base: Path) -> None:
    out = run(load(AmbientSDPipeline, tiny_base), return_dict=False)
    assert isinstance(out, tuple) and len(out) == 2


def test_a_lora_on_the_base_samples_and_scores_as_in_the_stock_pipeline(tiny_base: Path, tmp_path: Path) -> None:
    trained = load(StableDiffusionPipeline, tiny_base)
    trained.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = get_peft_model_state_dict(trained.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    stock, pipe = load(StableDiffusionPipeline, tiny_base), load(AmbientSDPipeline, tiny_base)
    without = run(pipe)
    for each in (stock, pipe):
        each.load_lora_weights(tmp_path)
    out = run(pipe)
    assert torch.equal(run(stock).images, out.images)
    assert out.memorization[0].score != without.memorization[0].score
    # The adapter's scale reaches the evaluations of a policy too: they agree with the loop's own first step.
    scaled = run(pipe, cross_attention_kwargs={"scale": 0.3}, guard=policies.PromptOptimization(1e-3, max_steps=2))
    image = scaled.memorization[0]
    assert image.curve[0] == pytest.approx(image.first_score_after, rel=1e-4)
    assert image.first_score_before != pytest.approx(out.memorization[0].curve[0], rel=1e-4)


def test_from_pipe_goes_both_ways_between_the_stock_class_and_ours(tiny_base: Path) -> None:
    stock = load(StableDiffusionPipeline, tiny_base)
    ours = AmbientSDPipeline.from_pipe(stock)
    back = StableDiffusionImg2ImgPipeline.from_pipe(ours)
    assert ours.unet is stock.unet and back.unet is stock.unet
    assert run(ours).memorization


def test_safety_checker_none_loads_without_a_word(tiny_base: Path) -> None:
    pipe = load(AmbientSDPipeline, tiny_base, safety_checker=None)
    assert pipe.safety_checker is None and pipe.config.requires_safety_checker is False


def test_folders_that_are_no_pipeline_are_refused_in_one_line(tiny_base: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_base, tmp_path / name))

    no_index, no_unet, broken, xl = copy("no_index"), copy("no_unet"), copy("broken"), copy("xl")
    (no_index / "model_index.json").unlink()
    shutil.rmtree(no_unet / "unet")
    (broken / "model_index.json").write_text("{")
    index = json.loads((xl / "model_index.json").read_text())
    (xl / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": ["transformers", "CLIPTextModel"]}))
    cases = {
        no_index: "no model_index.json",
        no_unet: "no unet",
        broken: "cannot be read",
        xl: "Stable Diffusion 1 and 2",
        tmp_path / "nowhere": "no folder",
    }
    for folder, words in cases.items():
        with pytest.raises(UserError, match=words) as error:
            AmbientSDPipeline.from_pretrained(folder)
        assert "\n" not in str(error.value)
    unet = load(StableDiffusionPipeline, tiny_base).unet
    assert AmbientSDPipeline.from_pretrained(no_unet, unet=unet).unet is unet


def test_a_guard_of_another_pipeline_and_a_wrong_guard_are_refused(tiny_base: Path) -> None:
    pipe = load(AmbientSDPipeline, tiny_base)
    with pytest.raises(UserError, match="another pipeline"):
        run(pipe, guard=MemorizationGuard(load(AmbientSDPipeline, tiny_base)))
    with pytest.raises(UserError, match="guard is a str"):
        run(pipe, guard="wen")
