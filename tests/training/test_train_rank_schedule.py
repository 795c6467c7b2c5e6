"""T-LoRA in training: the ambient loss under a rank that depends on the noise level, resumed, continued, saved and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from ambient_sd.families import rank_schedule
from ambient_sd.families.lora import WEIGHTS_NAME, load_lora
from ambient_sd.families.rank_schedule import RankSchedule
from ambient_sd.reporting.model_card import write_run_card
from ambient_sd.training import results
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import TrainingBatch, run
from ambient_sd.training.plan import plan_run
from ambient_sd.utils.errors import UserError

Settings = Callable[..., TrainConfig]


def tensors(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / WEIGHTS_NAME)


def output(unet: Any, timestep: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sample: torch.Tensor = unet.eval()(
            torch.randn(2, 4, 16, 16, generator=g), timestep, torch.randn(2, 24, 16, generator=g)
        ).sample
    return sample


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainConfig], Any]:
    """Train, and return the network that was trained."""

    def train(config: TrainConfig) -> Any:
        seen = []
        write = results.write

        def look(folder: Path, unet: Any, *rest: Any, **named: Any) -> None:
            seen.append(unet)
            write(folder, unet, *rest, **named)

        monkeypatch.setattr(results, "write", look)
        run(config, progress=False)
        return seen[0]

    return train


def test_the_network_that_was_trained_is_sampled(settings: Settings, trained: Callable[[TrainConfig], Any]) -> None:
    config = settings(rank=4, lora_min_rank=1, use_rslora=True, lora_dropout=0.2, train_text_encoder=True)
    unet = trained(config)
    ours, stock = (StableDiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path) for _ in range(2))
    assert load_lora(ours, config.output_dir)["min_rank"] == 1
    stock.load_lora_weights(config.output_dir)
    for t in (0, 300, 999):
        torch.testing.assert_close(output(ours.unet, t), output(unet, t), rtol=0, atol=1e-6)
    assert torch.equal(output(stock.unet, 0), output(ours.unet, 0))
    assert not torch.allclose(output(stock.unet, 999), output(ours.unet, 999), atol=1e-3), "others apply the whole rank"


def test_components_learn_at_their_noise_levels_alone(settings: Settings, tmp_path: Path) -> None:
    """B begins at zero, and a component that never acted has neither gradient nor decay."""
    drawn: list[int] = []

    def look(batch: TrainingBatch) -> None:
        drawn.extend(batch.timesteps.tolist())

    moved = {}
    for name, low in (("masked", 1), ("plain", None)):
        drawn.clear()
        config = settings(name, rank=4, lora_min_rank=low, ambient_level=1.0)
        run(config, progress=False, on_batch=look)
        ups = [value.abs().amax(0) > 0 for key, value in tensors(config).items() if "lora_B" in key]
        moved[name] = torch.stack(ups).any(0).tolist()
    acting = RankSchedule(1).ranks(torch.tensor(drawn), 4).max()
    assert acting == 3 and min(drawn) < 353 < max(drawn), "below and above the noise level of the ambient loss"
    assert moved == {"masked": [True, True, True, False], "plain": [True] * 4}


@pytest.mark.parametrize("values", [{}, {"use_ema": True, "gradient_checkpointing": True, "lora_dropout": 0.2}])
def test_it_resumes_to_the_bit(settings: Settings, values: dict[str, Any]) -> None:
    values = {"rank": 4, "lora_min_rank": 2, "checkpointing_steps": 2, "max_train_steps": 4, **values}
    config = settings("straight", **values)
    losses, wanted = run(config, progress=False).losses, tensors(config)
    (Path(config.output_dir) / WEIGHTS_NAME).unlink()
    config.resume_from_checkpoint = "checkpoint-2"
    assert run(config, progress=False).losses == losses
    found = tensors(config)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    other = settings("straight", resume_from_checkpoint="latest", **{**values, "lora_min_rank": 1})
    with pytest.raises(UserError, match="checkpoint-4 was written with lora_min_rank = 2; this run has 1"):
        run(other, progress=False)


def test_gradient_checkpointing_changes_no_loss(settings: Settings) -> None:
    losses = [
        run(settings(str(on), rank=4, lora_min_rank=1, gradient_checkpointing=on), progress=False).losses
        for on in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert run(settings("whole", rank=4), progress=False).losses[1:] != pytest.approx(losses[0][1:], rel=1e-4), (
        "control"
    )


def test_without_it_nothing_is_installed(settings: Settings, trained: Callable[[TrainConfig], Any]) -> None:
    config = settings(rank=4)
    unet = trained(config)
    assert rank_schedule.installed(unet) == {} and not unet.time_proj._forward_pre_hooks
    with safe_open(Path(config.output_dir) / WEIGHTS_NAME, "pt") as file:
        assert "lora_rank_schedule" not in file.metadata()


def test_a_continued_adapter_keeps_its_schedule(settings: Settings) -> None:
    first, plain = settings("first", rank=4, lora_min_rank=2), settings("plain", rank=4)
    for config in (first, plain):
        run(config, progress=False)
    again = settings(
        "again", lora_weights=first.output_dir, learning_rate=1e-30, max_train_steps=1, output_kohya_format=True
    )
    run(again, progress=False)
    for name in (WEIGHTS_NAME, "pytorch_lora_weights_kohya.safetensors"):
        with safe_open(Path(again.output_dir) / name, "pt") as file:
            assert json.loads(file.metadata()["lora_rank_schedule"]) == {"min_rank": 2, "num_train_timesteps": 1000}
    for start, has in ((first, 2), (plain, None)):
        with pytest.raises(UserError, match=f"lora_min_rank is 1; the adapter of lora_weights has {has}"):
            plan_run(settings("other", lora_weights=start.output_dir, lora_min_rank=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": False}, "lora_min_rank is given; it has no effect here: lora is off"),
        ({"rank": 2}, "lora_min_rank is 2; it must be below the rank, 2"),
        ({"rank": 4, "use_dora": True}, "lora_min_rank is given with use_dora"),
        ({"rank": 4, "lora_kind": "lokr"}, "lora_min_rank is given with lora_kind lokr"),
        *(({"rank": 4, "lora_init": init}, f"lora_min_rank is given with lora_init {init}; the update would not begin at zero")
          for init in ("orthogonal", "pissa", "olora")),
    ],
)  # fmt: skip
def test_what_has_no_meaning_under_it_is_refused(settings: Settings, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(lora_min_rank=2, **values)
    settings(lora_min_rank=2, rank=4, lora_init="kaiming")


def test_orthogonal_halves_begin_at_zero_at_the_whole_rank_only() -> None:
    """Why it is refused: B M A is not zero where the halves are cut."""
    from ambient_sd.training import adapters

    unet = tiny.tiny_pipeline().unet
    base = [output(unet, t) for t in (0, 999)]
    adapters.attach(
        unet, rank=4, alpha=4.0, targets=["to_q", "to_v"], seed=0, init="orthogonal", schedule=RankSchedule(1)
    )
    torch.testing.assert_close(output(unet, 0), base[0], rtol=0, atol=1e-5)
    assert not torch.allclose(output(unet, 999), base[1], atol=1e-4)
    plain = tiny.tiny_pipeline().unet
    adapters.attach(
        plain, rank=4, alpha=4.0, targets=["to_q", "to_v"], seed=0, init="kaiming", schedule=RankSchedule(1)
    )
    assert torch.equal(output(plain, 999), base[1]), "control"


def test_the_card_says_how_others_load_it(settings: Settings) -> None:
    config = settings(rank=4, lora_min_rank=1)
    write_run_card(run(config, progress=False))
    card = (Path(config.output_dir) / "README.md").read_text()
    assert "LoRA, rank 1 at the highest noise level to 4 at the lowest (T-LoRA), alpha 4" in card
    assert "Stock diffusers and other programs load the same file with its whole rank" in card
    other = settings("plain", rank=4)
    write_run_card(run(other, progress=False))
    assert "whole rank" not in (Path(other.output_dir) / "README.md").read_text()
