"""Min-SNR, noise offset, input perturbation, moving average, optional packages: each against its definition, with a negative control."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors.torch import load_file

from ambient_sd.assets.tiny import tiny_pipeline
from ambient_sd.data.stream import keyed_generator
from ambient_sd.objective import AmbientObjective
from ambient_sd.sampling import image_seed
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.training import averaging, checkpoints, noising, validation
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import TrainingBatch, run
from ambient_sd.utils.errors import UserError

UNET = "diffusion_pytorch_model.safetensors"
Settings = Callable[..., TrainConfig]


@pytest.fixture
def settings(tiny_base: Path, tiny_images: Path, tmp_path: Path) -> Settings:
    def make(name: str = "out", **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 4, "max_train_steps": 3, "report_to": "none", "output_dir": str(tmp_path / name),
            "learning_rate": 1e-3,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


class Stop(Exception):
    """The power goes out."""


def stop_at(step: int) -> Callable[[int, dict[str, float]], None]:
    def on_step(done: int, _: dict[str, float]) -> None:
        if done == step:
            raise Stop

    return on_step


def batches(config: TrainConfig) -> list[TrainingBatch]:
    seen: list[TrainingBatch] = []
    run(config, progress=False, on_batch=seen.append)
    return seen


def scheduler(prediction_type: str, zero_terminal: bool = False, timesteps: int = 1000) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=timesteps,
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal, timestep_spacing="trailing",
    )  # fmt: skip


def published_weight(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Min-SNR as its papers write it, with the ratio itself."""
    least = snr.clamp(max=gamma)
    return {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[prediction_type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_is_the_published_weight_and_finite_at_zero_terminal_snr(prediction_type: str, gamma: float) -> None:
    every = torch.arange(1000)
    ordinary = scheduler(prediction_type)
    got = noising.min_snr_weight(NoiseSchedule.from_scheduler(ordinary), every, gamma, prediction_type)
    torch.testing.assert_close(
        got.float(), published_weight(compute_snr(ordinary, every), gamma, prediction_type), rtol=1e-3, atol=1e-5
    )
    zero = scheduler(prediction_type, zero_terminal=True)
    schedule = NoiseSchedule.from_scheduler(zero)
    assert math.isinf(schedule.max_level), "the last timestep has no signal at all"
    got = noising.min_snr_weight(schedule, every, gamma, prediction_type)
    assert bool(got.isfinite().all())
    assert float(got[-1]) == {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}[prediction_type]
    if prediction_type == "epsilon":
        naive = published_weight(compute_snr(zero, every), gamma, prediction_type)
        assert bool(naive.isnan().any()), "negative control: 0 / 0 as the formula stands"


def test_min_snr_has_no_meaning_for_flow_matching() -> None:
    with pytest.raises(UserError, match="snr_gamma"):
        noising.min_snr_weight(NoiseSchedule(1000, "flow_prediction"), torch.tensor([1]), 5.0, "flow_prediction")


def test_min_snr_multiplies_the_weight_of_clean_and_ambient_samples() -> None:
    schedule = NoiseSchedule.from_scheduler(scheduler("v_prediction"))
    objective = AmbientObjective(schedule, level=1.0)
    t, x0 = torch.tensor([10, 300, 500, 900]), torch.zeros(4, 1, 2, 2)
    plain = noising.corrupt(objective, x0, x0, t, noise=x0 + 1)
    got = noising.corrupt(objective, x0, x0, t, noise=x0 + 1, snr_gamma=5.0)
    factor = noising.min_snr_weight(schedule, t, 5.0, "v_prediction").float()
    assert plain.clean.tolist() == [True, True, False, False]
    assert torch.equal(got.weight, plain.weight * factor)
    assert torch.equal(got.x_t, plain.x_t)
    assert not torch.equal(got.weight, plain.weight)


@pytest.mark.parametrize("objective", ["ambient", "plain", "gap"])
def test_min_snr_trains_with_every_objective(settings: Settings, objective: str) -> None:
    values: dict[str, Any] = {"gap": {"ambient_level": 0.5, "gap_upper": 2.0}}.get(objective, {})
    without, weighted = (
        run(settings(f"{g}", objective=objective, snr_gamma=g, max_train_steps=2, **values), progress=False).losses
        for g in (None, 1.0)
    )
    assert all(map(math.isfinite, weighted))
    assert weighted[0] < without[0]


def test_a_run_with_epsilon_at_zero_terminal_snr_stays_finite_under_min_snr(
    settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.scheduler = scheduler("epsilon", zero_terminal=True, timesteps=20)
    pipe.save_pretrained(tmp_path / "zero")
    # 96 samples: the last of 20 timesteps is among them.
    config = settings(
        pretrained_model_name_or_path=str(tmp_path / "zero"), objective="plain", snr_gamma=5.0, train_batch_size=32
    )
    seen: list[int] = []
    losses = run(config, progress=False, on_batch=lambda b: seen.extend(b.timesteps.tolist())).losses
    assert 19 in seen
    assert all(map(math.isfinite, losses))


def test_without_the_flags_every_draw_is_what_it_was_and_with_them_only_its_own_part_changes(
    settings: Settings,
) -> None:
    today = batches(settings("t", objective="plain"))
    for batch in today:
        for i, position in enumerate(batch.positions):
            g = keyed_generator(0, "draw", position)
            assert int(torch.randint(1000, (), generator=g)) == int(batch.timesteps[i])
            torch.rand((), generator=g)
            assert torch.equal(batch.noise[i], torch.randn(4, 16, 16, generator=g))
        assert batch.perturbation is None
    both = batches(settings("b", objective="plain", noise_offset=0.1, input_perturbation=0.2))
    other = batches(settings("o", objective="plain", noise_offset=0.1, train_batch_size=12, max_train_steps=1))
    added, pushed = [], []
    for old, new in zip(today, both, strict=True):
        assert torch.equal(old.timesteps, new.timesteps)
        assert old.captions == new.captions
        difference = new.noise - old.noise
        assert float((difference - difference.mean((2, 3), keepdim=True)).abs().max()) < 1e-5, "one number per channel"
        added.append(difference.mean((2, 3)))
        assert new.perturbation is not None
        pushed.append(new.perturbation)
    u, z = torch.cat(added) / 0.1, torch.cat(pushed) / 0.2
    assert float(u.std()) == pytest.approx(1.0, abs=0.25)
    assert float(z.std()) == pytest.approx(1.0, abs=0.02)
    assert len(u.flatten().round(decimals=4).unique()) == u.numel(), "no two samples or channels share one"
    assert torch.equal(torch.cat([b.noise for b in both]), other[0].noise), "by place in the run, however it is cut"


def test_input_perturbation_moves_the_input_and_leaves_the_target(settings: Settings) -> None:
    ddim = scheduler("v_prediction")
    g = torch.Generator().manual_seed(0)
    x0, noise, extra = (torch.randn(3, 4, 8, 8, generator=g) for _ in range(3))
    t = torch.tensor([5, 400, 990])
    objective = AmbientObjective(NoiseSchedule.from_scheduler(ddim), mode="plain")
    got = noising.corrupt(objective, x0, None, t, noise=noise, perturbation=0.1 * extra)
    assert torch.equal(got.x_t, ddim.add_noise(x0, noise + 0.1 * extra, t))
    assert torch.equal(got.target, objective.corrupt(x0, None, t, noise=noise).target)
    assert not torch.equal(got.target, objective.corrupt(x0, None, t, noise=noise + 0.1 * extra).target)
    losses = [run(settings(f"{p}", objective="plain", input_perturbation=p), progress=False).losses for p in (0, 1)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("flag", ["noise_offset", "input_perturbation"])
def test_the_ambient_loss_refuses_what_breaks_its_derivation(settings: Settings, flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag} is 0.1.*--objective plain"):
        settings(**{flag: 0.1})
    zero, plain = settings("z", ambient_level=0, **{flag: 0.1}), settings("p", objective="plain", **{flag: 0.1})
    assert run(zero, progress=False).losses == run(plain, progress=False).losses, "at level 0 nothing is ambient"


def test_an_offset_changes_what_the_total_noise_tells_of_the_fixed_noise_as_documented() -> None:
    """The reason of the refusal, measured: regress channel means of s_n eps_n on those of the total noise."""
    s_n, s_t, pixels = 1.0, 2.0, 16
    g = torch.Generator().manual_seed(0)
    fixed = s_n * torch.randn(40000, pixels, generator=g)
    for amount in (0.0, 0.3):
        xi = torch.randn(40000, pixels, generator=g) + amount * torch.randn(40000, 1, generator=g)
        total = fixed + math.sqrt(s_t**2 - s_n**2) * xi
        a, b = fixed.mean(1), total.mean(1)
        slope = float((a * b).mean() / b.square().mean())
        right = s_n**2 / (s_n**2 + (s_t**2 - s_n**2) * (1 + amount**2 * pixels))
        assert slope == pytest.approx(right, rel=0.05)
        assert (abs(slope - (s_n / s_t) ** 2) < 0.02) is (amount == 0), "the ambient loss counts on (s_n / s_t)^2"


def final(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "unet" / UNET)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("options", [{}, {"offload_ema": True, "foreach_ema": True}], ids=["plain", "foreach"])
def test_the_average_resumes_bit_for_bit_and_is_what_is_saved(
    settings: Settings, tiny_base: Path, options: dict[str, Any]
) -> None:
    values: dict[str, Any] = {"use_ema": True, "checkpointing_steps": 1, "max_train_steps": 4, **options}
    straight = settings("straight", **values)
    run(straight, progress=False)
    with pytest.raises(Stop):
        run(settings("stopped", **values), progress=False, on_step=stop_at(3))
    resumed = settings("stopped", resume_from_checkpoint="latest", **values)
    assert run(resumed, progress=False).first_step == 2
    out = Path(straight.output_dir)
    for step in (3, 4):
        for part in ("unet", "unet_ema"):
            ours, theirs = (Path(c.output_dir) / f"checkpoint-{step}" / part for c in (straight, resumed))
            assert equal(load_file(ours / UNET), load_file(theirs / UNET)), (step, part)
    assert equal(final(straight), final(resumed))
    assert equal(final(straight), load_file(out / "checkpoint-4" / "unet_ema" / UNET)), "the average is the result"
    # The recursion by hand over the weights of the checkpoints; decay after step k is (1 + k - 1) / (10 + k - 1).
    average = load_file(tiny_base / "unet" / UNET)
    for step in range(1, 5):
        weights = load_file(out / f"checkpoint-{step}" / "unet" / UNET)
        decay = 0.0 if step == 1 else step / (9 + step)
        average = {k: v - (1 - decay) * (v - weights[k]) for k, v in average.items()}
    assert all(torch.allclose(average[k], v, atol=1e-7) for k, v in final(straight).items())
    assert not equal(final(straight), load_file(out / "checkpoint-4" / "unet" / UNET)), "negative control"


def test_an_offloaded_average_has_the_bits_of_one_that_stays() -> None:
    torch.manual_seed(0)
    network = tiny_pipeline().unet
    here, away = averaging.Average(network), averaging.Average(network, offload=True)
    start = [p.clone() for p in here.model.shadow_params]
    for _ in range(3):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        here.update()
        away.update()
    assert away.model.optimization_step == here.model.optimization_step == 3
    assert all(map(torch.equal, here.model.shadow_params, away.model.shadow_params))
    assert not any(map(torch.equal, start, away.model.shadow_params)), "negative control"


def test_a_resume_without_the_count_of_averaged_steps_would_end_elsewhere(settings: Settings) -> None:
    """Negative control of the one above: weights alone are not the state of an average."""
    unet = torch.nn.Linear(2, 2)
    kept, lost = (averaging.EMAModel([torch.zeros(2, 2)]) for _ in range(2))
    kept.optimization_step = 5
    for model in (kept, lost):
        model.step([unet.weight])
    assert not torch.equal(kept.shadow_params[0], lost.shadow_params[0])


def test_averaging_leaves_training_as_it_is_and_validation_draws_from_the_average(settings: Settings) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawing: dict[str, Any] = {"validation_prompts": ["a red disc"], "num_validation_images": 1, "validation_steps": 2}
    drawing |= {"checkpointing_steps": 2, "learning_rate": 1e-2}
    averaged, without = settings("a", use_ema=True, **drawing), settings("w", **drawing)
    assert run(averaged, progress=False).losses == run(without, progress=False).losses
    assert torch.equal(torch.get_rng_state(), before)
    sheets = []
    for config in (averaged, without):
        pipe = StableDiffusionPipeline.from_pretrained(config.output_dir)
        pipe.set_progress_bar_config(disable=True)
        again = pipe("a red disc", height=32, width=32, num_inference_steps=validation.INFERENCE_STEPS,
                     guidance_scale=7.5, generator=torch.Generator().manual_seed(image_seed(0, 0))).images[0]  # fmt: skip
        with Image.open(Path(config.output_dir) / "validation" / "step-3.png") as sheet:
            assert sheet.convert("RGB").crop((4, 17, 36, 49)).tobytes() == again.tobytes()
        sheets.append(again.tobytes())
    assert sheets[0] != sheets[1], "negative control: the trained weights draw another image"


def test_a_damaged_or_foreign_average_is_one_line(settings: Settings) -> None:
    values: dict[str, Any] = {"use_ema": True, "checkpointing_steps": 2}
    config = settings(**values)
    run(config, progress=False)
    folder = Path(config.output_dir) / "checkpoint-2" / "unet_ema"
    with pytest.raises(UserError, match="use_ema"):
        run(settings(resume_from_checkpoint="latest", checkpointing_steps=2), progress=False)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"optimization_step": 2', '"optimization_step": 1'))
    checkpoints.seal(folder.parent)  # else the seal alone finds it
    with pytest.raises(UserError, match="averages 1 steps"):
        run(settings(resume_from_checkpoint="latest", **values), progress=False)
    (folder / "config.json").write_text(text)
    (folder / UNET).rename(folder / "diffusion_pytorch_model.bin")
    checkpoints.seal(folder.parent)
    with pytest.raises(UserError, match="unet_ema cannot be read"):
        run(settings(resume_from_checkpoint="latest", **values), progress=False)


def test_an_average_of_a_model_spread_over_devices_is_refused() -> None:
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(UserError, match=f"use_ema is given and accelerate is set to {kind.value}"):
            averaging.check_distribution(kind)
    averaging.check_distribution(DistributedType.MULTI_GPU)


@pytest.mark.parametrize(
    ("values", "package"),
    [
        ({"use_8bit_adam": True}, "bitsandbytes"),
        ({"lora": True, "quantize_base": "nf4"}, "bitsandbytes"),
        ({"enable_xformers_memory_efficient_attention": True}, "xformers"),
        ({"report_to": "wandb"}, "wandb"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_read_or_written(
    settings: Settings, values: dict[str, Any], package: str
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    config = settings(pretrained_model_name_or_path="./nowhere", **values)
    with pytest.raises(UserError, match=f"{package} is not installed; pip install {package}"):
        run(config, progress=False)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"snr_gamma": 0}, ["snr_gamma", "above 0"]),
        ({"noise_offset": -0.1}, ["noise_offset", "at least 0"]),
        ({"offload_ema": True}, ["offload_ema", "use_ema"]),
        ({"foreach_ema": True}, ["foreach_ema", "use_ema"]),
        ({"use_dora": True}, ["use_dora", "--lora"]),
        ({"lora_dropout": 0.1}, ["lora_dropout", "--lora"]),
        ({"output_kohya_format": True}, ["output_kohya_format", "--lora"]),
        ({"lora": True, "lora_dropout": 1.0}, ["lora_dropout is 1.0", "below 1.0"]),
        ({"lora": True, "use_dora": True, "output_kohya_format": True}, ["output_kohya_format", "use_dora"]),
    ],
)
def test_flags_of_another_mode_are_refused(settings: Settings, values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        settings(**values)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
