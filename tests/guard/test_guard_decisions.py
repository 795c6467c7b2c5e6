"""Whether an image is flagged: by a step that carries a signal, by unmitigated scores, by a threshold that fits; else nobody says "not flagged"."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import guard_tools as tools
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from guard_calibration import calibration
from peft import LoraConfig

from ambient_sd.guard import policies
from ambient_sd.guard.anisotropy import anisotropy, fitted
from ambient_sd.guard.attribution import TokenGradients, attribute
from ambient_sd.guard.base_above import BaseAbove
from ambient_sd.guard.calibration import Calibration, Entry, Sampling
from ambient_sd.guard.pipeline import AmbientSDPipeline
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.guard.relative import Relation
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate

STEPS = 3


def zero_snr(prediction_type: str = "v_prediction", kind: type = DDIMScheduler) -> Any:
    """A pipeline whose first of three timesteps, 999, has alpha = 0 (Euler: 2**-12)."""
    pipe = tools.pipeline(prediction_type)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return pipe


class Table:
    """Thresholds by number of evaluations."""

    origin = "a table of the test"

    def __init__(self, **values: float) -> None:
        self.values = values

    def threshold(self, steps: int, images_per_prompt: int) -> float:
        return self.values[f"s{steps}"]


def scored(pipe: Any, policy: Any = None, threshold: Any = None, **options: Any) -> Any:
    call = options.pop("call", {})
    with MemorizationGuard(pipe, policy, threshold, **options) as guard:
        tools.sample(pipe, tools.PROMPTS, **call)
    return guard.report


# -- steps without a signal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_scores_begin_at_the_first_step_with_a_signal(kind: type) -> None:
    pipe = zero_snr(kind=kind)
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(
        lambda _, __, out: seen.append(
            (out[0].chunk(2)[1].double() - out[0].chunk(2)[0].double()).flatten(1).norm(dim=1)
        )
    )
    reports = scored(pipe)
    handle.remove()
    alphas = pipe.scheduler.alphas_cumprod.double().sqrt()
    assert len(seen) == STEPS and alphas[999] < 1e-3
    for i, image in enumerate(reports):
        expected = [float(alphas[t] * seen[k + 1][i]) for k, t in enumerate((666, 332)) if kind is DDIMScheduler]
        if kind is DDIMScheduler:
            assert image.curve == pytest.approx(expected, rel=1e-5) and image.timesteps == [666, 332]
        assert len(image.curve) == STEPS - 1 and min(image.curve) > 0
        assert image.score == pytest.approx(sum(image.curve) / len(image.curve))


def test_an_early_decision_waits_for_the_first_step_with_a_signal() -> None:
    pipe = zero_snr()
    first = [image.curve[0] for image in scored(pipe)]
    for share, flagged in ((0.99, True), (1.01, False)):
        guard = MemorizationGuard(pipe, threshold=share * first[0], stop_after=1)
        (image,) = guard.decide("a cat", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(3))
        assert (
            image.flagged is flagged and len(image.curve) == 1 and image.curve[0] == pytest.approx(first[0], rel=1e-4)
        )


@pytest.mark.parametrize("policy", [policies.ScaleCap(1e-6), policies.PromptOptimization(1e-3, max_steps=1), policies.GaussianEmbeddingNoise(1.0)])  # fmt: skip
def test_flagged_images_are_acted_on_at_zero_terminal_snr(policy: Any) -> None:
    pipe = zero_snr()
    low, high = sorted(image.curve[0] for image in scored(pipe))
    stock = tools.sample(pipe, tools.PROMPTS)
    with MemorizationGuard(pipe, policy, (low + high) / 2, when="flagged") as guard:
        got = tools.sample(pipe, tools.PROMPTS)
    assert sorted(image.active for image in guard.report) == [False, True]
    for i, image in enumerate(guard.report):
        assert image.flagged is image.active is not torch.equal(got[i], stock[i])


def test_runs_without_any_signal_are_refused_in_one_line() -> None:
    for pipe, steps, policy, named in (
        (zero_snr(), 1, None, "no step of this run carries a score"),
        (zero_snr("epsilon"), 3, None, "the network predicts epsilon"),
        (zero_snr("epsilon", EulerDiscreteScheduler), 3, None, "the network predicts epsilon"),
        (zero_snr(), 3, policies.LatentOptimization(1.0), "moves the initial latent"),
        (zero_snr(), 3, policies.Compose(policies.SAIL(1.0), policies.StaticTransition()), "moves the initial latent"),
    ):
        with MemorizationGuard(pipe, policy), pytest.raises(UserError, match=named) as error:
            tools.sample(pipe, steps=steps)
        assert "\n" not in str(error.value)
    # Control: the same samplers from a timestep with a signal.
    pipe = zero_snr("epsilon")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    assert len(scored(pipe)[0].curve) == STEPS


def test_anisotropy_takes_its_norm_where_there_is_a_signal() -> None:
    pipe = zero_snr()
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    found = anisotropy(pipe, tools.PROMPTS, latents=noise, num_inference_steps=STEPS)
    with torch.no_grad():
        cond, uncond = pipe.encode_prompt(tools.PROMPTS, "cpu", 1, True)
        outputs = [pipe.unet(noise, 666, encoder_hidden_states=e).sample for e in (cond, uncond)]
    norms = (outputs[0] - outputs[1]).flatten(1).norm(dim=1) * pipe.scheduler.alphas_cumprod[666].sqrt()
    assert [one.norm for one in found] == pytest.approx(norms.tolist(), rel=1e-4) and min(norms) > 0.01
    with pytest.raises(UserError, match="no step of this run"):
        anisotropy(pipe, "a cat", num_inference_steps=1)
    with pytest.raises(UserError, match="the norm of the ordinary images has no spread"):
        fitted(torch.tensor([[0.0, 0.1], [0.0, 0.2]]))


def test_words_are_explained_at_the_first_step_with_a_signal() -> None:
    found = attribute(zero_snr(), "a cat", num_inference_steps=STEPS, stop_after=1)
    assert found.steps == 1 and max(found.scores) > 0


def test_a_policy_that_acts_before_the_first_signal_leaves_no_unmitigated_score() -> None:
    for policy in (policies.StaticTransition(), policies.GaussianEmbeddingNoise(1.0)):
        for image in scored(zero_snr(), policy, Table(s1=1e-9)):
            assert image.flagged is None and "before the first step that carries a score" in str(image.undecided)
    # Control: one that does nothing at the step without a signal.
    assert {image.flagged for image in scored(zero_snr(), policies.ScaleCap(1e9), Table(s1=1e-9))} == {True}


# -- under a policy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [policies.StaticTransition(), policies.DynamicTransition(), policies.OppositeGuidance(), policies.GaussianEmbeddingNoise(3.0), policies.CaptionWordRepetition(),
     policies.PromptOptimization(1e-3, max_steps=1), policies.LatentOptimization(1e-3, max_steps=1), policies.Reanchoring(1e-6), policies.AttentionRescaling()],
    ids=lambda policy: type(policy).__name__,
)  # fmt: skip
def test_flags_under_a_policy_come_from_the_unmitigated_first_step(policy: Any) -> None:
    pipe = tools.pipeline()
    plain = [image.curve[0] for image in scored(pipe)]
    edge = sum(plain) / 2
    reports = scored(pipe, policy, Table(s1=edge))
    assert [image.decision_score for image in reports] == pytest.approx(plain, rel=1e-4)
    assert [image.flagged for image in reports] == [first >= edge for first in plain]
    assert {(image.threshold, image.decision_steps) for image in reports} == {(edge, 1)}
    # Its own score is another one: by it the flags would have been the path's.
    assert all(image.score != pytest.approx(image.decision_score, rel=1e-3) for image in reports)


def test_a_number_for_a_whole_run_flags_nothing_under_a_policy() -> None:
    pipe = tools.pipeline()
    for image in scored(pipe, policies.StaticTransition(), 1e-9):
        assert (image.flagged, image.threshold) == (None, None) and "which the policy changes" in str(image.undecided)
    assert {i.flagged for i in scored(pipe, policies.StaticTransition(), 1e-9, when="flagged")} == {True}
    assert {i.flagged for i in scored(pipe, policies.GaussianEmbeddingNoise(), 1e-9, stop_after=1)} == {True}
    # Control: what only watches changes no score.
    watched = scored(pipe, TokenGradients(), 1e-9)
    assert [i.decision_score for i in watched] == [i.score for i in watched] == [i.score for i in scored(pipe)]


# -- scores that are none ------------------------------------------------------------------------------------------


def poisoned(pipe: Any, image: int) -> None:
    """One image overflows, as in float16."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[image :: len(tools.PROMPTS)] = float("nan")
        return output

    pipe.unet.conv_out.register_forward_hook(hook)


def test_a_score_that_is_no_number_is_never_not_flagged() -> None:
    pipe = tools.pipeline()
    poisoned(pipe, 1)
    for options in ({"threshold": 1e9}, {"threshold": Table(s1=1e9), "policy": policies.StaticTransition()}):
        clean, broken = scored(pipe, **options)
        assert clean.flagged is False and clean.undecided is None
        assert broken.flagged is None and "NaN or Inf" in str(broken.undecided)
    for policy in (policies.StaticTransition(), policies.GaussianEmbeddingNoise()):
        reports = scored(pipe, policy, 1e9, when="flagged")
        assert [image.active for image in reports] == [False, True] and reports[1].flagged is None
    with pytest.raises(UserError, match="anisotropy is NaN or Inf"):
        anisotropy(pipe, tools.PROMPTS, num_inference_steps=STEPS)
    with pytest.raises(UserError, match="a norm is NaN or Inf"):
        Relation.fit(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_threshold_of_zero_or_none_finite_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="above 0"):
        MemorizationGuard(tools.pipeline(), threshold=value)
    with pytest.raises(UserError, match="above 0"):
        scored(tools.pipeline(), threshold=Table(s3=value))


def test_guidance_changed_on_the_way_leaves_it_undecided() -> None:
    pipe = tools.pipeline()

    def lower(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 3.0
        return kwargs

    for image in scored(pipe, threshold=1e9, call={"callback_on_step_end": lower}):
        assert image.flagged is None and "guidance_scale changed from 7.5 to 3" in str(image.undecided)
    # The first step is over by then.
    assert {i.flagged for i in scored(pipe, threshold=1e9, stop_after=1, call={"callback_on_step_end": lower})} == {
        False
    }


def test_a_number_against_a_negative_prompt_is_said(capsys: Any) -> None:
    image = scored(tools.pipeline(), threshold=1e9, call={"negative_prompt": ["blurry", ""]})
    assert ["negative prompt" in one.threshold_origin for one in image] == [True, False]


# -- thresholds that do not fit ------------------------------------------------------------------------------------


RATE = Estimate(0.01, 0.0, 0.05, 500)


def fitting(pipe: Any, **changes: Any) -> Calibration:
    how = Sampling.of(pipe, num_inference_steps=STEPS, guidance_scale=7.5, height=32, width=32)
    entries = [Entry(1, 1, 1e-9, RATE), Entry("all", 1, 1e9, RATE)]
    return calibration(pipe, **({"sampling": how, "entries": entries, "evaluations": STEPS} | changes))


def lora(pipe: Any) -> Any:
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    return pipe


MISFITS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "scale": (lambda p: p, {"guidance_scale": 3.0}, "guidance_scale 7.5 was calibrated, not 3.0"),
    "steps": (lambda p: p, {"steps": 2}, "num_inference_steps 3 was calibrated, not 2"),
    "size": (lambda p: p, {"height": 48, "width": 32}, "height 32 was calibrated, not 48"),
    "negative": (lambda p: p, {"negative_prompt": ["", "blurry"]}, "without a negative prompt"),
    "rescale": (lambda p: p, {"guidance_rescale": 0.7}, "without guidance_rescale"),
    "eta": (lambda p: p, {"eta": 1.0}, "without eta"),
    "precision": (lambda p: p.to(torch.bfloat16), {}, "calibrated in float32, not bfloat16"),
    "weights": (lambda p: setattr(p, "unet", tools.tiny.tiny_pipeline(seed=1).unet) or p, {}, "its weights are others"),
    "adapter": (lora, {}, "adapters are others"),
}


@pytest.mark.parametrize("name", list(MISFITS))
def test_a_calibration_is_refused_where_it_does_not_fit(name: str, caplog: Any) -> None:
    change, call, named = MISFITS[name]
    pipe = tools.pipeline()
    made = fitting(pipe)
    assert {image.flagged for image in scored(pipe, threshold=made)} == {False}  # control
    pipe = change(pipe)
    own = AmbientSDPipeline(**pipe.components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match=named):
        scored(pipe, threshold=made, call=call)
    # The pipeline that has loaded it by itself warns, flags nothing, and says so.
    own.calibration = made
    options = {"num_inference_steps": STEPS, "output_type": "latent"} | call
    if "steps" in options:
        options["num_inference_steps"] = options.pop("steps")
    with caplog.at_level(logging.WARNING):
        image = own(tools.PROMPTS, **options).memorization[0]
    assert (image.flagged, image.threshold) == (None, None) and named in str(image.undecided) and named in caplog.text


def test_a_calibration_does_not_hold_for_another_task_or_an_adapter_at_another_strength() -> None:
    pipe = lora(tools.pipeline())
    made = fitting(pipe)
    with pytest.raises(UserError, match="own strength"):
        scored(pipe, threshold=made, call={"cross_attention_kwargs": {"scale": 0.5}})
    with BaseAbove(pipe, 1.0), pytest.raises(UserError, match="without base_above"):
        scored(pipe, threshold=made)
    assert scored(pipe, threshold=made)[0].flagged is False
    pipe.unet.disable_adapters()
    with pytest.raises(UserError, match="adapters are others"):
        scored(pipe, threshold=made)
    other = StableDiffusionImg2ImgPipeline(**tools.pipeline().components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with MemorizationGuard(other, threshold=fitting(other)), pytest.raises(UserError, match="on text to image"):
        tools.sample(other, image=torch.rand(1, 3, 32, 32), strength=1.0)


def test_custom_timesteps_are_not_the_calibrated_ones() -> None:
    pipe = tools.pipeline(scheduler="euler")
    made = fitting(pipe)
    assert scored(pipe, threshold=made)[0].flagged is False
    with pytest.raises(UserError, match="own timesteps"):
        scored(pipe, threshold=made, call={"sigmas": [10.0, 5.0, 1.0]})


def test_a_useless_threshold_is_refused_and_an_untried_one_says_so() -> None:
    pipe = tools.pipeline()
    bad = Entry("all", 1, 1e9, RATE, Estimate(0.45, 0.3, 0.6, 20))
    with pytest.raises(UserError, match=r"useless: AUC 0\.450"):
        scored(pipe, threshold=fitting(pipe, entries=[bad], memorized=20))
    untried = scored(pipe, threshold=fitting(pipe))
    assert "AUC unknown: nothing shows that it works" in untried[0].threshold_origin
    good = Entry("all", 1, 1e9, RATE, Estimate(0.95, 0.9, 0.99, 20))
    told = scored(pipe, threshold=fitting(pipe, entries=[good], memorized=20))
    assert "AUC 0.95 [0.90, 0.99] on 20 memorized ones" in told[0].threshold_origin
