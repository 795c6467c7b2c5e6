"""Sampling: an image is what diffusers makes of its seed, whatever samples it, and however many processes share the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from launching import launch_words

from ambient_sd import MemorizationGuard
from ambient_sd.guard import policies
from ambient_sd.guard.recorder import active_guard
from ambient_sd.sampling import (
    MOST_IMAGES,
    Request,
    SamplingConfig,
    check_images_per_prompt,
    collect_prompts,
    generate,
    image_seed,
    in_batches,
    load_pipeline,
    requests_for,
)
from ambient_sd.utils.errors import UserError


def config(model: Path, **changes: Any) -> SamplingConfig:
    return SamplingConfig(str(model), **{"num_inference_steps": 3, "device": "cpu", "seed": 7, **changes})


def bytes_of(pipe: Any, requests: list[Request], settings: SamplingConfig, **options: Any) -> list[bytes]:
    return [
        one.image.tobytes() for batch in generate(pipe, requests, settings, **options) for one in batch if one.image
    ]


@pytest.mark.parametrize(
    "sampler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"]
)
def test_an_image_is_stock_diffusers_with_its_seed(tiny_base: Path, sampler: str) -> None:
    """Two of the samplers add noise on the way."""
    settings = config(tiny_base, batch_size=1)
    pipe, stock = load_pipeline(settings), diffusers.StableDiffusionPipeline.from_pretrained(tiny_base)
    for one in (pipe, stock):
        one.scheduler = getattr(diffusers, sampler).from_config(one.scheduler.config)
    request = Request("a cat", prompt_index=4, image_index=2)
    (ours,) = bytes_of(pipe, [request], settings, guard=MemorizationGuard(pipe))

    def by_stock(seed: int) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        return bytes(stock("a cat", num_inference_steps=3, generator=generator).images[0].tobytes())

    assert ours == by_stock(image_seed(7, 4, 2))
    assert ours != by_stock(image_seed(7, 4, 3)), "negative control"


def test_seeds_are_the_documented_sum_and_never_collide() -> None:
    assert image_seed(3, 2, 1) == 3 * 1_000_003 + 2 * 1_009 + 1
    seeds = [image_seed(0, p, i) for p in range(3) for i in range(MOST_IMAGES)]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= image_seed(-5, 0) < 2**63 and 0 <= image_seed(2**62, 0) < 2**63
    for count in (0, MOST_IMAGES + 1):
        with pytest.raises(UserError, match=f"images per prompt is {count}; it must be from 1 to 1009"):
            check_images_per_prompt(count)
    with pytest.raises(UserError, match="would collide"):
        image_seed(0, 0, MOST_IMAGES)


def test_start_noise_is_drawn_in_float32_whatever_the_precision(tiny_base: Path) -> None:
    expected = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(image_seed(7, 1)))
    for dtype in ("float32", "bfloat16"):
        settings = config(tiny_base, dtype=dtype)
        seen: list[torch.Tensor] = []

        def ask(_: Any, options: dict[str, Any], seen: list[torch.Tensor] = seen) -> list[None]:
            seen.append(options["latents"])
            return [None]

        list(in_batches(load_pipeline(settings), [Request("a cat", 1)], settings, ask))
        assert seen[0].dtype == getattr(torch, dtype)
        assert torch.equal(seen[0], expected.to(seen[0].dtype))


def test_batches_change_nothing_but_rounding_and_requests_may_be_left_out(tiny_base: Path) -> None:
    settings, many = config(tiny_base, batch_size=1), config(tiny_base, batch_size=4)
    pipe, requests = load_pipeline(settings), requests_for(["a cat", "the red dog"], 3)
    alone, together = (bytes_of(pipe, requests, each) for each in (settings, many))
    for a, b in zip(alone, together, strict=True):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1
    assert bytes_of(pipe, requests[4:], settings) == alone[4:]
    assert len(set(alone)) == 6, "negative control: other places, other images"


@pytest.mark.parametrize("policy", [policies.RandomNumbers(), policies.GaussianEmbeddingNoise()])
def test_a_random_policy_does_not_see_the_batch(tiny_base: Path, policy: policies.Policy) -> None:
    """Images of one prompt differ in what the policy makes of them, in one call or in several."""
    settings = config(tiny_base, batch_size=1)
    pipe, requests = load_pipeline(settings), requests_for(["a cat"], 3)
    curves = [
        [one.report.curve for batch in generate(pipe, requests, config(tiny_base, batch_size=size), guard=MemorizationGuard(pipe, policy)) for one in batch if one.report]
        for size in (1, 3)
    ]  # fmt: skip
    for alone, together in zip(*curves, strict=True):
        assert alone == pytest.approx(together, rel=1e-3)
    # Negative control: counted within its own call, the second image is changed as the first one was.
    guard = MemorizationGuard(pipe, policy)
    (uncounted,) = in_batches(pipe, requests[1:2], settings, lambda _, options: guard.decide(["a cat"], **options))
    assert uncounted[0].curve != pytest.approx(curves[0][1], rel=1e-3)


def test_the_guard_is_on_during_calls_alone(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tiny_base, batch_size=1)
    pipe = load_pipeline(settings)
    guard, call, seen = MemorizationGuard(pipe), type(pipe).__call__, []

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(active_guard(pipe))
        if len(seen) == 2:
            raise RuntimeError("a failing call")
        return call(*args, **options)

    monkeypatch.setattr(type(pipe), "__call__", watched)
    with pytest.raises(RuntimeError):
        for _ in generate(pipe, requests_for(["a cat", "a dog"]), settings, guard=guard):
            assert active_guard(pipe) is None
    assert seen == [guard, guard] and active_guard(pipe) is None


def test_prompts_are_given_as_texts_or_in_files(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a disc"}\n{"prompt": ""}\n')
    assert collect_prompts(["a cat", str(tmp_path / "p.jsonl")]) == ["a cat", "a disc", ""]
    (tmp_path / "p.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(UserError, match="line 1 of"):
        collect_prompts([str(tmp_path / "p.jsonl")])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(tiny_base: Path, tmp_path: Path) -> None:
    """Five images in batches of two: the last round has a process without a batch. Words are explained, and the run is resumed."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\nfish\nthe red house\n")
    for processes in (1, 2):
        words = ["-m", "ambient_sd.cli", "sample", str(tiny_base), "--prompts", str(tmp_path / "prompts.txt"), "--num_inference_steps", "2",
                 "--batch_size", "2", "--attribution", "all", "--device", "cpu", "--out", str(tmp_path / str(processes))]  # fmt: skip
        done = launch_words(processes, words)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("5 images, median score") == 1, "said once"
    one, two = (files_of(tmp_path / name) for name in ("1", "2"))
    assert sorted(one) == sorted(two) and len(one) == 5 + 4
    assert [name for name in one if one[name] != two[name]] == []
    assert len({json.loads(line)["seed"] for line in one["samples.jsonl"].splitlines()}) == 5
    (tmp_path / "2" / "images" / "00003-00.png").unlink()
    done = launch_words(2, words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files_of(tmp_path / "2").keys() == one.keys()
