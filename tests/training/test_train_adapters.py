"""Adapters that are trained: where they start from, which kinds there are, and what is written for whom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ambient_sd.reporting.model_card import write_run_card
from ambient_sd.training import adapters
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.training.plan import Plan, base_of, plan_run
from ambient_sd.utils.errors import UserError

Settings = Callable[..., TrainConfig]


class Stop(Exception):
    """The power goes out."""


def result(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / adapters.WEIGHTS_NAME)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stop_after(last: int) -> Callable[[int, dict[str, float]], None]:
    def stop(step: int, _: dict[str, float]) -> None:
        if step == last:
            raise Stop

    return stop


def resumes_to_the_bit(settings: Settings, **values: Any) -> None:
    """A run that dies in step 3 and continues from step 2 ends in the files and losses of one that does not."""
    values = {"checkpointing_steps": 2, "max_train_steps": 4, **values}
    straight, stopped = settings("straight", **values), settings("stopped", **values)
    torch.manual_seed(1)
    losses = run(straight, progress=False).losses
    with pytest.raises(Stop):
        run(stopped, progress=False, on_step=stop_after(3))
    torch.manual_seed(2)
    resumed = settings("stopped", resume_from_checkpoint="latest", **values)
    assert run(resumed, progress=False).losses == losses
    assert equal(result(straight), result(resumed))


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


@pytest.fixture
def own(settings: Settings) -> TrainConfig:
    """A finished training of ours."""
    config = settings(
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


def test_a_checkpoint_of_another_start_is_refused(settings: Settings, own: TrainConfig) -> None:
    values: dict[str, Any] = {"checkpointing_steps": 2, "lora_weights": own.output_dir}
    run(settings(**values), progress=False)
    path = Path(own.output_dir) / adapters.WEIGHTS_NAME
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = {name: value * 2 for name, value in load_file(path).items()}
    save_file(changed, path.parent / "changed.safetensors", metadata=metadata)
    values["lora_weights"] = str(path.parent / "changed.safetensors")
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
