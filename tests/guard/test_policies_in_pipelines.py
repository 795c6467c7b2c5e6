"""The policies in real pipelines: equal to loops written by hand, per image, restoring everything, on any prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import guard_tools as tools
import pytest
import torch

from ambient_sd.guard.policies import (
    CaptionWordRepetition,
    Compose,
    Despecification,
    DynamicTransition,
    GaussianEmbeddingNoise,
    OppositeGuidance,
    Policy,
    RandomNumbers,
    RandomTokens,
    Reanchoring,
    ScaleCap,
    StaticTransition,
)
from ambient_sd.guard.recorder import MemorizationGuard

STEPS, FEW, SCALE = 6, 3, 7.5
PIPELINES = {
    "sd": lambda: tools.pipeline("v_prediction", "ddim"),
    "sd-euler": lambda: tools.pipeline("epsilon", "euler"),
    "sdxl": tools.tiny_sdxl,
}
Rule = Callable[[float, list[torch.Tensor]], torch.Tensor]


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return PIPELINES[request.param]()


@pytest.fixture(scope="module", params=PIPELINES)
def looped(request: pytest.FixtureRequest) -> Any:
    """A pipeline for comparison with loops by hand, its stock latents, and those of the loop with the pipeline's scale."""
    pipe = PIPELINES[request.param]()
    return pipe, latents(pipe), by_hand(pipe, own)


def size(pipe: Any) -> int:
    return int(pipe.unet.config.sample_size)


def noise(pipe: Any, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 4, size(pipe), size(pipe), generator=torch.Generator().manual_seed(3))


def latents(pipe: Any, prompt: Any = tools.PROMPTS, count: int = 2, **kwargs: Any) -> torch.Tensor:
    """Sample the pipeline from fixed noise; its latents, before the decoder."""
    given = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"} | kwargs
    return pipe(prompt, latents=noise(pipe, count), **given).images


def guarded(
    pipe: Any, policy: Policy, *args: Any, threshold: float | None = None, when: Any = "always", **kwargs: Any
) -> Any:
    with MemorizationGuard(pipe, policy, threshold, when=when) as guard:
        images = latents(pipe, *args, **kwargs)
    return images, guard


@torch.no_grad()
def by_hand(pipe: Any, rule: Rule) -> torch.Tensor:
    """A denoising loop of our own, on one image at a time, with the scale `rule(t, norms so far)`; no guard in it."""
    results = []
    for i, prompt in enumerate(tools.PROMPTS):
        pipe.scheduler.set_timesteps(STEPS)
        encoded = pipe.encode_prompt(
            prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        added: dict[str, Any] = {}
        if len(encoded) == 4:
            side = size(pipe) * pipe.vae_scale_factor
            ids = torch.tensor([[side, side, 0, 0, side, side]]).repeat(2, 1).float()
            added = {"added_cond_kwargs": {"text_embeds": torch.cat([encoded[3], encoded[2]]), "time_ids": ids}}
        embeds = torch.cat([encoded[1], encoded[0]])
        x = noise(pipe)[i : i + 1] * pipe.scheduler.init_noise_sigma
        norms: list[torch.Tensor] = []
        for t in pipe.scheduler.timesteps:
            scaled = pipe.scheduler.scale_model_input(torch.cat([x] * 2), t)
            uncond, cond = pipe.unet(scaled, t, encoder_hidden_states=embeds, **added).sample.chunk(2)
            alpha = pipe.scheduler.alphas_cumprod[round(float(t))].sqrt()
            factor = alpha if pipe.scheduler.config.prediction_type == "v_prediction" else 1.0
            norms.append((cond - uncond).norm() * factor)
            x = pipe.scheduler.step(uncond + rule(float(t), norms) * (cond - uncond), t, x).prev_sample
        results.append(x)
    return torch.cat(results)


def own(t: float, norms: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor(SCALE)


def transition(points: list[tuple[float, float]]) -> Rule:
    """Scales by timestep: the first `(scale, until)` with t > until, else the pipeline's."""
    return lambda t, norms: torch.tensor(next((scale for scale, until in points if t > until), SCALE))


def first_minimum(t: float, norms: list[torch.Tensor]) -> torch.Tensor:
    curve = [float(d) for d in norms]
    return torch.tensor(SCALE if any(a > b < c for a, b, c in zip(curve, curve[1:], curve[2:], strict=False)) else 0.0)


def middle_norm(pipe: Any) -> float:
    """A norm that some evaluations of the unguarded run exceed and others do not."""
    with MemorizationGuard(pipe) as guard:
        latents(pipe)
    norms = sorted(d for image in guard.report for d in image.curve)[STEPS // 2 : -STEPS // 2]
    _, below, above = max(
        (b - a, a, b) for a, b in itertools.pairwise(norms)
    )  # away from any norm: rounding decides nothing
    return (below + above) / 2


SCHEDULES: dict[str, tuple[Policy, Rule]] = {
    "STP": (StaticTransition(500), transition([(0.0, 500)])),
    "OG": (OppositeGuidance(-2, 650), transition([(-2.0, 650)])),
    "OG+STP": (Compose(OppositeGuidance(), StaticTransition()), transition([(-2.0, 650), (0.0, 500)])),
    "DTP": (DynamicTransition(norm="noise"), first_minimum),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_guidance_by_schedule_equals_a_loop_written_by_hand(looped: Any, name: str) -> None:
    policy, rule = SCHEDULES[name]
    pipe, stock, ours = looped
    assert torch.allclose(stock, ours, atol=1e-3)  # the loop by hand is the pipeline's
    found, guard = guarded(pipe, policy)
    assert torch.allclose(found, by_hand(pipe, rule), atol=1e-3)
    assert not torch.allclose(found, stock, atol=1e-1)  # control: the schedule matters
    timesteps = guard.report[0].timesteps
    assert timesteps[0] > 650 and timesteps[-1] < 500


def test_guidance_by_score_equals_a_loop_written_by_hand(looped: Any) -> None:
    pipe, stock, _ = looped
    d = middle_norm(pipe)
    cap, _ = guarded(pipe, ScaleCap(d / 2))
    assert torch.allclose(cap, by_hand(pipe, lambda t, norms: SCALE * (d / 2 / norms[-1]).clamp(max=1)), atol=1e-3)
    less, _ = guarded(pipe, Despecification(4 / d, d))
    rule: Rule = lambda t, norms: SCALE - (norms[-1] > d) * (4 / d * norms[-1]).clamp(max=SCALE - 1)  # noqa: E731
    assert torch.allclose(less, by_hand(pipe, rule), atol=1e-3)
    for images in (cap, less):
        assert not torch.allclose(images, stock, atol=1e-2)  # control
    for idle in (ScaleCap(1e6), Despecification(1, 1e6), StaticTransition(1000), OppositeGuidance(until=1000)):
        assert torch.equal(guarded(pipe, idle)[0], stock)


def test_re_anchoring_is_the_softer_prompt_with_the_original_as_negative_prompt(pipe: Any) -> None:
    found, guard = guarded(pipe, Reanchoring(0.0, {"a cat": "pet", "the red dog": ["it"]}, rule="all"))
    stock = latents(pipe, ["pet", "it"], negative_prompt=tools.PROMPTS)
    assert torch.allclose(found, stock, atol=1e-4)
    assert not torch.allclose(found, latents(pipe, ["pet", "it"]), atol=1e-2)  # control: the anchor matters
    for image in guard.report:
        assert image.mitigated and image.first_score_before is not None
        assert image.curve[0] == pytest.approx(image.first_score_after, rel=1e-3)
    _, watching = guarded(pipe, StaticTransition(1000))
    for image, seen in zip(guard.report, watching.report, strict=True):
        assert image.first_score_before == pytest.approx(seen.curve[0], rel=1e-4)


@pytest.mark.parametrize(
    "policy", [RandomTokens(), CaptionWordRepetition(), RandomNumbers()], ids=lambda p: type(p).__name__
)
def test_a_perturbed_prompt_gives_the_images_of_that_prompt(pipe: Any, policy: Any) -> None:
    texts = [policy.perturb(prompt) for prompt in tools.PROMPTS]
    assert texts != tools.PROMPTS
    found, guard = guarded(pipe, policy)
    assert torch.allclose(found, latents(pipe, texts), atol=1e-4)
    assert [image.prompt for image in guard.report] == tools.PROMPTS
    # One prompt, two images: each has its own perturbation, as if it had been sampled alone.
    both, _ = guarded(pipe, policy, "a cat", num_images_per_prompt=2)
    assert torch.allclose(both, latents(pipe, [policy.perturb("a cat", 0), policy.perturb("a cat", 1)]), atol=1e-4)


def test_noisy_embeddings_give_the_images_of_those_embeddings(pipe: Any) -> None:
    encoded = pipe.encode_prompt(
        prompt=tools.PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    given = dict(zip(names, encoded, strict=False))
    own = {
        **given,
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "output_type": "latent",
        "latents": noise(pipe),
    }
    stock = pipe(**own).images
    with MemorizationGuard(pipe, GaussianEmbeddingNoise()):
        found = pipe(**own).images
    drawn = found, *(guarded(pipe, GaussianEmbeddingNoise())[0],)
    assert not torch.allclose(drawn[0], stock, atol=1e-3) and not torch.allclose(drawn[1], stock, atol=1e-3)
    seen: list[torch.Tensor] = []
    with MemorizationGuard(pipe, GaussianEmbeddingNoise()):
        hook = pipe.unet.register_forward_hook(
            lambda m, a, k, o: seen.append(k["encoder_hidden_states"]), with_kwargs=True
        )
        again = latents(pipe)
        hook.remove()
    assert torch.equal(again, drawn[1])
    difference = seen[0][2:] - given["prompt_embeds"]
    other = seen[0][:2] - given["negative_prompt_embeds"]
    assert all(torch.equal(embeds, seen[0]) for embeds in seen)
    for noisy in (difference, other):
        assert float(noisy.detach().std()) == pytest.approx(0.1, rel=0.15)
    both = {"prompt_embeds": seen[0][2:], "negative_prompt_embeds": seen[0][:2]}
    assert torch.allclose(pipe(**(own | both)).images, again, atol=1e-4)


EVERY: dict[str, Callable[[], Policy]] = {
    "STP": StaticTransition,
    "DTP": DynamicTransition,
    "OG": OppositeGuidance,
    "cap": lambda: ScaleCap(1e-3),
    "G_spe": lambda: Despecification(100.0, 0.0),
    "PRSS": lambda: Reanchoring(0.0),
    "RT": RandomTokens,
    "CWR": CaptionWordRepetition,
    "RNA": RandomNumbers,
    "GNI": GaussianEmbeddingNoise,
    "GNI+OG+STP": lambda: Compose(GaussianEmbeddingNoise(), OppositeGuidance(), StaticTransition()),
    "RT+GNI+cap": lambda: Compose(RandomTokens(), GaussianEmbeddingNoise(), ScaleCap(1e-3)),
}


# One of each way to act: on scales, of which some remember, on prompts, on embeddings, and several together.
WAYS = ["STP", "DTP", "PRSS", "RT", "GNI", "GNI+OG+STP", "RT+GNI+cap"]


@pytest.mark.parametrize(("name", "kind"), [*(("sd", kind) for kind in EVERY), *(("sdxl", kind) for kind in WAYS)])
def test_images_that_are_not_flagged_stay_the_pipelines_own_to_the_bit(name: str, kind: str) -> None:
    pipe, policy = PIPELINES[name](), EVERY[kind]()
    prompts = ["a cat", "the red dog", "b"]
    with MemorizationGuard(pipe) as guard:
        stock = latents(pipe, prompts, 3, num_inference_steps=FEW)
    first = [image.curve[0] for image in guard.report]
    threshold = sum(sorted(first)[1:]) / 2  # the highest is flagged, and no other
    found, flagged = guarded(pipe, policy, prompts, 3, threshold=threshold, when="flagged", num_inference_steps=FEW)
    for i, d in enumerate(first):
        assert torch.equal(found[i], stock[i]) == (d < threshold)
    everywhere, _ = guarded(pipe, policy, prompts, 3, num_inference_steps=FEW)
    assert not any(torch.equal(everywhere[i], stock[i]) for i in range(3))  # control
    assert [image.mitigated for image in flagged.report].count(True) <= 1


@pytest.mark.parametrize("kind", WAYS)
def test_an_exception_at_any_step_restores_everything(kind: str) -> None:
    pipe, policy = PIPELINES["sd"](), EVERY[kind]()
    latents(pipe, num_inference_steps=1)  # a stock run adds attributes of its own
    before, expected = tools.state(pipe), guarded(pipe, policy, num_inference_steps=FEW)[0]
    assert tools.state_differs(pipe, before) == []

    class Stops(Exception):
        pass

    for at in range(FEW):

        def stop(pipe: Any, step: int, t: Any, given: dict[str, Any], at: int = at) -> dict[str, Any]:
            if step == at:
                raise Stops
            return given

        guard = MemorizationGuard(pipe, policy)
        with pytest.raises(Stops), guard:
            latents(pipe, callback_on_step_end=stop, num_inference_steps=FEW)
        assert tools.state_differs(pipe, before) == [] and guard.history == []
    assert torch.equal(
        guarded(pipe, policy, num_inference_steps=FEW)[0], expected
    )  # and a policy keeps nothing of a run that broke off


@pytest.mark.parametrize("place", ["begin", "step"])
def test_an_exception_in_a_policy_restores_everything(place: str) -> None:
    class Fails(GaussianEmbeddingNoise):
        def begin(self, start: Any) -> Any:
            return self.fail("begin") or super().begin(start)

        def step(self, step: Any) -> None:
            return self.fail("step") if step.index == 2 else None

        def fail(self, here: str) -> None:
            if here == place:
                raise RuntimeError("inside")

    pipe = PIPELINES["sd"]()
    latents(pipe, num_inference_steps=1)
    before = tools.state(pipe)
    for policy in (Fails(), Compose(Fails(), OppositeGuidance()), Compose(RandomTokens(), Fails())):
        with pytest.raises(RuntimeError, match="inside"), MemorizationGuard(pipe, policy):
            latents(pipe)
        assert tools.state_differs(pipe, before) == []


HOSTILE = ["", "a" * 10_000, "\x00\x1b[31m\x7f", "<b>&amp;</b> ../../etc", "x " * 500, "'; DROP TABLE\n\r\t"]


@pytest.mark.parametrize("kind", [*WAYS, "CWR", "RNA"])
def test_hostile_prompts_do_no_harm(kind: str) -> None:
    pipe, policy = PIPELINES["sd"](), EVERY[kind]()
    found, guard = guarded(pipe, policy, HOSTILE, len(HOSTILE), num_inference_steps=2)
    assert bool(torch.isfinite(found).all())
    assert [image.prompt for image in guard.report] == HOSTILE
