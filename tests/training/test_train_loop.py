"""The training run on a tiny real pipeline: exact resume, fixed noise, clipping, saved results, and checks that come first."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ambient_sd.assets import BASE
from ambient_sd.data import latents
from ambient_sd.data.stream import SampleStream
from ambient_sd.families.base import Base
from ambient_sd.families.sd import SD
from ambient_sd.reporting.model_card import write_run_card
from ambient_sd.sampling import collect_prompts
from ambient_sd.training import adapters, checkpoints, noising, validation
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import TrainingBatch, run
from ambient_sd.training.plan import base_of
from ambient_sd.utils.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
Settings = Callable[..., TrainConfig]


@pytest.fixture
def settings(tiny_base: Path, tiny_images: Path, tmp_path: Path) -> Settings:
    def make(name: str = "out", **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 4, "max_train_steps": 4, "report_to": "none", "output_dir": str(tmp_path / name),
            "learning_rate": 1e-3,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / (adapters.WEIGHTS_NAME if config.lora else UNET))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Stop(Exception):
    """The power goes out."""


def stop_at(step: int) -> Callable[[int, dict[str, float]], None]:
    def on_step(done: int, _: dict[str, float]) -> None:
        if done == step:
            raise Stop

    return on_step


@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "gradient_accumulation_steps": 2, "train_batch_size": 3},
        {"lora": True, "lora_alpha": 8.0},
    ],
    ids=["full", "lora"],
)
def test_a_stopped_and_resumed_run_equals_the_straight_one_bit_for_bit(
    settings: Settings, values: dict[str, Any]
) -> None:
    values = {**values, "max_train_steps": 6, "checkpointing_steps": 3}
    straight = settings("straight", **values)
    whole = run(straight, progress=False)
    with pytest.raises(Stop):
        run(settings("stopped", **values), progress=False, on_step=stop_at(4))
    resumed = settings("stopped", resume_from_checkpoint="latest", **values)
    rest = run(resumed, progress=False)
    assert rest.first_step == 3
    assert whole.losses == rest.losses
    assert equal(weights(straight), weights(resumed))
    assert not equal(weights(straight), _at_3(straight)), "negative control: the last three steps change the weights"


def _at_3(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "checkpoint-3" / (adapters.WEIGHTS_NAME if config.lora else UNET))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"lr_scheduler": "linear"}, [0.5e-5, 0.25e-5]),
        # diffusers lets it end at 1e-7.
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [0.5**2 * 9.9e-6 + 1e-7, 0.25**2 * 9.9e-6 + 1e-7]),
        # The second of two cosines.
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [1e-5, 0.5e-5]),
    ],
)
def test_a_resumed_run_takes_the_learning_rate_that_it_is_given(
    settings: Settings, schedule: dict[str, Any], expected: list[float]
) -> None:
    values: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2, "lr_warmup_steps": 0, **schedule}
    with pytest.raises(Stop):
        run(settings(**values), progress=False, on_step=stop_at(3))
    rates: list[float] = []
    values |= {"learning_rate": 1e-5, "adam_beta1": 0.5, "resume_from_checkpoint": "latest"}
    summary = run(settings(**values), progress=False, on_step=lambda _, record: rates.append(record["lr"]))
    assert rates == pytest.approx(expected)
    assert summary.learning_rate == 1e-5


def test_the_trained_unet_is_kept_if_the_base_is_gone_at_the_end(
    settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = settings(pretrained_model_name_or_path=str(base), max_train_steps=2)
    with pytest.raises(UserError, match=r"can no longer be loaded.*the trained network is whole in"):
        run(config, progress=False, on_step=lambda step, _: shutil.rmtree(base / "vae") if step == 2 else None)
    whole = settings("whole", max_train_steps=2)
    run(whole, progress=False)
    assert equal(weights(config), weights(whole))


def test_each_image_has_one_noise_over_epochs_runs_batches_and_resumes(settings: Settings) -> None:
    seen: dict[str, set[bytes]] = {}
    fresh: list[bytes] = []

    def watch(batch: TrainingBatch) -> None:
        assert batch.eps_n is not None
        for key, eps, noise in zip(batch.keys, batch.eps_n, batch.noise, strict=True):
            seen.setdefault(key, set()).add(eps.numpy().tobytes())
            fresh.append(noise.numpy().tobytes())

    options: dict[str, Any] = {"checkpointing_steps": 2, "max_train_steps": 5}
    with pytest.raises(Stop):
        run(settings("a", **options), progress=False, on_batch=watch, on_step=stop_at(3))
    run(settings("a", resume_from_checkpoint="latest", **options), progress=False, on_batch=watch)
    before = len(fresh)
    assert len(set(fresh)) == 5 * 4, "fresh noise is fresh at each position, and the replayed step replays it"
    run(settings("b", seed=9, train_batch_size=5, center_crop=True, random_flip=True), progress=False, on_batch=watch)
    assert len(set(fresh[before:])) == 20
    assert len(seen) == 8
    assert all(len(noises) == 1 for noises in seen.values())
    other: dict[str, set[bytes]] = {}
    seen, kept = other, seen
    run(settings("c", noise_seed=1), progress=False, on_batch=watch)
    assert all(other[k].isdisjoint(kept[k]) for k in other), "negative control: another noise seed, other noise"


def test_copies_of_an_image_share_one_noise(settings: Settings, tiny_images: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_images, tmp_path / "copies"))
    shutil.copy(folder / "000.png", folder / "copy.png")
    with (folder / "metadata.jsonl").open("a") as rows:
        rows.write('{"file_name": "copy.png", "text": "the same again"}\n')
    keys: list[str] = []
    noises: set[bytes] = set()

    def watch(batch: TrainingBatch) -> None:
        assert batch.eps_n is not None
        keys.extend(batch.keys)
        noises.update(e.numpy().tobytes() for e in batch.eps_n)

    run(settings(train_data_dir=str(folder), train_batch_size=9, max_train_steps=1), progress=False, on_batch=watch)
    assert (len(keys), len(set(keys)), len(noises)) == (9, 8, 8)


def test_ambient_at_level_zero_is_the_plain_run_bit_for_bit(settings: Settings) -> None:
    # Mirrored images too: without a fixed noise there is no reason to fix the view.
    zero, plain, one = (
        settings(name, random_flip=True, **options)
        for name, options in {"z": {"ambient_level": 0}, "p": {"objective": "plain"}, "o": {}}.items()
    )
    losses = [run(c, progress=False).losses for c in (zero, plain, one)]
    assert losses[0] == losses[1] != losses[2]
    assert equal(weights(zero), weights(plain))
    assert not equal(weights(one), weights(plain))


def test_latents_held_in_memory_and_made_on_the_fly_train_alike(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = run(settings("held"), progress=False)
    monkeypatch.setattr(latents, "MAX_HELD_BYTES", 0)
    fly = run(settings("fly", dataloader_num_workers=1), progress=False)
    assert held.losses == fly.losses
    assert equal(weights(settings("held")), weights(settings("fly")))


def test_accumulation_and_batch_size_cut_the_same_step(settings: Settings) -> None:
    """Same positions, so same samples; sums are made in another order, so equality is to rounding."""
    whole, cut = (
        settings("w", lr_scheduler="linear", lr_warmup_steps=2),
        settings("c", train_batch_size=2, gradient_accumulation_steps=2, lr_scheduler="linear", lr_warmup_steps=2),
    )
    rates: list[list[float]] = [[], []]
    losses = [
        run(c, progress=False, on_step=lambda _, r, out=out: out.append(r["lr"])).losses
        for c, out in zip((whole, cut), rates, strict=True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert rates[0] == rates[1] == pytest.approx([0, 5e-4, 1e-3, 5e-4]), "counted in optimizer steps"


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_clipping_clips(settings: Settings, tiny_base: Path, lora: bool) -> None:
    """With a huge adam_epsilon AdamW moves by lr * gradient / epsilon: the step length shows the clipped norm."""
    epsilon, moved = 1e4, {}
    for limit in (1e-3, 1e6):
        config = settings(
            f"clip{limit:g}", lora=lora, max_train_steps=1, max_grad_norm=limit, adam_epsilon=epsilon,
            learning_rate=1e4, adam_weight_decay=0,
        )  # fmt: skip
        run(config, progress=False)
        after, start = weights(config), load_file(tiny_base / UNET)
        # A LoRA starts at B = 0, and only B has a gradient at first.
        moves = (
            [v for k, v in after.items() if "lora_B" in k or ".up." in k]
            if lora
            else [after[k] - start[k] for k in start]
        )
        moved[limit] = math.sqrt(sum(float(m.double().square().sum()) for m in moves))
    assert moved[1e-3] == pytest.approx(1e-3, rel=0.02)
    assert moved[1e6] > 2e-3, "negative control: unclipped it goes further"


def test_lora_reloads_at_its_own_scale(settings: Settings, tiny_base: Path) -> None:
    config = settings(lora=True, rank=2, lora_alpha=8.0, learning_rate=1e-2)
    run(config, progress=False)
    trained = base_of(config).load("unet")
    adapters.attach(trained, rank=2, alpha=8.0, targets=config.lora_target_modules or (), seed=0)
    adapters.load(trained, Path(config.output_dir), SD)
    g = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 4, 16, 16, generator=g), torch.tensor([10, 500]), torch.randn(2, 24, 16, generator=g))

    def output(folder: Path) -> torch.Tensor:
        pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
        pipe.load_lora_weights(folder)
        with torch.no_grad():
            return pipe.unet(*inputs).sample

    with torch.no_grad():
        assert torch.equal(output(Path(config.output_dir)), trained(*inputs).sample)
    bare = Path(config.output_dir) / "bare"
    bare.mkdir()
    save_file(weights(config), bare / adapters.WEIGHTS_NAME, metadata={"format": "pt"})
    assert not torch.allclose(output(bare), output(Path(config.output_dir)), atol=1e-4), "metadata carry the scale"


def test_full_result_is_a_stock_pipeline_and_names_no_path_of_this_machine(
    settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    config = settings(prediction_type="epsilon", validation_prompts=["a disc"], num_validation_images=1)
    write_run_card(run(config, progress=False))
    out = Path(config.output_dir)
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert equal(dict(pipe.unet.state_dict()), weights(config))
    public = [p for p in out.rglob("*") if p.is_file() and p.name != "train_config.yaml"]
    leaks = [p for p in public if str(tmp_path).encode() in (b := p.read_bytes()) or str(tiny_base).encode() in b]
    assert leaks == []
    assert "ambient, noise level s_n = 1" in (out / "README.md").read_text()


def test_lora_file_names_no_path_of_this_machine(settings: Settings, tiny_base: Path) -> None:
    config = settings(lora=True, max_train_steps=1)
    run(config, progress=False)
    with safe_open(Path(config.output_dir) / adapters.WEIGHTS_NAME, "pt") as file:
        text = json.dumps(file.metadata())
    assert str(tiny_base) not in text
    assert "lora_alpha" in text


def test_validation_draws_and_leaves_training_untouched(settings: Settings) -> None:
    without = settings("without")
    drawn = settings("drawn", validation_prompts=["a red disc", "a blue square"], num_validation_images=2,
                     validation_steps=2, report_to="tensorboard")  # fmt: skip
    record = run(drawn, progress=False)
    write_run_card(record)
    assert run(without, progress=False).losses == record.losses
    assert equal(weights(without), weights(drawn))
    pages = sorted(p.name for p in (Path(drawn.output_dir) / "validation").iterdir())
    assert pages == ["scores.json", "step-2.png", "step-4.png"]
    scores = validation.read_scores(Path(drawn.output_dir) / "validation", 4)
    card = (Path(drawn.output_dir) / "README.md").read_text()
    assert len(scores) == 4 and f"highest {max(scores):.3g} (n = 4)" in card
    events = [p for p in (Path(drawn.output_dir) / "logs").rglob("events*")]
    assert events
    assert b"validation" in events[0].read_bytes()


def test_a_run_leaves_the_global_generator_as_it_was(settings: Settings) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = run(settings("a", lora=True), progress=False).losses
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert run(settings("b", lora=True), progress=False).losses == a


def test_captions_are_dropped_at_the_given_rate(settings: Settings) -> None:
    captions: list[str] = []
    for rate, batch in ((0.0, 4), (0.3, 64), (1.0, 4)):
        captions.clear()
        run(settings(f"d{rate}", caption_dropout=rate, train_batch_size=batch, max_train_steps=1), progress=False,
            on_batch=lambda b: captions.extend(b.captions))  # fmt: skip
        assert captions.count("") / len(captions) == pytest.approx(rate, abs=0.12 if rate == 0.3 else 0)


def test_plain_training_learns(settings: Settings) -> None:
    config = settings(objective="plain", max_train_steps=24, learning_rate=5e-3, caption_dropout=0)
    losses = run(config, progress=False).losses
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_gap_trains_nothing_inside_the_band(settings: Settings) -> None:
    config = settings(objective="gap", ambient_level=0, gap_upper=14.6, max_train_steps=2, adam_weight_decay=0)
    assert run(config, progress=False).loss == 0.0
    assert run(settings("g", objective="gap", ambient_level=0.5, gap_upper=2), progress=False).loss > 0


def test_fresh_copies_are_new_at_every_step_and_the_usual_ones_are_not(settings: Settings) -> None:
    def copies(config: TrainConfig) -> dict[str, list[torch.Tensor]]:
        seen: dict[str, list[torch.Tensor]] = {}

        def note(batch: TrainingBatch) -> None:
            assert batch.eps_n is not None
            for key, eps in zip(batch.keys, batch.eps_n, strict=True):
                seen.setdefault(key, []).append(eps)

        run(config, progress=False, on_batch=note)
        return seen

    usual, fresh = copies(settings(max_train_steps=6)), copies(settings("f", max_train_steps=6, fresh_copies=True))
    assert all(torch.equal(e, c[0]) for c in usual.values() for e in c)
    again = [c for c in fresh.values() if len(c) > 1]
    assert again and not any(torch.equal(a, b) for c in again for i, a in enumerate(c) for b in c[:i])


def test_noise_levels_are_lognormal_when_asked_for_and_nothing_else_of_a_run_moves(settings: Settings) -> None:
    def batches(config: TrainConfig) -> list[TrainingBatch]:
        seen: list[TrainingBatch] = []
        run(config, progress=False, on_batch=seen.append)
        return seen

    edm = {"weighting_scheme": "logit_normal", "logit_mean": -0.5, "logit_std": 1.2}
    usual, drawn = batches(settings(max_train_steps=3)), batches(settings("e", max_train_steps=3, **edm))
    for a, b in zip(usual, drawn, strict=True):
        assert torch.equal(a.noise, b.noise) and a.captions == b.captions and not torch.equal(a.timesteps, b.timesteps)
    schedule = base_of(settings("b")).schedule
    draw, stream = noising.LogNormalLevels(schedule, -0.5, 1.2), SampleStream(1, 0)
    assert torch.cat([b.timesteps for b in drawn]).tolist() == [
        int(draw(stream, p)) for b in drawn for p in b.positions
    ]
    logs = schedule.level(torch.stack([draw(stream, p) for p in range(4000)])).log()
    # Quartiles of N(-0.5, 1.2^2), known from 4,000 draws to 0.025; the schedule's ends cut the tails only.
    found = torch.quantile(logs, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert found.tolist() == pytest.approx([-0.5 - 0.6745 * 1.2, -0.5, -0.5 + 0.6745 * 1.2], abs=0.1)


def test_weighted_trains_with_the_plain_loss_under_the_level(settings: Settings) -> None:
    # The largest level: no timestep lies above it, so every weight is 1.
    level = {"ambient_timestep": 999}
    weighted = run(settings(objective="weighted", max_train_steps=2, **level), progress=False)
    plain = run(settings("p", objective="plain", max_train_steps=2), progress=False)
    below = run(settings("b", objective="weighted", ambient_level=0.5, max_train_steps=2), progress=False)
    assert weighted.losses == plain.losses != below.losses


def test_mixed_precision_keeps_trained_weights_in_float32(settings: Settings) -> None:
    full, lora = settings("f", mixed_precision="bf16"), settings("l", mixed_precision="bf16", lora=True)
    for config in (full, lora):
        assert math.isfinite(run(config, progress=False).loss)
        assert {v.dtype for v in weights(config).values()} == {torch.float32}
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"mixed_precision is fp16"):
            run(settings("h", mixed_precision="fp16"), progress=False)


def test_lora_in_bf16_trains_a_base_with_norms_of_its_embeddings(settings: Settings) -> None:
    config = settings(
        "b", pretrained_model_name_or_path=str(BASE), lora=True, mixed_precision="bf16", max_train_steps=1
    )
    assert math.isfinite(run(config, progress=False).loss)


def test_gradient_checkpointing_changes_memory_not_results(settings: Settings) -> None:
    a, b = settings("a", lora=True), settings("b", lora=True, gradient_checkpointing=True)
    assert run(a, progress=False).losses == pytest.approx(run(b, progress=False).losses, rel=1e-5)


def test_checkpoints_are_whole_limited_and_belong_to_their_run(settings: Settings) -> None:
    options: dict[str, Any] = {"checkpointing_steps": 1, "checkpoints_total_limit": 2}
    config = settings(**options)
    run(config, progress=False)
    out = Path(config.output_dir)
    assert [p.name for p in checkpoints.find_all(out)] == ["checkpoint-3", "checkpoint-4"]
    assert sorted(p.name for p in (out / "checkpoint-4").iterdir()) == [
        "losses.jsonl",
        "manifest.json",
        "optimizer.safetensors",
        "trainer_state.json",
        "unet",
    ]
    # Killed in mid-save: the part has no name; an empty folder is skipped.
    (out / ".checkpoint-9.part").mkdir()
    (out / "checkpoint-8").mkdir()
    assert checkpoints.find(out, "latest") == out / "checkpoint-4"
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        run(settings(**options), progress=False)
    with pytest.raises(UserError, match=r"checkpoint-7.*checkpoint-3, checkpoint-4"):
        run(settings(resume_from_checkpoint="checkpoint-7", **options), progress=False)
    with pytest.raises(UserError, match="seed = 0"):
        run(settings(resume_from_checkpoint="latest", seed=1, **options), progress=False)
    with pytest.raises(UserError, match="beyond the end"):
        run(settings(resume_from_checkpoint="latest", **{**options, "max_train_steps": 2}), progress=False)
    (out / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"optimizer.safetensors has 7 bytes"):
        run(settings(resume_from_checkpoint="checkpoint-4", **{**options, "max_train_steps": 6}), progress=False)
    more = run(settings(resume_from_checkpoint="checkpoint-3", **{**options, "max_train_steps": 6}), progress=False)
    assert (more.first_step, more.steps) == (3, 6)
    assert not (out / ".checkpoint-9.part").exists()


def test_bad_input_ends_in_one_line_before_weights_load_and_writes_nothing(
    settings: Settings, tiny_base: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: object) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(Base, "load", no_weights)
    no_unet = Path(shutil.copytree(tiny_base, tmp_path / "no-unet"))
    shutil.rmtree(no_unet / "unet")
    broken_json = Path(shutil.copytree(tiny_base, tmp_path / "broken"))
    (broken_json / "unet" / "config.json").write_text("{")
    broken = Path(shutil.copytree(tiny_images, tmp_path / "truncated"))
    (broken / "003.png").write_bytes((broken / "003.png").read_bytes()[:90])
    missing = Path(shutil.copytree(tiny_images, tmp_path / "missing"))
    (missing / "001.png").unlink()
    bare = tmp_path / "bare"
    bare.mkdir()

    def base(name: str, change: Callable[[Path], object]) -> dict[str, Any]:
        """A copy of the base with something wrong."""
        change(folder := Path(shutil.copytree(tiny_base, tmp_path / name)))
        return {"pretrained_model_name_or_path": str(folder)}

    def write(file: str, **values: Any) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))

        return change

    weights_of = "diffusion_pytorch_model"
    for file, text in {"empty.jsonl": "\n", "marked.jsonl": '\ufeff{"prompt": "a disc"}\r\n'}.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert collect_prompts([str(tmp_path / "marked.jsonl")]) == ["a disc"]
    a_file = tmp_path / "a-file"
    a_file.write_text("")
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"pretrained_model_name_or_path": str(no_unet)}, ["no-unet", "no unet/"]),
        ({"pretrained_model_name_or_path": str(broken_json)}, ["unet/config.json of model", "broken"]),
        (base("odd", write("model_index.json", _class_name="WuerstchenPipeline")), ["odd is a", "StableDiffusionPipeline"]),
        (base("alt", write("model_index.json", text_encoder=["x", "RobertaModel"])), ["text_encoder", "RobertaModel"]),
        (base("unclip", write("unet/config.json", class_embed_type="projection")), ["class_embed_type", "text-to-image"]),
        (base("betas", write("scheduler/scheduler_config.json", beta_schedule="x")), ["scheduler of model", "betas"]),
        (base("cut", lambda p: (p / "vae" / "config.json").write_text("{}")), ["vae/config.json", "latent_channels"]),
        (base("list", lambda p: (p / "unet" / "config.json").write_text("[1]")), ["unet/config.json of model", "list"]),
        (
            base("bin", lambda p: (p / "vae" / f"{weights_of}.safetensors").rename(p / "vae" / f"{weights_of}.bin")),
            ["vae/", ".safetensors", "save_pretrained"],
        ),
        (base("mute", lambda p: (p / "tokenizer" / "tokenizer.json").unlink()), ["tokenizer of model", "no words"]),
        ({"train_data_dir": "my-images"}, ["no file or folder my-images"]),
        ({"output_dir": str(tiny_images)}, ["output_dir", "train_data_dir too"]),
        ({"output_dir": str(tiny_base)}, ["output_dir", "pretrained_model_name_or_path too"]),
        ({"validation_prompts": [str(tmp_path / "empty.jsonl")]}, ["empty.jsonl", "no prompt"]),
        ({"pretrained_model_name_or_path": "./nowhere"}, ["pretrained_model_name_or_path", "nowhere"]),
        ({"ambient_level": 20.0}, ["ambient_level is 20", "14.6"]),
        ({"ambient_timestep": 1000}, ["ambient_timestep is 1000", "0 to 999"]),
        ({"resolution": 33}, ["resolution is 33", "multiple of 2", "try 32"]),
        ({"lora": True, "lora_target_modules": ["to_z"]}, ["lora_target_modules", "'to_z'", "to_q"]),
        ({"lora": True, "prediction_type": "epsilon"}, ["prediction_type", "v_prediction"]),
        ({"validation_prompts": ["nowhere.jsonl"]}, ["nowhere.jsonl"]),
        ({"output_dir": str(a_file)}, ["output_dir", "a-file"]),
        ({"resume_from_checkpoint": "checkpoint-5"}, ["resume_from_checkpoint", "checkpoint-5", "none"]),
        ({"train_data_dir": str(bare)}, ["bare", "no images"]),
        ({"train_data_dir": str(broken)}, ["1 of 8", "003.png"]),
        ({"train_data_dir": str(missing)}, ["001.png", "do not exist"]),
        ({"caption_column": "caption"}, ["'caption'", "file_name, text"]),
        ({"dataset_split": "train"}, ["'split'"]),
    ]  # fmt: skip
    for values, parts in cases:
        config = settings("never", **values)
        with pytest.raises(UserError) as caught:
            run(config, progress=False)
        text = str(caught.value)
        assert "\n" not in text
        assert all(part in text for part in parts), text
    assert not (tmp_path / "never").exists()
    with pytest.raises(AssertionError, match="weights were loaded"):
        run(settings("never"), progress=False)
    assert not (tmp_path / "never").exists()
