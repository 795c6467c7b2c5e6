"""What a fine-tune adds to its base's guidance: by hand, with a LoRA and with a network of its own, calibrated and asked before sampling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import guard_tools as tools
import pytest
import torch
from peft import LoraConfig

from ambient_sd import MemorizationGuard
from ambient_sd.cli import main
from ambient_sd.guard import scores
from ambient_sd.guard.beside_base import beside_base, screen
from ambient_sd.guard.calibration import FILE_NAMES, Calibration
from ambient_sd.sampling import SamplingConfig, load_pipeline
from ambient_sd.utils.errors import UserError

PROMPTS = list(tools.PROMPTS)


def changed(network: torch.nn.Module, by: float = 0.02, seed: int = 7) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=by)
    return network


@pytest.mark.parametrize(("prediction", "scheduler"), [("v_prediction", "ddim"), ("epsilon", "euler")])
def test_the_score_is_the_norm_of_what_is_added_by_hand(prediction: Any, scheduler: Any) -> None:
    pipe, base = tools.pipeline(prediction, scheduler), tools.pipeline(prediction, scheduler).unet
    changed(pipe.unet)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = beside_base(pipe, PROMPTS, base, latents=noise.clone(), num_inference_steps=4)
    pipe.scheduler.set_timesteps(4)
    t = pipe.scheduler.timesteps[0]
    with torch.no_grad():
        x = pipe.scheduler.scale_model_input(noise * pipe.scheduler.init_noise_sigma, t)
        cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
        guided = [net(x, t, cond).sample - net(x, t, uncond).sample for net in (pipe.unet, base)]
    wanted = (guided[0] - guided[1]).flatten(1).norm(dim=1) * float(scores.noise_factor(pipe.scheduler, t.reshape(1)))
    assert found == pytest.approx(wanted.tolist(), rel=1e-4) and min(found) > 1e-3
    # Control: it is not the fine-tune's own norm, and nothing is added to itself.
    with MemorizationGuard(pipe, stop_after=1) as guard:
        own = guard.decide(PROMPTS, latents=noise.clone(), num_inference_steps=4)
    assert abs(own[0].curve[0] - found[0]) > 1e-3
    same = tools.pipeline(prediction, scheduler)
    assert beside_base(same, PROMPTS, base, latents=noise, num_inference_steps=4) == [0, 0]


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_lora_is_held_against_the_model_without_it(name: str) -> None:
    make: Any = tools.pipeline if name == "sd" else tools.tiny_sd3
    pipe, base = make(), make()
    network = pipe.unet if name == "sd" else pipe.transformer
    torch.manual_seed(5)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    how = {"num_inference_steps": 2, "height": 16, "width": 16} if name == "sd3" else {"num_inference_steps": 2}
    call = [how | {"generator": torch.Generator().manual_seed(0)} for _ in range(3)]
    own = beside_base(pipe, PROMPTS, **call[0])
    apart = beside_base(pipe, PROMPTS, base.unet if name == "sd" else base.transformer, **call[1])
    assert own == pytest.approx(apart, rel=1e-5) and min(own) > 1e-3
    assert not any(getattr(m, "disable_adapters", False) is True for m in network.modules()), "it acts again"
    assert beside_base(pipe, PROMPTS, **call[2]) == own


def test_what_is_no_base_is_refused() -> None:
    pipe = tools.pipeline()
    with pytest.raises(UserError, match="there is no base to compare with"):
        beside_base(pipe, "a")
    with pytest.raises(UserError, match="the base is the pipeline's own network"):
        beside_base(pipe, "a", pipe.unet)
    with pytest.raises(UserError, match="load both with the same dtype"):
        beside_base(pipe, "a", tools.pipeline().unet.to(torch.bfloat16))
    with pytest.raises(UserError, match="must be the fine-tuned one's kind"):
        beside_base(pipe, "a", tools.tiny_sd3().transformer)


def test_it_is_calibrated_beside_a_base_and_asked_before_sampling(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    tuned = Path(shutil.copytree(tiny_base, tmp_path / "tuned"))
    pipe = load_pipeline(SamplingConfig(str(tuned), device="cpu"))
    changed(pipe.unet).save_pretrained(tuned / "unet")
    (tmp_path / "o.txt").write_text("\n".join(f"a cat {i}" for i in range(6)))
    words = ["calibrate", str(tuned), "--ordinary", str(tmp_path / "o.txt"), "--num_inference_steps", "3", "--generations", "2",
             "--fpr", "0.2", "--device", "cpu", "--detector", "beside_base"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(words)
    assert "there is no base to compare with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words[:-2], "--beside", str(tiny_base)])
    assert "only beside_base compares with a base" in capsys.readouterr().err
    main([*words, "--beside", str(tiny_base)])
    assert "what the model adds to its base's guidance" in capsys.readouterr().out
    pipe, base = (load_pipeline(SamplingConfig(str(path), device="cpu")) for path in (tuned, tiny_base))
    found = Calibration.load(tuned, pipe, detector="beside_base")
    assert [(e.steps, e.images_per_prompt) for e in found.entries] == [
        (0, 1),
        (0, 2),
    ] and found.detector == "beside_base"
    assert str(tmp_path) not in (tuned / FILE_NAMES["beside_base"]).read_text()
    for noises in (1, 2):
        screened = screen(
            pipe, ["a cat", ""], found, base.unet, noises=noises, generator=torch.Generator().manual_seed(1)
        )
        assert [s.flagged for s in screened] == [s.score >= found.threshold(0, noises) for s in screened]
        assert screened[1].score < screened[0].score  # the empty prompt guides nowhere
    generator = torch.Generator().manual_seed(1)
    (alone,) = screen(pipe, "a cat", found, base.unet, generator=generator)  # one text is one prompt, not its letters
    assert alone.prompt == "a cat" and screen(pipe, [], found, base.unet) == []
    with pytest.raises(UserError, match="another base was calibrated"):
        screen(pipe, ["a"], found, changed(base.unet, seed=8))
    with pytest.raises(UserError, match="calibrated for the detector beside_base; while sampling the guard"):
        MemorizationGuard(pipe, threshold=found)
    with pytest.raises(UserError, match="holds thresholds of the detector beside_base; norm is asked for"):
        Calibration.load(tuned / FILE_NAMES["beside_base"])
    # Begun anew it takes what is measured; beside another base it refuses to mix.
    main([*words, "--beside", str(tiny_base)])
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    base.unet.save_pretrained(other / "unet")
    with pytest.raises(SystemExit):
        main([*words, "--beside", str(other)])
    assert "the base's weights" in capsys.readouterr().err
    values = json.loads((tuned / FILE_NAMES["beside_base"]).read_text())
    (tuned / FILE_NAMES["beside_base"]).write_text(json.dumps({**values, "base": {**values["base"], "probe": ["x"]}}))
    with pytest.raises(UserError, match="cannot be read"):
        Calibration.load(tuned, detector="beside_base")
