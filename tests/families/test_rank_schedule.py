"""A masked LoRA is the plain LoRA of its first r(t) components: in every layer, for every sample, through file, guard and unloading.

References: the published formula in whole numbers, and adapters whose factors are cut by hand.
"""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ambient_sd import AmbientSDPipeline, MemorizationGuard, policies
from ambient_sd.families import lora, rank_schedule
from ambient_sd.families.rank_schedule import RankSchedule
from ambient_sd.families.sd import SD
from ambient_sd.guard.anisotropy import anisotropy
from ambient_sd.guard.calibration import ModelFingerprint
from ambient_sd.sampling import SamplingConfig, adapted, load_pipeline
from ambient_sd.training import adapters
from ambient_sd.utils.errors import UserError

RANK = 4
TARGETS = [
    "to_q",
    "to_k",
    "to_out.0",
    "proj_in",
    "conv1",
    "time_emb_proj",
]  # linear on tokens, on vectors, and convolutions
TIMESTEPS = torch.tensor([0, 1, 400, 999])  # ranks 4, 3, 2, 1
FULL, LEAST = 0, 3


def make(kind: Any = tiny.tiny_pipeline, name: str = "default") -> Any:
    """A pipeline whose U-Net has a LoRA of random A and B."""
    pipe = kind()
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False), name)
    return pipe


def cut(unet: Any, rank: int, name: str = "default") -> Any:
    """The same U-Net with the components from `rank` on at zero."""
    unet = copy.deepcopy(unet)
    with torch.no_grad():
        for _, layer in lora.adapted(unet, name):
            layer.lora_A[name].weight[rank:] = 0
    return unet


def output(unet: Any, timesteps: Any = TIMESTEPS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    sample, hidden = torch.randn(4, 4, 16, 16, generator=g), torch.randn(4, 24, width, generator=g)
    more = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        more = {
            "added_cond_kwargs": {
                "text_embeds": torch.randn(4, pooled, generator=g),
                "time_ids": torch.full((4, 6), 32.0),
            }
        }
    result: torch.Tensor = unet(sample.to(dtype), timesteps, hidden.to(dtype), **more).sample
    return result


def image(pipe: Any, **options: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "height": 32, "width": 32, "generator": g, "output_type": "pt", **options}
    return torch.as_tensor(pipe("a cat", **options).images)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A folder with a LoRA of ranks 1 to 4, as training writes it."""
    unet = make().unet
    rank_schedule.install(unet, "default", RankSchedule(1))
    adapters.save(unet, tmp_path / "masked", SD)
    return tmp_path / "masked"


@pytest.mark.parametrize(("low", "rank"), [(1, 4), (2, 7), (32, 64), (5, 3)])
def test_ranks_are_the_published_formula(low: int, rank: int) -> None:
    # T-LoRA's flux/train.py, in whole numbers; a layer of rank below r_min keeps it.
    wanted = [(1000 - t) * max(rank - low, 0) // 1000 + low for t in range(1001)]
    ranks = RankSchedule(low).ranks
    assert ranks(torch.arange(1001), rank).tolist() == wanted
    assert ranks(torch.arange(1001).float(), rank).tolist() == wanted
    assert ranks(torch.tensor([999.5, 1200.0, -3.0]), rank).tolist() == [low, low, max(low, rank)]


@pytest.mark.parametrize("kind", [tiny.tiny_pipeline, tiny.tiny_sdxl_pipeline])
def test_each_sample_gets_its_first_components(kind: Any) -> None:
    unet = make(kind).unet.eval()
    whole = output(unet)
    parts = [output(cut(unet, rank))[i] for i, rank in enumerate([4, 3, 2, 1])]
    rank_schedule.install(unet, "default", RankSchedule(1))
    masked = output(unet)
    torch.testing.assert_close(masked, torch.stack(parts), rtol=0, atol=1e-5)
    assert torch.equal(masked[FULL], whole[FULL])
    assert all(not torch.allclose(masked[i], whole[i], atol=1e-3) for i in (2, LEAST)), "control"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_timestep_zero_no_bit_changes(dtype: torch.dtype) -> None:
    unet = make().unet.to(dtype).eval()
    plain = [output(unet, t, dtype) for t in (0, 999)]
    rank_schedule.install(unet, "default", RankSchedule(1))
    assert torch.equal(output(unet, 0, dtype), plain[0])
    assert not torch.allclose(output(unet, 999, dtype), plain[1], atol=1e-2), "control"


def gradients(unet: Any, checkpointing: bool) -> dict[str, torch.Tensor]:
    unet.zero_grad()
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    output(unet, torch.tensor([600, 999, 999, 600])).square().mean().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if "lora_" in name and p.grad is not None}


def test_gradients_reach_acting_components_only() -> None:
    unet = make().unet
    rank_schedule.install(unet, "default", RankSchedule(1))
    found, again = gradients(unet, False), gradients(unet, True)
    assert all(torch.equal(found[name], again[name]) for name in found), "gradient checkpointing"
    down = [grad.flatten(1).abs().amax(1) for name, grad in found.items() if "lora_A" in name]
    assert all(bool((grad[2:] == 0).all() and grad[0] > 0) for grad in down)
    plain = gradients(make().unet, False)
    assert all(bool((grad.flatten(1).abs().amax(1) > 0).all()) for name, grad in plain.items() if "lora_A" in name), (
        "control"
    )


def test_sampling_is_what_was_trained(file: Path) -> None:
    trained = make()
    rank_schedule.install(trained.unet, "default", RankSchedule(1))
    ours, stock, whole = tiny.tiny_pipeline(), tiny.tiny_pipeline(), make()
    record = lora.load_lora(ours, file)
    assert record["min_rank"] == 1 and "LoRA of rank 1 to 4 by noise level" in lora.told(record)
    stock.load_lora_weights(file)
    assert torch.equal(image(ours), image(trained))
    assert torch.equal(image(stock), image(whole)), "other readers apply the whole rank"
    assert not torch.allclose(image(ours), image(stock), atol=1e-3)
    ours.set_adapters(["default_0"], [0.0])
    assert torch.equal(image(ours), image(tiny.tiny_pipeline())), "scales act as they do in diffusers"


def test_every_way_in_masks(file: Path, tiny_base: Path) -> None:
    wanted = tiny.tiny_pipeline()
    lora.load_lora(wanted, file)
    pipe = AmbientSDPipeline.from_pretrained(str(tiny_base))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.load_lora_weights(str(file))["min_rank"] == 1
    config = adapted(SamplingConfig(str(file), base=str(tiny_base), device="cpu"))
    loaded = load_pipeline(config)
    assert config.public()["lora"]["min_rank"] == 1
    for found in (pipe, loaded):
        assert torch.equal(output(found.unet.eval()), output(wanted.unet.eval()))


def test_kohyas_file_holds_the_schedule(tmp_path: Path) -> None:
    unet = make().unet
    rank_schedule.install(unet, "default", RankSchedule(2, 500))
    tmp_path.joinpath("kohya").mkdir()
    adapters.save_kohya(unet, tmp_path / "kohya", SD)
    pipe = tiny.tiny_pipeline()
    lora.load_lora(pipe, tmp_path / "kohya")
    assert rank_schedule.installed(pipe.unet) == {"default_0": RankSchedule(2, 500)}
    assert torch.equal(output(pipe.unet.eval()), output(unet.eval()))


@pytest.mark.parametrize("how", ["unload", "delete", "layers"])
def test_nothing_stays_after_unloading(file: Path, how: str) -> None:
    pipe = tiny.tiny_pipeline()
    base, before = image(pipe), set(vars(pipe.unet))
    lora.load_lora(pipe, file)
    assert len(pipe.unet.time_proj._forward_pre_hooks) == 1, "control"
    if how == "unload":
        pipe.unload_lora_weights()
    elif how == "delete":
        pipe.delete_adapters("default_0")
    else:
        layers = [layer for _, layer in lora.adapted(pipe.unet, "default_0")]
        for layer in layers[:-1]:
            layer.delete_adapter("default_0")
        assert len(pipe.unet.time_proj._forward_pre_hooks) == 1, "one layer is still masked"
        layers[-1].delete_adapter("default_0")
    gc.collect()
    assert not pipe.unet.time_proj._forward_pre_hooks and rank_schedule.installed(pipe.unet) == {}
    assert set(vars(pipe.unet)) - before <= {"peft_config", "_hf_peft_config_loaded"}
    assert torch.equal(image(pipe), base)


def test_a_stock_adapter_after_it_is_whole(file: Path) -> None:
    pipe = tiny.tiny_pipeline()
    lora.load_lora(pipe, file, adapter_name="mine")
    pipe.delete_adapters("mine")
    pipe.load_lora_weights(file, adapter_name="mine")
    assert torch.equal(image(pipe), image(make()))


def test_two_adapters_keep_their_own_ranks(file: Path) -> None:
    pipe, other = tiny.tiny_pipeline(), tiny.tiny_pipeline()
    for name in ("one", "two"):
        lora.load_lora(pipe, file, adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    lora.load_lora(other, file)
    torch.testing.assert_close(image(pipe), image(other), rtol=0, atol=1e-5)
    pipe.delete_adapters("one")
    assert rank_schedule.installed(pipe.unet) == {"two": RankSchedule(1)}
    pipe.set_adapters(["two"], [1.0])
    assert torch.equal(image(pipe), image(other))


def test_fusing_is_refused_and_changes_nothing(file: Path) -> None:
    pipe = tiny.tiny_pipeline()
    lora.load_lora(pipe, file)
    before = image(pipe)
    for fuse in (pipe.fuse_lora, lambda lora_scale: lora.adapted(pipe.unet, "default_0")[0][1].merge()):
        with pytest.raises(UserError, match="fused weights have one rank"):
            fuse(lora_scale=0.5)
    assert torch.equal(image(pipe), before)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(file)
    pipe.fuse_lora()  # control: the whole rank can be


def test_the_guard_sees_and_leaves_the_same(file: Path) -> None:
    pipe = tiny.tiny_pipeline()
    lora.load_lora(pipe, file)
    before = image(pipe)
    with MemorizationGuard(pipe) as guard:
        assert torch.equal(image(pipe), before)
    masked = guard.report
    stock = make()
    with MemorizationGuard(stock) as guard:
        image(stock)
    assert masked is not None and masked[0].score != guard.report[0].score


def test_direct_evaluations_follow_their_own_timestep(file: Path) -> None:
    """Anisotropy asks the network's `forward`, past its hooks, at the first timestep (rank 1) and at 0 (the whole rank)."""

    def measure(pipe: Any) -> Any:
        g = torch.Generator().manual_seed(0)
        return anisotropy(pipe, "a cat", low_timestep=0, num_inference_steps=3, generator=g, height=32, width=32)[0]

    masked, whole, least = tiny.tiny_pipeline(), make(), make()
    lora.load_lora(masked, file)
    least.unet = cut(least.unet, 1)
    found, high, low = measure(masked), measure(least), measure(whole)
    assert found.norm == pytest.approx(high.norm, rel=1e-5) != pytest.approx(low.norm, rel=1e-2)
    assert found.alignment == low.alignment != pytest.approx(high.alignment, rel=1e-2)


def test_parts_of_a_batch_are_masked_when_evaluated_again(file: Path) -> None:
    pipe, three, whole = tiny.tiny_pipeline(), make(), make()
    lora.load_lora(pipe, file)
    three.unet = cut(three.unet, 3)
    images = []
    for each in (pipe, three, whole):  # one step, at t = 1
        with MemorizationGuard(each, policies.AttentionRescaling()):
            images.append(image(each, num_images_per_prompt=2, num_inference_steps=1))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
    assert not torch.allclose(images[0], images[2], atol=1e-3), "control"


def test_a_copied_network_masks_by_itself() -> None:
    unet = make().unet.eval()
    rank_schedule.install(unet, "default", RankSchedule(1))
    other = copy.deepcopy(unet)
    wanted = output(unet)
    output(unet, 0)
    assert torch.equal(output(other), wanted)


def test_a_threshold_of_the_whole_rank_does_not_hold(file: Path) -> None:
    masked, stock = tiny.tiny_pipeline(), tiny.tiny_pipeline()
    lora.load_lora(masked, file)
    stock.load_lora_weights(file)
    assert ModelFingerprint.of(masked.unet).differs(ModelFingerprint.of(stock.unet)) is not None
    again = tiny.tiny_pipeline()
    lora.load_lora(again, file, adapter_name="other")
    assert ModelFingerprint.of(masked.unet).differs(ModelFingerprint.of(again.unet)) is None


@pytest.mark.parametrize(
    "head",
    ["no json", "[]", "{}", '{"min_rank": 0}', '{"min_rank": 1.0}', '{"min_rank": true}', '{"min_rank": 1, "alpha": 2.0}',
     '{"min_rank": 1, "num_train_timesteps": 0}', "[" * 100_000],
)  # fmt: skip
def test_heads_that_cannot_be_read_are_refused(tmp_path: Path, head: str) -> None:
    tensors = {f"unet.{n}": t for n, t in get_peft_model_state_dict(make().unet).items()}
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata={"lora_rank_schedule": head})
    with pytest.raises(UserError, match="lora_rank_schedule is"):
        lora.load_lora(tiny.tiny_pipeline(), path)
    save_file(tensors, path, metadata={"lora_rank_schedule": '{"min_rank": 1}'})
    assert lora.load_lora(tiny.tiny_pipeline(), path)["min_rank"] == 1


@pytest.mark.parametrize("kind", ["DoRA", "LoHa"])
def test_other_kinds_with_a_schedule_are_refused(tmp_path: Path, kind: str) -> None:
    place, up, down = (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        torch.ones(32, 2),
        torch.ones(2, 32),
    )
    tensors = {
        f"{place}.lora_A.weight": down,
        f"{place}.lora_B.weight": up,
        f"{place}.lora_magnitude_vector": torch.ones(32),
    }
    if kind == "LoHa":
        name = "lora_" + place.replace(".", "_")
        tensors = {f"{name}.hada_w{i}_{half}": v.clone() for i in (1, 2) for half, v in (("a", up), ("b", down))}
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    assert "min_rank" not in lora.load_lora(tiny.tiny_pipeline(), path), "control"
    save_file(tensors, path, metadata={"lora_rank_schedule": json.dumps({"min_rank": 1})})
    with pytest.raises(UserError, match=f"is a {kind}"):
        lora.load_lora(tiny.tiny_pipeline(), path)


def test_stock_diffusers_reads_the_file(file: Path) -> None:
    pipe = tiny.tiny_pipeline()
    pipe.load_lora_weights(file)
    held = get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
    for name, value in load_file(file / lora.WEIGHTS_NAME).items():
        assert torch.equal(held[name.removeprefix("unet.")], value)
    assert isinstance(pipe, StableDiffusionPipeline) and rank_schedule.installed(pipe.unet) == {}
