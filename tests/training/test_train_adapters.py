"""Adapters that are trained: where they start from, which kinds there are, and what is written for whom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ambient_sd.families.lora import load_lora
from ambient_sd.reporting.model_card import write_run_card
from ambient_sd.training import adapters, averaging, results
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.training.plan import Plan, base_of, plan_run
from ambient_sd.utils.errors import UserError

Settings = Callable[..., TrainConfig]


def result(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / adapters.WEIGHTS_NAME)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def resumes_to_the_bit(settings: Settings, **values: Any) -> None:
    """A run that continues from its checkpoint in the middle ends in the same files and losses."""
    config = settings("straight", **{"checkpointing_steps": 2, "max_train_steps": 4, **values})
    torch.manual_seed(1)
    losses, weights = run(config, progress=False).losses, result(config)
    (Path(config.output_dir) / adapters.WEIGHTS_NAME).unlink()
    torch.manual_seed(2)
    config.resume_from_checkpoint = "checkpoint-2"
    resumed = run(config, progress=False)
    assert resumed.first_step == 2 and resumed.losses == losses
    assert equal(weights, result(config))


def started(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The weights that a training starts from, by peft's names."""
    plan = plan_run(config)
    unet = base_of(config).load("unet")
    attach(unet, plan)
    return {name: value.detach() for name, value in get_peft_model_state_dict(unet).items()}


def attach(unet: Any, plan: Plan) -> None:
    config = plan.config
    adapters.attach(unet, rank=config.rank or 0, alpha=config.lora_alpha or 0.0, targets=config.lora_target_modules or (),
                    seed=0, dora=config.use_dora, start=plan.start)  # fmt: skip


@pytest.fixture(scope="module")
def own(shared_settings: Settings) -> TrainConfig:
    """A finished training of ours."""
    config = shared_settings(
        "own-private-name",
        rank=2,
        lora_alpha=6.0,
        lora_target_modules=["to_q", "to_out.0", "conv1"],
        output_kohya_format=True,
    )
    run(config, progress=False)
    return config


SCHEMES = {
    "diffusers": lambda name: f"unet.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "kohya": None,
    "ComfyUI": lambda name: f"diffusion_model.{name}".replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_start_is_bit_exact(settings: Settings, own: TrainConfig, tmp_path: Path, scheme: str) -> None:
    trained = {name.removeprefix("unet."): value for name, value in result(own).items()}
    path = Path(own.output_dir) / adapters.KOHYA_NAME
    if (rename := SCHEMES[scheme]) is not None:
        path = tmp_path / "other.safetensors"
        alphas = {f"{rename(name.partition('.lora_')[0])}.alpha": torch.tensor(6.0) for name in trained}
        save_file({rename(name): value for name, value in trained.items()} | alphas, path)
    config = settings(lora_weights=str(path))
    plan = plan_run(config)
    assert (plan.config.rank, plan.config.lora_alpha) == (2, 6.0)
    assert equal(started(config), trained)
    assert not equal(started(settings(rank=2, lora_target_modules=own.lora_target_modules)), trained), "control"


def test_a_start_at_rate_zero_ends_where_it_began(settings: Settings, own: TrainConfig) -> None:
    config = settings(lora_weights=own.output_dir, learning_rate=1e-30, max_train_steps=1)
    write_run_card(run(config, progress=False))
    assert equal(result(config), result(own))
    card = (Path(config.output_dir) / "README.md").read_text()
    assert "started from another adapter" in card
    assert Path(own.output_dir).name not in card


def test_a_started_run_resumes_to_the_bit(settings: Settings, own: TrainConfig) -> None:
    resumes_to_the_bit(settings, lora_weights=own.output_dir)


def test_a_checkpoint_of_another_start_is_refused(settings: Settings, own: TrainConfig, tmp_path: Path) -> None:
    values: dict[str, Any] = {"checkpointing_steps": 2, "lora_weights": own.output_dir}
    run(settings(**values), progress=False)
    path = Path(own.output_dir) / adapters.WEIGHTS_NAME
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = {name: value * 2 for name, value in load_file(path).items()}
    save_file(changed, tmp_path / "changed.safetensors", metadata=metadata)
    values["lora_weights"] = str(tmp_path / "changed.safetensors")
    with pytest.raises(UserError, match="checkpoint-2 was written with lora_weights"):
        run(settings(resume_from_checkpoint="latest", **values), progress=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 4}, "rank is 4; the adapter of lora_weights has 2; leave rank out"),
        ({"lora_alpha": 1.0}, "lora_alpha is 1.0; the adapter of lora_weights has 6.0"),
        ({"use_dora": True}, "use_dora is True; the adapter of lora_weights has False"),
        ({"lora_target_modules": ["to_k"]}, "lora_target_modules is"),
    ],
)
def test_settings_that_disagree_with_the_start_are_refused(
    settings: Settings, own: TrainConfig, values: dict[str, Any], message: str
) -> None:
    agreeing = {"rank": 2, "lora_alpha": 6.0, "lora_target_modules": ["conv1", "to_q", "to_out.0"]}
    plan_run(settings(lora_weights=own.output_dir, **agreeing))
    with pytest.raises(UserError, match=message):
        plan_run(settings(lora_weights=own.output_dir, **values))


def test_a_mixed_start_keeps_each_rank(settings: Settings, tmp_path: Path) -> None:
    unet, state = base_of(settings()).load("unet"), {}
    for path, rank in (("mid_block.attentions.0.proj_in", 2), ("mid_block.resnets.0.conv1", 3), ("conv_in", 2)):
        weight = unet.get_submodule(path).weight
        state[f"unet.{path}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:])
        state[f"unet.{path}.lora_B.weight"] = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2))
        state[f"unet.{path}.alpha"] = torch.tensor(float(rank * rank))
    save_file(state, tmp_path / "mixed.safetensors")
    config = settings(lora_weights=str(tmp_path / "mixed.safetensors"), checkpointing_steps=1, max_train_steps=1)
    run(config, progress=False)
    again = started(settings("again", lora_weights=config.output_dir))
    assert {name: value.shape for name, value in again.items()} == {
        name.removeprefix("unet."): value.shape for name, value in state.items() if not name.endswith("alpha")
    }
    scales = {
        layer.path: layer.scale for layer in plan_run(settings("again", lora_weights=config.output_dir)).start.layers
    }
    assert set(scales.values()) == {2.0, 3.0}


def unet_output(unet: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 4, 16, 16, generator=g), torch.tensor([10, 500]), torch.randn(2, 24, 16, generator=g))
    with torch.no_grad():
        return unet.eval()(*inputs).sample


def stock_output(config: TrainConfig, **options: Any) -> torch.Tensor:
    """What the untouched base gives with the file loaded by diffusers alone."""
    pipe = StableDiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path)
    pipe.load_lora_weights(config.output_dir, **options)
    return unet_output(pipe.unet)


@pytest.fixture
def trained_output(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainConfig], torch.Tensor]:
    """Train, and return what the network gives that was trained."""

    def train(config: TrainConfig) -> torch.Tensor:
        seen = []
        write = results.write

        def look(folder: Path, unet: Any, *rest: Any, **named: Any) -> None:
            seen.append(unet_output(unet))
            write(folder, unet, *rest, **named)

        monkeypatch.setattr(results, "write", look)
        run(config, progress=False)
        return seen[0]

    return train


INITS: dict[str, dict[str, Any]] = {
    "kaiming": {"lora_init": "kaiming"}, "orthogonal": {"lora_init": "orthogonal"}, "pissa": {"lora_init": "pissa"},
    "olora": {"lora_init": "olora"}, "rslora": {"use_rslora": True}, "pissa-rslora": {"lora_init": "pissa", "use_rslora": True},
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in ("orthogonal", "pissa-rslora") else [pytest.mark.slow]) for k in INITS]
)
def test_every_start_is_saved_for_the_untouched_base(
    settings: Settings, trained_output: Callable[[TrainConfig], torch.Tensor], kind: str
) -> None:
    config = settings(rank=4, lora_alpha=6.0, output_kohya_format=True, **INITS[kind])
    wanted = trained_output(config)
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(stock_output(config), wanted, **close)
    torch.testing.assert_close(stock_output(config, weight_name=adapters.KOHYA_NAME), wanted, **close)
    if kind != "rslora":
        other = settings("plain", rank=4, lora_alpha=6.0)
        assert not torch.allclose(trained_output(other), wanted, atol=1e-3), "another start ends elsewhere"
    if "pissa" in kind or kind == "olora":
        half = {n: v.chunk(2, dim=1 if "lora_B" in n else 0)[0].contiguous() for n, v in result(config).items()}
        save_file(half, Path(config.output_dir) / "half.safetensors")
        assert not torch.allclose(stock_output(config, weight_name="half.safetensors"), wanted, atol=1e-2), "control"


@pytest.mark.parametrize("kind", ["pissa", "olora", "rslora"])
def test_every_start_resumes_to_the_bit(settings: Settings, kind: str) -> None:
    resumes_to_the_bit(settings, **INITS[kind])


def test_a_moved_base_gives_what_the_base_gave(settings: Settings) -> None:
    unet = base_of(settings()).load("unet")
    before = unet_output(unet)
    adapters.attach(unet, rank=4, alpha=6.0, targets=["to_q", "to_v"], seed=0, init="pissa")
    torch.testing.assert_close(unet_output(unet), before, rtol=0, atol=1e-5)
    unet.disable_adapters()
    assert not torch.allclose(unet_output(unet), before, atol=1e-3), "control: the base alone was moved"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_init": "pissa", "use_dora": True}, "use_dora is given with lora_init pissa"),
        ({"lora_init": "pissa", "lora_weights": "x"}, "lora_init is given with lora_weights"),
        ({"use_rslora": True, "lora_weights": "x"}, "use_rslora is given with lora_weights"),
        ({"lora_init": "orthogonal", "rank": 3}, "even rank"),
        ({"lora_init": "pissa", "lora_target_modules": ["conv1"]}, "is a convolution"),
        ({"lora_init": "olora", "rank": 64}, "rank is 64 with lora_init olora"),
        ({"lora_init": "pissa", "lora": False}, "lora_init is given"),
    ],
)
def test_starts_that_do_not_fit_are_refused(settings: Settings, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_run(settings(**values))


@pytest.fixture
def tiny_sdxl(tmp_path: Path) -> Path:
    tiny.tiny_sdxl_pipeline().save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


def conditioning(pipe: Any) -> list[torch.Tensor]:
    """What the pipeline's text encoders make of two prompts."""
    with torch.no_grad():
        found = pipe.encode_prompt(
            ["a red disc", "a dog"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return [value for value in found if value is not None]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("kohya", [False, True], ids=["own", "kohya"])
def test_trained_text_encoders_come_back_in_stock_diffusers(
    request: pytest.FixtureRequest, settings: Settings, monkeypatch: pytest.MonkeyPatch, family: str, kohya: bool
) -> None:
    base = {} if family == "sd" else {"pretrained_model_name_or_path": str(request.getfixturevalue("tiny_sdxl"))}
    config = settings(train_text_encoder=True, rank=2, lora_alpha=6.0, output_kohya_format=True, **base)
    seen: list[Any] = []
    write = results.write

    def look(folder: Path, unet: Any, of: Any, config: TrainConfig, text: Any) -> None:
        seen.extend(
            conditioning(
                of.assemble(unet=unet, vae=of.load("vae"), **{p: of.load(p) for p in of.family.text_parts} | text)
            )
        )
        write(folder, unet, of, config, text)

    monkeypatch.setattr(results, "write", look)
    run(config, progress=False)
    pipe = getattr(diffusers, base_of(config).family.pipeline).from_pretrained(config.pretrained_model_name_or_path)
    before = conditioning(pipe)
    own = conditioning_of(config, None)
    pipe.load_lora_weights(config.output_dir, weight_name=adapters.KOHYA_NAME if kohya else adapters.WEIGHTS_NAME)
    for trained, untrained, stock, ours in zip(seen, before, conditioning(pipe), own, strict=True):
        torch.testing.assert_close(stock, trained, rtol=0, atol=1e-5)
        assert torch.equal(ours, trained)
        assert not torch.allclose(untrained, trained, atol=1e-3), "control: they were trained"


def conditioning_of(config: TrainConfig, weight_name: str | None) -> list[torch.Tensor]:
    """The same after our own loader."""
    pipe = getattr(diffusers, base_of(config).family.pipeline).from_pretrained(config.pretrained_model_name_or_path)
    load_lora(pipe, config.output_dir, weight_name=weight_name)
    return conditioning(pipe)


def test_text_encoders_resume_to_the_bit(settings: Settings, tmp_path: Path) -> None:
    resumes_to_the_bit(settings, train_text_encoder=True, text_encoder_lr=3e-3, lora_dropout=0.2, gradient_checkpointing=True,
                       latent_cache_dir=str(tmp_path / "cache"), caption_mitigation="gn")  # fmt: skip


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_text_encoders_are_averaged_with_the_network(
    request: pytest.FixtureRequest, settings: Settings, family: str
) -> None:
    base = {} if family == "sd" else {"pretrained_model_name_or_path": str(request.getfixturevalue("tiny_sdxl"))}
    values: dict[str, Any] = {
        "train_text_encoder": True,
        "use_ema": True,
        "checkpointing_steps": 1,
        "max_train_steps": 3,
        **base,
    }
    seen = settings("seen", **values)
    run(seen, progress=False)
    folders = [Path(seen.output_dir) / f"checkpoint-{step}" for step in (1, 2, 3)]
    raw = [load_file(folder / adapters.WEIGHTS_NAME) for folder in folders]
    # The average by hand: d = 0 after the first step, then (1 + k) / (10 + k).
    up = next(n for n in raw[0] if n.startswith("text_encoder") and n.endswith("q_proj.lora_B.weight"))
    by_hand = torch.zeros_like(raw[0][up])
    for k, weights in enumerate(raw):
        by_hand = by_hand - (1 - ((1 + k) / (10 + k) if k else 0)) * (by_hand - weights[up])
    torch.testing.assert_close(result(seen)[up], by_hand, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(by_hand, raw[-1][up], rtol=1e-3), "control: the weights themselves"
    parts = {name.partition(".")[0] for name in load_file(folders[0] / averaging.LORA_NAME)}
    assert {"text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])} < parts


def test_averaged_text_encoders_resume_to_the_bit(settings: Settings) -> None:
    resumes_to_the_bit(settings, train_text_encoder=True, use_ema=True, validation_prompts=["a disc"], validation_steps=1,
                       num_validation_images=1)  # fmt: skip


def test_a_start_of_text_encoders_is_bit_exact(settings: Settings) -> None:
    config = settings(train_text_encoder=True, rank=2)
    run(config, progress=False)
    again = settings(
        "again", lora_weights=config.output_dir, train_text_encoder=True, learning_rate=1e-30, max_train_steps=1
    )
    run(again, progress=False)
    assert equal(result(again), result(config))
    with pytest.raises(UserError, match="holds updates of text_encoder"):
        plan_run(settings("alone", lora_weights=config.output_dir))


def test_text_encoders_learn_at_their_own_rate(settings: Settings) -> None:
    slow = settings("slow", train_text_encoder=True, text_encoder_lr=1e-30)
    fast = settings("fast", train_text_encoder=True)
    moved = {}
    for config in (slow, fast):
        run(config, progress=False)
        ups = [v for n, v in result(config).items() if n.startswith("text_encoder") and "lora_B" in n]
        moved[config.output_dir] = any(bool((up.abs() > 1e-20).any()) for up in ups)
    assert list(moved.values()) == [False, True]


def test_unused_text_encoders_change_no_bit(settings: Settings) -> None:
    """Embeddings made on the way are those that are held: at a rate of zero a run is the run without."""
    plain, text = settings("plain"), settings("text", train_text_encoder=True, text_encoder_lr=1e-30)
    losses = [run(config, progress=False).losses for config in (plain, text)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    other = run(settings("moving", train_text_encoder=True), progress=False).losses
    assert other != pytest.approx(losses[0], rel=1e-5), "control"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": False}, "train_text_encoder is given; it has no effect here: lora is off"),
    ],
)
def test_text_encoders_where_they_do_not_fit_are_refused(
    settings: Settings, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        settings(train_text_encoder=True, **values)
