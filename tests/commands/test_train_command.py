"""`ambient-sd train`: a folder becomes a LoRA; what is not said is proposed from images, base and device."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline

from ambient_sd.cli import main
from ambient_sd.commands.train import PROPOSED, TrainOptions, make_parser, sketch, work
from ambient_sd.training import validation
from ambient_sd.training.config import PRESETS, TrainConfig, load_yaml, parse
from ambient_sd.training.proposals import propose
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.hub_ids import resolve_model_id

ROOT = Path(__file__).parents[2]
SD2 = {"native": 512, "step": 8, "parameters": 866_000_000, "device": torch.device("cpu")}


def proposed(given: Any = (), sizes: Any = ((512, 512),), count: int = 50, **more: Any) -> dict[str, Any]:
    found = propose(given, sizes=list(sizes), count=count, distinct=count, **{**SD2, **more})
    return {one.name: one.value for one in found}


def test_a_given_setting_is_never_proposed() -> None:
    everything = proposed()
    assert everything["lora"] is True and everything["keep"] == "best"
    assert everything["objective"] == "distill" and everything["distill_level"] == 2.5
    for name, value in everything.items():
        more = {"lora": value} if name == "lora" else {"steps": value} if name == "max_train_steps" else {}
        more |= {"batch": value} if name == "train_batch_size" else {}
        assert set(proposed({name}, **more)) == set(everything) - {name}
    assert proposed(objective="ambient")["ambient_level"] == "auto"
    assert not {"ambient_level", "distill_level", "objective"} & set(proposed({"objective"}, objective="plain"))
    assert "ambient_level" not in proposed({"ambient_timestep"}, objective="ambient")
    assert "distill_level" not in proposed({"ambient_level", "objective"}), "one given level is both"
    assert "rank" not in proposed({"lora"}, lora=False) and "rank" not in proposed({"lora_weights"})
    assert "use_ema" not in proposed(spread=True)
    told = set(everything) | {
        "aspect_ratio_buckets",
        "mixed_precision",
        "gradient_checkpointing",
        "gradient_checkpointing_fraction",
    }
    assert told - {"distill_level"} == set(PROPOSED)


def test_an_end_is_promised_only_where_one_is_looked_for() -> None:
    def steps(**more: Any) -> str:
        (found,) = (
            p
            for p in propose([], sizes=[(512, 512)], count=9, **{"distinct": 9, **SD2, **more})
            if p.name == "max_train_steps"
        )
        return found.reason

    assert "ends where copying begins" in steps()
    assert "ends" not in steps(keep="last") and "ends" not in steps(distinct=1)


@pytest.mark.parametrize(
    ("given", "objective"),
    [({}, "distill"), ({"distill_level": 4.0}, "distill"), ({"distill_without": ["sks"]}, "distill"), ({"learning_rate": 1.0}, "distill"),
     ({"objective": "plain"}, "plain"), ({"objective": "ambient"}, "ambient"), ({"objective": "distill", "ambient_level": 1.0}, "distill"),
     ({"ambient_level": 1.0}, "ambient"), ({"ambient_level": 0.0}, "ambient"), ({"ambient_timestep": 300}, "ambient"), ({"reweight": 0}, "ambient"),
     ({"near_duplicates": "off"}, "ambient"), ({"fresh_copies": True}, "ambient"), ({"agc": 0.8}, "ambient"), ({"lora_init": "pissa"}, "ambient"),
     ({"fresh_copies": False}, "distill"), ({"lora_min_rank": 8}, "distill"), ({"lora_init": "orthogonal"}, "distill"), ({"ambient_level": 1.0, "distill_level": 2.5}, "distill")],
)  # fmt: skip
def test_a_setting_of_the_ambient_loss_chooses_it(given: dict[str, Any], objective: str) -> None:
    made = sketch({"pretrained_model_name_or_path": "base", "train_data_dir": "x", **given})
    assert made.objective == objective


@pytest.mark.parametrize(
    ("size", "native", "wanted"),
    [((900, 700), 512, 512), ((450, 600), 512, 512), ((300, 300), 512, 256), ((64, 64), 64, 64), ((70, 66), 512, 64),
     ((50, 50), 512, 48), ((40, 40), 64, 40), ((2000, 1500), 1024, 1024)],
)  # fmt: skip
def test_resolution_is_the_bases_or_what_small_images_have(size: tuple[int, int], native: int, wanted: int) -> None:
    assert proposed(sizes=[size] * 9, native=native)["resolution"] == wanted


def test_steps_follow_the_number_of_images_within_bounds() -> None:
    samples = [proposed(count=n, batch=4, given={"train_batch_size"})["max_train_steps"] * 4 for n in (5, 100, 100_000)]
    assert samples == [4_000, 10_000, 40_000]
    assert proposed(count=100, processes=2)["max_train_steps"] * 2 == proposed(count=100)["max_train_steps"]


def test_mixed_shapes_get_buckets() -> None:
    assert proposed(sizes=[(512, 512)] * 8 + [(768, 512)] * 2)["aspect_ratio_buckets"] == "auto"
    assert "aspect_ratio_buckets" not in proposed(sizes=[(512, 512)] * 9 + [(768, 512)])
    assert "aspect_ratio_buckets" not in proposed({"center_crop"}, sizes=[(512, 512), (768, 512)])


def test_too_few_images_are_not_measured() -> None:
    few = proposed(count=3, objective="ambient")
    assert few["ambient_level"] == 1.0 and "probe_steps" in few
    assert "probe_steps" not in proposed(count=1)


def test_a_gpu_recomputes_activations_only_where_it_must() -> None:
    asked: list[Any] = []

    def memory(settings: Any) -> int:
        asked.append(dict(settings))
        return (8 if settings.get("gradient_checkpointing") else 10) * 2**30

    for room, recomputes, share in ((24, False, None), (11, True, 0.5), (9, True, None)):
        found = proposed(device=torch.device("cuda"), memory=memory, room=room * 2**30)
        assert found["gradient_checkpointing"] is recomputes and found["mixed_precision"] in ("bf16", "fp16")
        assert found.get("gradient_checkpointing_fraction") == share
    assert asked[0]["train_batch_size"] == 4 and asked[0]["lora"] is True and asked[0]["resolution"] == 512
    assert "gradient_checkpointing" not in proposed(
        {"gradient_checkpointing"}, device=torch.device("cuda"), memory=memory
    )
    assert len(asked) == 5, "what is given is not predicted, and half only where all is too much"


def test_presets_are_the_files_of_the_configs_folder() -> None:
    names = {path.stem for path in PRESETS.glob("*.yaml")}
    assert names == {path.stem for path in (ROOT / "configs").glob("*-lora.yaml")} | {"sd2-full"}
    for name in names:
        assert load_yaml(name) == load_yaml(ROOT / "configs" / f"{name}.yaml")
    assert parse(["--config", "sd2-lora", "--train_data_dir", "x"]).rank == 16
    with pytest.raises(UserError, match=r"the presets are flux-lora.*sd15-lora.*the nearest known one is sd2-lora"):
        load_yaml("sd2-lorra")


def test_embedded_is_the_base_of_the_package() -> None:
    assert (Path(resolve_model_id("embedded")) / "model_index.json").is_file()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base: Path) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validation, "INFERENCE_STEPS", 2)
    for name, value in (("_AUDITED", 8), ("INFERENCE_STEPS", 2)):  # no claim hangs on how much the audit looks at
        monkeypatch.setattr(f"ambient_sd.commands.train.work.{name}", value)
    monkeypatch.setattr(logging.getLogger("ambient_sd"), "handlers", [])
    tiny.tiny_folder(tmp_path / "my-images", count=12)
    return f"train my-images --pretrained_model_name_or_path {tiny_base} --max_train_steps 4 --probe_images 2 --report_to none"


def test_one_command_makes_a_lora_with_card_curve_and_audit(quick: str, capsys: pytest.CaptureFixture[str], tiny_base: Path) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([*quick.split(), "--audit"])
        raise SystemExit(0)
    said = capsys.readouterr().out
    assert stop.value.code == 0, said
    out = Path("my-images-lora")
    for name in ("pytorch_lora_weights.safetensors", "README.md", "card.json", "probe/curve.png", "audit/audit.html"):
        assert (out / name).is_file(), name
    assert "resolution 32: the base's 32" in said
    assert "objective distill: fewer images come back" in said and "distill_level 2.5: " in said
    card = (out / "README.md").read_text()
    assert "kept step" in card and "probe/curve.png" in card and "How much of the training images it hands back has not" not in card  # fmt: skip
    record = json.loads((out / "audit" / "audit.json").read_text())
    assert record["model"]["guidance_scale"] == 2
    StableDiffusionPipeline.from_pretrained(tiny_base).load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")  # fmt: skip

    # The same command again: a finished training is not trained again.
    with pytest.raises(SystemExit) as stop:
        main(quick.split())
    assert stop.value.code == 2 and "holds a finished training" in capsys.readouterr().err


def test_an_interrupted_run_resumes_with_the_same_command(quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main(quick.split())
    out = Path("my-images-lora")
    whole = (out / "pytorch_lora_weights.safetensors").read_bytes()
    checkpoints = sorted(path.name for path in out.glob("checkpoint-*"))
    assert checkpoints
    (out / "pytorch_lora_weights.safetensors").unlink()
    losses = (out / "losses.jsonl").read_text()
    main(quick.split())
    assert (out / "pytorch_lora_weights.safetensors").read_bytes() == whole
    assert (out / "losses.jsonl").read_text() == losses


def test_dry_run_trains_and_writes_nothing(
    quick: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.loads(line) for line in Path("my-images/metadata.jsonl").read_text().splitlines()]
    Path("my-images/metadata.jsonl").write_text("".join(json.dumps(line | {"text": f"ohwx {line['text']}"}) + "\n" for line in lines))  # fmt: skip
    main([*quick.split(), "--dry_run"])
    said = capsys.readouterr().out
    assert said.count("--distill_without ohwx asks the base without it") == 1
    assert "--distill_without" not in caplog.text, "the steps that are measured say it again"
    assert not Path("my-images-lora").exists()
    for word in (
        "images     12 at 32 px",
        "buckets    32 x 32 px: 12",
        "time       about",
        "memory",
        "writes     my-images-lora",
    ):
        assert word in said, said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("train no-such-folder --pretrained_model_name_or_path embedded", "there is no file or folder no-such-folder"),
        ("train my-images", "pretrained_model_name_or_path is missing"),
        ("train my-images --pretrained_model_name_or_path embedded --no-lora --rank 4", "rank is given"),
        ("train my-images --config no-preset", "config is no-preset"),
        ("train my-images --pretrained_model_name_or_path embedded --num_processes 0", "num_processes is 0"),
        ("train", "DATA"),
    ],
)
def test_a_mistake_ends_in_one_line(words: str, text: str, quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and text in error and error.count("\n") == 1, error


def test_several_devices_are_launched_by_accelerate(quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def execve(path: str, command: list[str], env: dict[str, str]) -> None:
        called.append((command, env))
        raise SystemExit(0)

    monkeypatch.setattr("os.execve", execve)
    with pytest.raises(SystemExit):
        main([*quick.split(), "--num_processes", "2"])
    ((command, env),) = called
    assert command[1:6] == ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    assert command[6:9] == ["-m", "ambient_sd.cli", "train"] and env["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize(
    "given", [{"stop_on_memorization": 0.05}, {"probe_images": 4}, {"keep": "best"}, {"probe_prompts": ["a red disc"]}]
)
def test_what_needs_an_evaluation_may_be_given_alone_on_a_gpu(given: dict[str, Any], quick: str, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:  # fmt: skip
    monkeypatch.setattr(work, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**36, 2**36))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    config, proposed = work.complete({"pretrained_model_name_or_path": str(tiny_base), "train_data_dir": "my-images", "output_dir": "x", **given})  # fmt: skip
    assert config.keep == "best" and "gradient_checkpointing" in {one.name for one in proposed}


@pytest.mark.parametrize(
    ("words", "objective"),
    [("", "distill"), ("--ambient_level 1", "ambient"), ("--agc 0.8", "ambient"), ("--rank 8", "distill")],
)
def test_a_preset_leaves_the_choice_to_the_command_line(words: str, objective: str, quick: str) -> None:
    args = make_parser().parse_args(["my-images", "--config", "sd2-lora", *words.split()])
    options = TrainOptions("my-images", config="sd2-lora")
    values = options.values(
        {k: v for k, v in vars(args).items() if k not in ("folder", "config", "dry_run", "audit", "num_processes")}
    )
    assert sketch(values).objective == objective


def test_results_never_lie_among_the_images(quick: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir("my-images")
    with pytest.raises(SystemExit):
        main(quick.replace("train my-images", "train .").split())
    error = capsys.readouterr().err
    assert (
        "output_dir is my-images-lora" in error
        and "it lies in the folder of images" in error
        and error.count("\n") == 1
    )
    assert not Path("my-images-lora").exists()


def test_a_dry_run_measures_without_what_few_images_lack(
    monkeypatch: pytest.MonkeyPatch, quick: str, tiny_base: Path
) -> None:
    ran: list[TrainConfig] = []

    def run(config: TrainConfig, *, on_step: Any, **_: Any) -> None:
        ran.append(config)
        for step in range(3):
            on_step(step, {})

    monkeypatch.setattr(work, "run", run)
    config = TrainConfig(str(tiny_base), train_data_dir="my-images", objective="distill", distill_without=["disc"], resolution=32, lora=True,
                         with_prior_preservation=True, class_prompt="a shape", class_data_dir="class", output_dir="out")  # fmt: skip
    plan = work.plan_run(config)
    work._measure(config, plan)
    (measured,) = ran
    assert measured.distill_without is None
    assert measured.class_data_dir != "class" and measured.num_class_images == 4 and not Path("class").exists()


def test_configs_that_need_a_default_of_the_command_may_be_given_alone() -> None:
    with pytest.raises(UserError, match="keep"):
        TrainConfig("base", train_data_dir="x", keep="best")
