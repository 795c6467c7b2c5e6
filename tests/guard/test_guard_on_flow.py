"""What stands on the guard, on transformers trained by flow matching: every policy, the base above a level, anisotropy, thresholds in training."""

from __future__ import annotations

from typing import Any

import guard_tools as tools
import pytest
import tiny_flow
import tiny_more
import torch
from peft import LoraConfig

from ambient_sd import BaseAbove, MemorizationGuard, NoiseSchedule, policies
from ambient_sd.families import named_tokenizers, of_pipeline, reading
from ambient_sd.guard.anisotropy import LOW_FLOW_TIMESTEP, anisotropy
from ambient_sd.guard.by_name import available, make
from ambient_sd.guard.policies.base import Policy
from ambient_sd.training.dropping import Dropping, check_scheduler
from ambient_sd.utils.errors import UserError

SIDES = {"height": 16, "width": 16}
# One batch of halves; two calls on packed latents; two calls with texts as long as they are; lists, the other order and sign. Among hundreds of rows
# of padding a tiny network hardly sees a text: fewer are asked for.
PIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd3": (tools.tiny_sd3, {"guidance_scale": 5.0}),
    "flux": (tools.tiny_flux, {"true_cfg_scale": 5.0, "negative_prompt": ["", ""], "max_sequence_length": 24}),
    "qwen": (tools.woken(tiny_more.tiny_qwen_image_pipeline), {"true_cfg_scale": 5.0, "negative_prompt": ["", ""]}),
    "z-image": (tools.woken(tiny_more.tiny_z_image_pipeline), {"guidance_scale": 4.0}),
    "klein": (tools.woken(tiny_flow.tiny_klein_pipeline), {"guidance_scale": 5.0, "max_sequence_length": 48}),
    "auraflow": (tools.woken(tiny_more.tiny_auraflow_pipeline), {"guidance_scale": 5.0, "max_sequence_length": 24}),
}
SETTINGS = {
    "prompt_optimization": "target=1e-3,max_steps=2,lr=0.0005", "latent_optimization": "target=1e-3,lr=0.05,max_steps=2",
    "sail": "target=1e-6,max_steps=2", "scale_cap": "cap=1e-3", "despecification": "strength=100,threshold=0",
    "reanchoring": "threshold=0,softer=a dog", "dynamic_transition": "threshold=0.1", "static_transition": "until=500",
    "opposite_guidance": "until=500",
}  # fmt: skip
LONGER = "a prompt that has more tokens than the other"
CROSS_ATTENTION = ("attention_guard", "attention_rescaling")


def drawn(name: str, pipe: Any, **more: Any) -> torch.Tensor:
    return tools.sample(pipe, list(tools.PROMPTS), steps=2, **SIDES, **PIPES[name][1], **more)


def made(name: str) -> Policy:
    if name == "reanchoring":
        return policies.Reanchoring(threshold=0.0, softer="some much longer prompt than the others")
    given = SETTINGS.get(name, "")
    return make(f"{name}:{given}" if given and name != "dynamic_transition" else name)


@pytest.mark.parametrize("name", PIPES)
def test_every_policy_acts_or_refuses_in_one_line(name: str) -> None:
    pipe = PIPES[name][0]()
    stock = drawn(name, pipe)
    tried = {**{one: one for one in available()}, "reanchoring at all steps": "reanchoring"}
    for shown, known in tried.items():
        if known in CROSS_ATTENTION:
            with pytest.raises(UserError, match="acts on the cross-attention of a U-Net") as error:
                MemorizationGuard(pipe, made(known))
            assert "\n" not in str(error.value)
            continue
        policy = made(known) if shown == known else policies.Reanchoring(threshold=0.0, softer="a", rule="all")
        with MemorizationGuard(pipe, policy) as guard:
            images = drawn(name, pipe)
        assert images.isfinite().all() and not torch.equal(images, stock), shown
        assert [image.active for image in guard.report] == [True, True]
    assert torch.equal(drawn(name, pipe), stock), "every policy left the pipeline as it was"


@pytest.mark.parametrize("name", PIPES)
def test_images_that_are_not_flagged_stay_the_pipelines_own(name: str) -> None:
    pipe = PIPES[name][0]()
    stock = drawn(name, pipe)
    with MemorizationGuard(pipe) as guard:
        drawn(name, pipe)
    first = sorted(image.curve[0] for image in guard.report)
    rest = [image.curve[0] == first[0] for image in guard.report].index(True)
    threshold = sum(first) / 2
    for policy in (
        policies.ScaleCap(cap=1e-3),
        policies.PromptOptimization(1e-3, lr=0.0005, max_steps=3),
        policies.LatentOptimization(1e-3, lr=0.05, max_steps=2),
    ):
        with MemorizationGuard(pipe, policy, threshold, when="flagged"):
            images = drawn(name, pipe)
        assert torch.equal(images[rest], stock[rest]) and not torch.equal(images[1 - rest], stock[1 - rest])


class Rewrites(policies.RandomTokens):
    def perturb(self, prompt: str, place: int = 0) -> str:
        return LONGER


def test_another_text_of_another_length_is_read_as_the_pipeline_reads_it() -> None:
    for name in ("qwen", "z-image"):
        pipe = PIPES[name][0]()
        texts = ["a cat", LONGER]
        call = {**SIDES, **PIPES[name][1]}
        other = tools.sample(pipe, [texts[1]] * 2, steps=1, latents=torch.ones(start(name, pipe)), **call)

        with MemorizationGuard(pipe, Rewrites()):
            images = tools.sample(pipe, [texts[0]] * 2, steps=1, latents=torch.ones(start(name, pipe)), **call)
        torch.testing.assert_close(images, other, rtol=0, atol=2e-5)
        stock = tools.sample(pipe, [texts[0]] * 2, steps=1, latents=torch.ones(start(name, pipe)), **call)
        assert (stock - other).abs().max() > 1e-3


def start(name: str, pipe: Any) -> tuple[int, ...]:
    family = of_pipeline(pipe)
    noise = torch.zeros(2, *family.start_shape(pipe, (16, 16)))
    return tuple(family.start(noise).shape)


# --- the base above a level -------------------------------------------------------------------------------------------


def by_hand(name: str, pipe: Any, level: float) -> torch.Tensor:
    """The adapter switched by a hook on the network, by the scheduler's own timestep."""
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)

    def before(*_: Any, **__: Any) -> None:
        t = float(pipe.scheduler.timesteps[pipe.scheduler.step_index or 0])
        (pipe.transformer.disable_adapters if float(schedule.level(t)) > level else pipe.transformer.enable_adapters)()

    handle = pipe.transformer.register_forward_pre_hook(before)
    try:
        return drawn(name, pipe)
    finally:
        handle.remove()
        pipe.transformer.enable_adapters()


@pytest.mark.parametrize("name", PIPES)
def test_the_base_acts_above_the_level_whichever_way_time_runs(name: str) -> None:
    pipe = PIPES[name][0]()
    torch.manual_seed(5)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    tuned = drawn(name, pipe)
    pipe.transformer.disable_adapters()
    base = drawn(name, pipe)
    pipe.transformer.enable_adapters()
    with BaseAbove(pipe, 1e9):  # from pure noise on, which is above any level
        assert not torch.equal(drawn(name, pipe), base)
    last = float(NoiseSchedule.from_scheduler(pipe.scheduler).level(float(pipe.scheduler.timesteps[-1])))
    with BaseAbove(pipe, 0.9 * last):
        assert torch.equal(drawn(name, pipe), base)
    with BaseAbove(pipe, 1.1 * last):
        between = drawn(name, pipe)
    assert not torch.equal(between, base) and not torch.equal(between, tuned)
    assert torch.equal(between, by_hand(name, pipe, 1.1 * last))
    with BaseAbove(pipe, last):  # the level of a step is not above it, whatever the network's units round
        assert torch.equal(drawn(name, pipe), between)
    with pytest.raises(UserError, match="must be the fine-tuned one's kind"):
        BaseAbove(pipe, 1.0, tools.pipeline().unet)


# --- detectors --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_anisotropy_of_flow_is_that_of_the_networks_own_outputs() -> None:
    pipe = tools.tiny_sd3()
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(7))
    found = anisotropy(pipe, tools.PROMPTS, latents=noise, num_inference_steps=10, guidance_scale=5.0, **SIDES)
    cond, uncond, pooled, no_pool = pipe.encode_prompt(tools.PROMPTS, None, None)
    outputs = {
        t: [pipe.transformer(noise, e, p, torch.full((2,), float(t))).sample for e, p in ((cond, pooled), (uncond, no_pool))]
        for t in (1000, LOW_FLOW_TIMESTEP)
    }  # fmt: skip
    alpha = 1 - LOW_FLOW_TIMESTEP / 1000
    eps_c, eps_u = (noise + alpha * o for o in outputs[LOW_FLOW_TIMESTEP])
    for i, one in enumerate(found):
        assert one.norm == pytest.approx(float((outputs[1000][0][i] - outputs[1000][1][i]).norm()), rel=1e-3)
        expected = torch.nn.functional.cosine_similarity(eps_c[i] - eps_u[i], eps_u[i], dim=0).mean()
        assert one.alignment == pytest.approx(float(expected), abs=1e-4)
        wrong = torch.nn.functional.cosine_similarity(*(o[i] for o in outputs[LOW_FLOW_TIMESTEP]), dim=0).mean()
        assert one.alignment != pytest.approx(float(wrong), abs=1e-3), "negative control"


def test_the_low_timestep_has_stable_diffusions_noise_level() -> None:
    flow = NoiseSchedule.from_scheduler(tools.tiny_sd3().scheduler)
    from diffusers import DDIMScheduler

    sd = NoiseSchedule.from_scheduler(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    assert float(flow.level(LOW_FLOW_TIMESTEP)) == pytest.approx(float(sd.level(41)), rel=0.01)
    x0, eps = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64)
    found = flow.predicted_noise(eps - x0, sample=0.7 * x0 + 0.3 * eps, timestep=300)
    torch.testing.assert_close(found, eps)


# --- training ---------------------------------------------------------------------------------------------------------


def test_wens_rule_in_training_is_of_the_velocity() -> None:
    scheduler = tools.tiny_sd3().scheduler
    check_scheduler(scheduler)
    cond, uncond = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    cond[0], cond[1] = 1.0, 0.5  # norms 16 and 8, at any timestep
    for timesteps in (torch.tensor([0.5, 999.9]), torch.tensor([999.9, 0.5])):
        rule = Dropping(10.0, None, scheduler=scheduler, timesteps=1000, checkpoint=None)
        assert rule.keep(torch.ones(2), cond, uncond, timesteps).tolist() == [0.0, 1.0]


def test_agc_takes_any_timestep_into_the_mean_of_its_whole_one() -> None:
    rule = Dropping(None, 1.0, scheduler=None, timesteps=1000, checkpoint=None)
    assert rule.bank is not None
    rule.bank.take_in([499.2, 1000.0], [1.0, 1.0])
    found = rule.bank.limit(torch.tensor([499.9, 500.1, 1000.0, 999.5]))
    assert found.tolist() == pytest.approx([0.2, 0.0, 0.2, 0.2])


# --- texts ------------------------------------------------------------------------------------------------------------


def test_what_another_encoder_reads_is_not_cut() -> None:
    pipe = tiny_flow.tiny_sd3_pipeline()
    names = named_tokenizers(pipe)
    chosen, limits = reading(of_pipeline(pipe), names)
    assert chosen == [names["tokenizer_3"]] and limits == [255]  # CLIP's 22 letters are read on by T5
    bare = tiny_flow.tiny_sd3_pipeline(t5=False)
    assert reading(of_pipeline(bare), named_tokenizers(bare))[1] == [22, 22]
    lumina = tiny_more.tiny_lumina2_pipeline()
    (limit,) = reading(of_pipeline(lumina), named_tokenizers(lumina))[1]
    parts = {name: getattr(lumina, name) for name in ("tokenizer", "text_encoder")}
    with torch.no_grad():
        embed = [
            of_pipeline(lumina).embed(parts, ["x" * n])["hidden"] for n in (limit - 1, limit, limit + 1, limit + 9)
        ]
    assert limit > 0 and not torch.equal(embed[0], embed[1]) and torch.equal(embed[2], embed[3])
