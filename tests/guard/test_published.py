"""Mitigations as the published code has them: each against that code's formula, written out here from scratch."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import guard_tools
import latent_tools as tools
import pytest
import torch
from guard_calibration import calibration
from linear_network import LinearNetwork, encoded, guided, started, step_of

from ambient_sd.guard.attribution import TokenGradients
from ambient_sd.guard.calibration import Calibration
from ambient_sd.guard.policies import (
    SAIL,
    AttentionGuard,
    Compose,
    DynamicTransition,
    GaussianEmbeddingNoise,
    Policy,
    PromptOptimization,
    Reanchoring,
    StaticTransition,
    Step,
)
from ambient_sd.guard.policies.guard_attenuation import _parallel_part
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.utils.errors import UserError

G = 7.5
ROW = torch.tensor([0])

# -- PRSS ----------------------------------------------------------------------------------------------------------


def prss(soft: torch.Tensor, own: torch.Tensor, uncond: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The released rule for one image: two thresholds, l_target_pr and mag_thres_pr, and a scaler between them."""
    magnitude = float((soft - uncond).square().sum().sqrt())
    if magnitude <= low:
        return uncond + G * (soft - uncond)
    scaler = (G * low - high) / (G - 1)
    s = min((magnitude - scaler) / (high - scaler) * G, G)
    return own + s * (soft - own) + (G - s) * (soft - uncond)


@pytest.mark.parametrize("pooled", [True, False])
def test_prss_decides_at_every_step_by_the_softer_prompts_norm(pooled: bool) -> None:
    prompts = ["a red cat", "b", "the dog of it"]
    network = LinearNetwork(3, pooled=pooled)
    start = started(prompts, network)
    own, uncond = network.predict("cond"), network.predict("uncond")
    norms = (own - uncond).flatten(1).norm(dim=1)
    threshold = float(norms.min()) * 1.0001  # one image keeps its prompt
    policy = Reanchoring(threshold, softer="pet", least=0.0)
    change = policy.begin(start)
    assert change.changed == (norms > threshold).tolist() and change.uncond_embeds is None
    soft = network.predict("cond", embeds=change.embeds, pooled=change.pooled)
    magnitude = (soft - uncond).flatten(1).norm(dim=1)
    chosen = change.changed.index(True)
    d = float(magnitude[chosen])
    seen = set()
    for low, high in ((d * 1.01, d * 2), (d * 0.5, d * 1.5), (d * 0.25, d * 0.75)):  # below L, between, above M
        policy.least, policy.full = low, high
        step = Step(3, torch.tensor(500.0), soft, uncond, [magnitude], G, network)
        found = guided(policy.step(step), G)
        for i in range(3):
            expected = (
                prss(soft[i], own[i], uncond[i], low, high) if change.changed[i] else uncond[i] + G * (own - uncond)[i]
            )
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-3)
        seen.add(round(float(found[chosen].flatten()[0]), 2))
        whole = own[chosen] + G * (soft[chosen] - own[chosen])  # the paper's equation: reached above M only
        assert torch.allclose(found[chosen], whole, rtol=1e-4, atol=1e-3) == (high < d)
    assert len(seen) == 3  # control: the thresholds decide


def test_prss_thresholds_are_one_three_and_five() -> None:
    policy = Reanchoring(1.0)
    assert (policy.threshold, policy.least, policy.full, policy.rule) == (1.0, 3.0, 5.0, "step")


def test_prss_search_may_return_the_original() -> None:
    network = LinearNetwork(1)
    start = started(["a red cat"], network)
    own, uncond = network.predict("cond"), network.predict("uncond")
    norm = float((own - uncond).norm())
    louder = encoded(["pet"])._replace(embeds=5 * encoded(["a red cat"]).embeds - 4 * network.uncond.embeds,
                                       pooled=5 * encoded(["a red cat"]).pooled - 4 * network.uncond.pooled)  # fmt: skip
    start = dataclasses.replace(start, encode=lambda texts: louder)
    policy = Reanchoring(norm / 10, softer="louder", least=norm / 4, full=norm / 2)
    change = policy.begin(start)
    assert change.embeds is not None and torch.equal(change.embeds, network.cond.embeds)
    assert change.first_score_after == pytest.approx([norm])
    step = Step(0, torch.tensor(999.0), own, uncond, [torch.tensor([norm])], G, network)
    # Above M with the original as its own softer prompt nothing is left but the original's prediction.
    torch.testing.assert_close(guided(policy.step(step), G), own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own[0], prss(own[0], own[0], uncond[0], norm / 4, norm / 2), rtol=1e-4, atol=1e-4)
    forced = Reanchoring(norm / 10, softer="louder", rule="all").begin(start)  # control: there the text is taken
    assert forced.embeds is not None and torch.equal(forced.embeds, louder.embeds)


# -- GUARD ---------------------------------------------------------------------------------------------------------


def test_guards_repulsion_falls_along_a_cosine() -> None:
    halves = tools.tiny_unet_halves()
    cond, uncond = halves.predict("cond"), halves.predict("uncond")
    policy = AttentionGuard(attenuation=1.0, orthogonalize=False)  # eps_plus = eps_c
    for k, total in ((0, 50), (10, 50), (25, 50), (49, 50), (3, 4)):
        cond_, uncond_ = policy.step(tools.step_of(halves, G, k, total))
        r = 2.0 * math.cos(k / total * math.pi / 2)
        torch.testing.assert_close(
            uncond_ + G * (cond_ - uncond_), uncond + (G - r) * (cond - uncond), rtol=1e-9, atol=1e-12
        )
    assert AttentionGuard(repulsion=0).threshold == 0.01 and AttentionGuard().threshold == 0.1  # as in its README
    with pytest.raises(UserError, match=r'number of steps is unknown.*decay="none"'):
        policy.step(tools.step_of(halves, G, 0, None))


def test_guards_nearly_parallel_directions_are_made_orthogonal() -> None:
    a = tools.randn(1, 2, 3, 3, seed=4)
    b = tools.randn(1, 2, 3, 3, seed=5)
    across = b - (a * b).sum() / (a * a).sum() * a
    across = across / across.norm() * a.norm()
    plus = torch.cat([0.7 * a + 0.1 * across, a + across, 3 * a + 0.1 * across, -a])
    expected = []
    for p in plus:
        dot, nn, pp = (float(x) for x in ((p * a).sum(), (a * a).sum(), (p * p).sum()))
        coefficient = max(-2.0, min(2.0, dot / nn))
        expected.append(coefficient if dot / math.sqrt(nn * pp) > 0.9 else 0.0)
    assert expected[1] == expected[3] == 0 and expected[2] == 2.0 and expected[0] == pytest.approx(0.7)
    found = _parallel_part(plus, a.expand(4, -1, -1, -1)).flatten()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-6, atol=1e-9)


def test_guards_step_takes_the_parallel_part_out() -> None:
    halves = tools.tiny_unet_halves()
    cond, uncond = halves.predict("cond"), halves.predict("uncond")
    cond_, uncond_ = AttentionGuard(attenuation=1.0).step(tools.step_of(halves, G))  # eps_plus = eps_c: wholly parallel
    torch.testing.assert_close(uncond_ + G * (cond_ - uncond_), uncond - 2.0 * (cond - uncond), rtol=1e-6, atol=1e-8)
    alone = AttentionGuard(repulsion=0, attenuation=1.0)  # the attenuated branch alone is plain guidance by it
    torch.testing.assert_close(alone.step(tools.step_of(halves, G))[0], cond, rtol=1e-9, atol=1e-12)


# -- DTP -----------------------------------------------------------------------------------------------------------


def test_dtp_takes_the_minimum_of_the_outputs_and_on_request_of_the_noise() -> None:
    """|| v_c - v_u || turns at the third value; times a growing alpha_t it has turned at the second already."""
    raw, alpha = [4.0, 3.0, 2.8, 5.0], [0.5, 0.4, 0.9, 1.0]
    for count in range(1, 5):
        step = step_of([[r * a] for r, a in zip(raw, alpha, strict=True)][:count])
        step = dataclasses.replace(step, output_norms=[torch.tensor([r]) for r in raw[:count]])
        published, ours = (bool(DynamicTransition(norm=n).scale(step).isnan()) for n in ("output", "noise"))  # type: ignore[arg-type]
        assert (published, ours) == (count >= 4, count >= 3)
    assert DynamicTransition().norm == "output"
    with pytest.raises(UserError, match="norm 'v'"):
        DynamicTransition(norm="v")  # type: ignore[arg-type]


def test_the_guard_hands_out_norms_of_the_raw_outputs_and_the_number_of_steps() -> None:
    pipe = guard_tools.pipeline("v_prediction")
    by_hand: list[list[float]] = []
    seen: list[Step] = []

    class Watch(Policy):
        def step(self, step: Step) -> None:
            seen.append(step)

    def count(module: Any, args: Any, output: Any) -> None:
        uncond, cond = output[0].double().chunk(2)
        by_hand.append([float((c - u).square().sum().sqrt()) for c, u in zip(cond, uncond, strict=True)])

    handle = pipe.unet.register_forward_hook(count)
    with MemorizationGuard(pipe, Watch()) as guard:
        guard_tools.sample(pipe, guard_tools.PROMPTS, steps=4)
    handle.remove()
    assert [step.total for step in seen] == [4] * 4
    torch.testing.assert_close(torch.stack(seen[-1].output_norms), torch.tensor(by_hand), rtol=1e-5, atol=1e-6)
    alphas = pipe.scheduler.alphas_cumprod.sqrt()
    for k, t in enumerate(guard.report[0].timesteps):
        assert guard.report[0].curve[k] == pytest.approx(float(alphas[int(t)]) * by_hand[k][0], rel=1e-4)


# -- SAIL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "sign", "sigma"), [(1.0, 1, 1.0), (0.6, -1, 0.8)], ids=["epsilon", "v"])
def test_sails_code_steps_from_where_the_search_began(factor: float, sign: int, sigma: float) -> None:
    """o_c - o_u = x^2: the loss, and its gradient, which passes through the direction as if that were taken at x."""
    first, x = tools.randn(1, 2, 2, 2, seed=1), tools.randn(1, 2, 2, 2, seed=2)
    start = tools.hand_start(lambda sample, e: sample.square() * e.mean((1, 2)).view(-1, 1, 1, 1), first, factor=factor)
    policy = SAIL(8.2, objective="code")
    x = x.requires_grad_(True)
    loss, norm = policy.loss(start.halves, ROW, x)
    (gradient,) = torch.autograd.grad(loss.sum(), [x])
    with torch.no_grad():
        length = first.square().norm()
        unit = sign * first.square() / length
        moved = x + unit
        size = moved.square().norm()
        assert loss.item() == pytest.approx((factor * size / sigma + 0.05 * x.norm()).item(), rel=1e-9)
        assert norm.item() == pytest.approx((factor * x.square().norm()).item(), rel=1e-9)
        # d || y^2 || / dy = 2 y^3 / || y^2 ||; dy / dx = 1 + sign (1 / l - q q^T / l^3) diag(2 x_0), q = x_0^2
        slope = (2 * moved**3 / size).flatten()
        q = first.square().flatten()
        jacobian = (
            sign * (torch.eye(8, dtype=q.dtype) / length - q[:, None] * q[None] / length**3) * 2 * first.flatten()
        )
        expected = factor / sigma * (slope + jacobian.T @ slope) + 0.05 * (x / x.norm()).flatten()
        torch.testing.assert_close(gradient.flatten(), expected, rtol=1e-8, atol=1e-10)
        other = SAIL(8.2).loss(start.halves, ROW, x)[0].item()
    assert other != pytest.approx(loss.item(), rel=1e-2)  # control: the paper's formula is another


def test_either_sign_gives_sails_objective_to_first_order() -> None:
    """|| s(x + d u) - s(x) ||^2 -> d^2 || H u ||^2 for both signs: the formula's sign is a second-order matter."""
    halves = tools.tiny_unet_halves(images=1)

    def s(x: torch.Tensor) -> torch.Tensor:
        return halves.predict("uncond", sample=x) - halves.predict("cond", sample=x)

    x = halves.sample
    unit = s(x) / s(x).norm()
    ratios = []
    for d in (1.0, 0.1, 0.01):
        plus, minus = (float((s(x + sign * d * unit) - s(x)).square().sum()) for sign in (1, -1))
        ratios.append(abs(plus / minus - 1))
    assert ratios[0] > ratios[1] > ratios[2] and ratios[2] < 0.05


@pytest.mark.parametrize("objective", ["paper", "code"])
def test_sails_weight_is_that_of_its_objective(objective: Literal["paper", "code"]) -> None:
    assert SAIL(1.0, objective=objective).alpha == {"paper": 2e-4, "code": 0.05}[objective]
    assert SAIL(1.0, alpha=0.01, objective=objective).alpha == 0.01
    with pytest.raises(UserError, match="objective 'both'"):
        SAIL(1.0, objective="both")  # type: ignore[arg-type]


# -- GNI -----------------------------------------------------------------------------------------------------------


def test_gni_puts_noise_of_its_own_on_the_unconditional_half() -> None:
    prompts = [f"prompt {k}" for k in range(500)]
    network = LinearNetwork(500)
    change = GaussianEmbeddingNoise().begin(started(prompts, network))
    assert change.embeds is not None and change.uncond_embeds is not None
    cond, uncond = change.embeds - network.cond.embeds, change.uncond_embeds - network.uncond.embeds
    assert float(uncond.std()) == pytest.approx(0.1, rel=0.03) and abs(float(uncond.mean())) < 0.004
    assert (
        abs(float((cond * uncond).mean())) < 0.0005 and abs(float((uncond[0] * uncond[1]).mean())) < 0.01
    )  # independent
    alone = GaussianEmbeddingNoise(halves="cond").begin(started(prompts, network))
    assert alone.uncond_embeds is None and alone.embeds is not None and torch.equal(alone.embeds, change.embeds)
    with pytest.raises(UserError, match="halves 'uncond'"):
        GaussianEmbeddingNoise(halves="uncond")  # type: ignore[arg-type]


# -- Wen -----------------------------------------------------------------------------------------------------------


def nonlinear(sample: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """A network of which every token's embedding counts, and whose norm does not simply fall."""
    return sample * torch.tanh(embeds).sum((1, 2)).view(-1, 1, 1, 1) + embeds.square().mean((1, 2)).view(-1, 1, 1, 1)


def adamw(own: torch.Tensor, norm: Any, steps: int, lr: float) -> list[torch.Tensor]:
    """AdamW from its formulas, gradient of the first position set to zero: the embeddings after 0, 1, ... steps."""
    p, m, v, found = own.clone(), torch.zeros_like(own), torch.zeros_like(own), [own.clone()]
    for t in range(1, steps + 1):
        leaf = p.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(norm(leaf), [leaf])
        g[:, 0] = 0
        p = p * (1 - lr * 0.01)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        found.append(p)
    return found


def test_wens_decay_moves_bos_and_the_last_embedding_is_served() -> None:
    sample, own, lr = tools.randn(1, 2, 2, 2), tools.randn(1, 4, 3, seed=1), 0.4
    halves = tools.HandHalves(nonlinear, sample, own, torch.zeros_like(own))

    def norm(embeds: torch.Tensor) -> torch.Tensor:
        return (nonlinear(sample, embeds) - nonlinear(sample, halves.uncond.embeds)).square().sum().sqrt()

    path = adamw(own, norm, 10, lr)
    norms = [float(norm(e)) for e in path]
    assert min(norms) < norms[-1]  # the fixture overshoots: best and last differ
    published = PromptOptimization(1e-9, lr=lr, serve="last", freeze_bos=False).begin(tools.start_of(halves))
    assert published.embeds is not None and published.iterations == [10]
    torch.testing.assert_close(published.embeds, path[-1], rtol=1e-9, atol=1e-12)
    assert published.first_score_after == pytest.approx([norms[-1]])
    bos = own[:, 0] * (1 - lr * 0.01) ** 10
    torch.testing.assert_close(published.embeds[:, 0], bos, rtol=1e-12, atol=0)
    best = PromptOptimization(1e-9, lr=lr, freeze_bos=False).begin(tools.start_of(halves))
    assert best.embeds is not None
    torch.testing.assert_close(best.embeds, path[norms.index(min(norms))], rtol=1e-9, atol=1e-12)
    frozen = PromptOptimization(1e-9, lr=lr, serve="last").begin(tools.start_of(halves))
    assert frozen.embeds is not None and torch.equal(frozen.embeds[:, 0], own[:, 0])
    stop = sorted(norms[:3])[0] * 1.0001 if norms[2] < norms[0] else norms[1] * 1.0001
    early = PromptOptimization(stop, lr=lr, serve="last", freeze_bos=False).begin(tools.start_of(halves))
    assert early.iterations == [next(k for k, value in enumerate(norms) if value <= stop)]
    with pytest.raises(UserError, match="serve 'first'"):
        PromptOptimization(1, serve="first")  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 3])
def test_wens_token_scores_are_the_gradient_of_the_batchs_norm_over_twice_its_size(n: int) -> None:
    sample, one = tools.randn(n, 2, 2, 2), tools.randn(1, 4, 3, seed=1)
    uncond = torch.zeros(n, 4, 3, dtype=one.dtype)
    leaf = one.clone().requires_grad_(True)
    whole = (nonlinear(sample, leaf.repeat(n, 1, 1)) - nonlinear(sample, uncond)).square().sum().sqrt()
    (gradient,) = torch.autograd.grad(whole, [leaf])
    published = gradient[0].square().sum(1).sqrt() / (2 * n)
    halves = tools.HandHalves(nonlinear, sample, one.repeat(n, 1, 1), uncond)
    found = {}
    for norm in ("batch", "image"):
        watch = TokenGradients(norm=norm)  # type: ignore[arg-type]
        watch.begin(tools.start_of(halves))
        watch.step(tools.step_of(halves))
        assert watch.total is not None
        found[norm] = watch.total
    for row in found["batch"]:
        torch.testing.assert_close(row, published, rtol=1e-9, atol=1e-12)
    if n == 1:
        torch.testing.assert_close(found["image"][0], 2 * published, rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match="norm 'sum'"):
        TokenGradients(norm="sum")  # type: ignore[arg-type]


def test_token_scores_of_a_batch_do_not_mix_prompts() -> None:
    sample, embeds = tools.randn(2, 2, 2, 2), tools.randn(2, 4, 3, seed=1)
    both = tools.HandHalves(nonlinear, sample, embeds, torch.zeros_like(embeds))
    watch = TokenGradients(norm="batch")
    start = tools.start_of(both)
    watch.begin(dataclasses.replace(start, token_ids=torch.tensor([[0, 1, 2, 3], [0, 9, 2, 3]])))
    watch.step(tools.step_of(both))
    alone = tools.HandHalves(nonlinear, sample[1:], embeds[1:], torch.zeros_like(embeds[1:]))
    single = TokenGradients(norm="batch")
    single.begin(tools.start_of(alone))
    single.step(tools.step_of(alone))
    assert watch.total is not None and single.total is not None
    torch.testing.assert_close(watch.total[1:], single.total, rtol=1e-9, atol=1e-12)


# -- raw scores ----------------------------------------------------------------------------------------------------


def raw_norms(pipe: Any, steps: int) -> list[list[float]]:
    """|| v_c - v_u || of every step and image, counted from the network's own outputs."""
    seen: list[list[float]] = []

    def count(module: Any, args: Any, output: Any) -> None:
        uncond, cond = output[0].double().chunk(2)
        seen.append([float((c - u).square().sum().sqrt()) for c, u in zip(cond, uncond, strict=True)])

    handle = pipe.unet.register_forward_hook(count)
    guard_tools.sample(pipe, guard_tools.PROMPTS, steps=steps)
    handle.remove()
    return seen


def test_raw_scores_are_those_of_the_outputs_and_so_are_targets_and_flags() -> None:
    pipe = guard_tools.pipeline("v_prediction")
    raw = raw_norms(pipe, 4)
    with MemorizationGuard(pipe, score_space="output") as guard:
        guard_tools.sample(pipe, guard_tools.PROMPTS, steps=4)
    for i, image in enumerate(guard.report):
        assert image.curve == pytest.approx([row[i] for row in raw], rel=1e-5) and image.quantity == "output"
    first, target = raw[0], 0.8 * min(raw[0])
    with MemorizationGuard(pipe, PromptOptimization(target, max_steps=40), score_space="output") as guard:
        guard_tools.sample(pipe, guard_tools.PROMPTS, steps=4)
    for i, image in enumerate(guard.report):
        assert image.first_score_before == pytest.approx(first[i], rel=1e-4)
        assert image.first_score_after is not None and image.first_score_after <= target
        assert image.curve[0] == pytest.approx(image.first_score_after, rel=1e-4)
    with MemorizationGuard(pipe, PromptOptimization(target, max_steps=40)) as guard:  # control: alpha_t d is under it
        guard_tools.sample(pipe, guard_tools.PROMPTS, steps=4)
    assert not any(image.mitigated for image in guard.report)


@pytest.mark.parametrize("space", ["noise", "output"])
def test_calibrated_thresholds_say_which_score_they_are_of_and_do_not_mix(tmp_path: Path, space: str) -> None:
    pipe = guard_tools.pipeline("v_prediction")
    calibration(pipe, score_space=space).save(tmp_path)
    found = Calibration.load(tmp_path, pipe)
    assert found.score_space == space
    assert MemorizationGuard(pipe, threshold=found).score_space == space  # it follows
    other: Any = "output" if space == "noise" else "noise"
    with pytest.raises(UserError, match=f"calibrated in the score space {space}") as error:
        MemorizationGuard(pipe, threshold=found, score_space=other)
    assert "\n" not in str(error.value)
    assert MemorizationGuard(pipe, threshold=3.0, score_space=other).score_space == other  # a number is the caller's


def test_files_from_before_are_of_noise_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    pipe = guard_tools.pipeline()
    path = calibration(pipe).save(tmp_path)
    values = json.loads(path.read_text())
    del values["score_space"]
    path.write_text(json.dumps(values))
    assert Calibration.load(tmp_path, pipe).score_space == "noise"
    path.write_text(json.dumps(values | {"score_space": "velocity"}))
    with pytest.raises(UserError, match="score_space"):
        Calibration.load(tmp_path, pipe)


def test_raw_scores_are_refused_where_they_mean_nothing() -> None:
    pipe = guard_tools.pipeline("v_prediction")
    for policy in (SAIL(1.0), Compose(StaticTransition(), SAIL(1.0))):
        with pytest.raises(UserError, match=r"with score_space output.*predicted noise"):
            MemorizationGuard(pipe, policy, score_space="output")
    with pytest.raises(UserError, match=r"score_space 'v'.*noise, output"):
        MemorizationGuard(pipe, score_space="v")  # type: ignore[arg-type]
