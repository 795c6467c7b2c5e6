"""Settings: one field = one flag = one YAML key; whatever breaks a rule ends in one line before anything loads."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ambient_sd.training.config import TrainConfig, load_yaml, make_parser, parse
from ambient_sd.utils.errors import UserError

BASE = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "images"]
SCRIPT = Path(__file__).parents[2] / "train_text_to_image_ambient.py"


def given(**values: object) -> TrainConfig:
    return TrainConfig(**{"pretrained_model_name_or_path": "base", "train_data_dir": "images", **values})  # type: ignore[arg-type]


def test_defaults_are_those_of_the_diffusers_scripts() -> None:
    config = parse(BASE)
    expected = {
        "resolution": 512, "center_crop": False, "random_flip": False, "train_batch_size": 16, "num_train_epochs": 100,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 500,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "checkpointing_steps": 500, "output_dir": "sd-model-finetuned", "report_to": "tensorboard",
        "logging_dir": "logs", "image_column": "image", "caption_column": "text", "dataloader_num_workers": 0,
    }  # fmt: skip
    assert {k: getattr(config, k) for k in expected} == expected


def test_names_of_diffusers_dreambooth_scripts_are_other_names() -> None:
    config = parse([*BASE[:2], "--instance_data_dir", "images", "--lora", "--lora_layers", "to_k,to_q, to_v", "proj"])
    assert config.train_data_dir == "images" and config.lora_target_modules == ["to_k", "to_q", "to_v", "proj"]


def test_options_of_a_schedule_need_it() -> None:
    assert given(lr_scheduler="polynomial", lr_power=2.0).lr_power == 2.0
    for values in ({"lr_power": 2.0}, {"lr_num_cycles": 2, "lr_scheduler": "cosine"}):
        with pytest.raises(UserError, match="has no effect here: lr_scheduler is"):
            given(**values)


def test_every_field_is_a_flag_and_every_flag_a_field() -> None:
    flags = {a.dest for a in make_parser()._actions} - {"help", "config"}
    assert flags == {f.name for f in dataclasses.fields(TrainConfig)}


def test_mode_defaults_are_filled_in_for_the_chosen_mode_only() -> None:
    ambient, plain, lora = given(), given(objective="plain"), given(lora=True, rank=8, validation_prompts=["a"])
    assert (ambient.ambient_level, ambient.reweight, ambient.rank) == (1.0, 2, None)
    assert (plain.ambient_level, plain.reweight) == (None, None)
    assert (lora.rank, lora.lora_alpha, lora.validation_epochs, lora.num_validation_images) == (8, 8.0, 1, 4)
    assert given(ambient_level=0).ambient_level == 0.0, "level zero is a choice, not an absence"


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-5\nlora: true\nrank: 8\nmixed_precision: no\nvalidation_prompts: a red apple\n")
    config = parse([*BASE, "--config", str(path), "--rank", "2"])
    # 1e-5 is a text and `no` is false to YAML 1.1: both must mean what a person means.
    assert (config.learning_rate, config.rank, config.mixed_precision) == (1e-5, 2, "no")
    assert config.validation_prompts == ["a red apple"]


@pytest.mark.parametrize(
    ("file", "flags", "dropped"),
    [
        ("ambient_level: 0.5\nreweight: 1\nsnr_gamma: 5", "--objective plain", ["ambient_level", "reweight"]),
        ("ambient_level: 0.5\nnear_duplicates: 'off'", "--objective gap --gap_upper 2", ["near_duplicates"]),
        ("objective: plain\nnoise_offset: 0.1", "--objective ambient", ["noise_offset"]),
        ("lora: true\nrank: 8\nuse_dora: true", "--no-lora", ["rank", "use_dora"]),
        ("use_ema: true\noffload_ema: true", "--no-use_ema", ["offload_ema"]),
        ("probe_steps: 5\nkeep: best\nprobe_prompts: [a]", "--keep last", ["probe_prompts"]),
        ("agc: 0.5\nlora: true\nrank: 8", "--rank 2", []),
    ],
)
def test_the_file_loses_options_of_modes_switched_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, flags: str, dropped: list[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(file)
    config = parse([*BASE, "--config", str(path), *flags.split()])
    default = given(objective=config.objective, gap_upper=config.gap_upper, lora=config.lora,
                    ambient_level=config.ambient_level if config.objective == "gap" else None)  # fmt: skip
    for name in dropped:
        assert getattr(config, name) == getattr(default, name)
    said = capsys.readouterr().err
    assert said.count("\n") == bool(dropped)
    assert all(name in said for name in dropped)
    assert "snr_gamma" not in said


def test_the_command_lines_own_options_are_still_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lora: true\nrank: 8\nambient_level: 0.5\n")
    for flags, name in (("--objective plain --reweight 2", "reweight"), ("--no-lora --rank 4", "rank")):
        with pytest.raises(UserError, match=f"{name} is given"):
            parse([*BASE, "--config", str(path), *flags.split()])
    path.write_text("rank: 8\n")  # wrong in itself: the command line has nothing to do with it
    with pytest.raises(UserError, match="rank is given"):
        parse([*BASE, "--config", str(path), "--objective", "plain"])


def test_a_flag_replaces_the_settings_of_the_file_that_answer_the_same_question(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "pretrained_model_name_or_path: base\ntrain_data_dir: my-images\nambient_level: 1.0\n"
        "validation_prompts: [a]\nvalidation_steps: 500\nmax_train_steps: 9\n"
    )
    flags = "--dataset_name a/b --ambient_timestep 300 --validation_epochs 2 --num_train_epochs 3"
    config = parse(["--config", str(path), *flags.split()])
    assert (config.source, config.train_data_dir, config.max_train_steps) == ("a/b", None, None)
    assert (config.ambient_level, config.ambient_timestep, config.validation_steps) == (None, 300, None)
    with pytest.raises(UserError, match="both dataset_name and train_data_dir"):
        parse(["--config", str(path), "--dataset_name", "a/b", "--train_data_dir", "c"])


def test_a_seed_of_64_bits_is_kept_to_the_last() -> None:
    assert given(seed="1234567890123456789", noise_seed=2**64 - 1).seed == 1234567890123456789


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    for config in (given(), given(lora=True, validation_prompts=["a", "b"], row_filter=["split=x"]),
                   given(objective="gap", ambient_level=0.5, gap_upper=2)):  # fmt: skip
        path = config.save(tmp_path)
        assert parse(["--config", str(path)]) == config


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"resolution": "large"}, ["resolution", "'large'", "integer", "512"]),
        ({"resolution": 4}, ["resolution", "at least 8"]),
        ({"resolution": 64.5}, ["resolution", "integer"]),
        ({"train_batch_size": 0}, ["train_batch_size", "at least 1"]),
        ({"train_batch_size": True}, ["train_batch_size", "integer"]),
        ({"resolution": float("inf")}, ["resolution", "integer"]),
        ({"seed": 2**64}, ["seed", "at most 18446744073709551615"]),
        ({"learning_rate": 10**400}, ["learning_rate", "finite"]),
        ({"resolution": None}, ["resolution", "integer", "512"]),
        ({"learning_rate": 0}, ["learning_rate", "above 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"caption_dropout": 1.5}, ["caption_dropout", "at most 1"]),
        ({"ambient_level": -0.5}, ["ambient_level", "-0.5", "at least 0"]),
        ({"reweight": 3}, ["reweight", "one of 2, 1, 0"]),
        ({"objective": "ambeint"}, ["objective", "ambient, plain, gap"]),
        ({"lora": "yes"}, ["lora", "true or false"]),
        ({"output_dir": ""}, ["output_dir", "text"]),
        ({"adam_beta1": 1.0}, ["adam_beta1", "below 1"]),
        ({"row_filter": ["subset"]}, ["row_filter", "column=value"]),
        ({"ambient_level": 1.0, "ambient_timestep": 300}, ["ambient_level and ambient_timestep", "leave one"]),
        ({"gap_upper": 2.0}, ["gap_upper", "objective is ambient"]),
        ({"objective": "plain", "ambient_level": 1.0}, ["ambient_level", "objective is plain"]),
        ({"objective": "plain", "reweight": 2}, ["reweight", "objective is plain"]),
        ({"objective": "gap", "ambient_level": 1.0}, ["gap", "gap_upper"]),
        ({"objective": "weighted", "gap_upper": 1.0}, ["gap_upper", "objective is weighted"]),
        ({"logit_mean": 0.5}, ["logit_mean", "weighting_scheme is none"]),
        ({"objective": "plain", "fresh_copies": True}, ["fresh_copies", "objective is plain"]),
        ({"objective": "gap", "ambient_level": 1.0, "gap_upper": 0.5}, ["gap_upper", "above ambient_level"]),
        ({"rank": 4}, ["rank", "--lora"]),
        ({"lora_alpha": 4}, ["lora_alpha", "--lora"]),
        ({"num_validation_images": 2}, ["num_validation_images", "--validation_prompts"]),
        ({"validation_prompts": ["a"], "validation_steps": 2, "validation_epochs": 1}, ["validation_steps"]),
        ({"train_data_dir": None}, ["no images", "train_data_dir"]),
        ({"dataset_name": "a/b"}, ["both dataset_name and train_data_dir"]),
        ({"dataset_config_name": "x"}, ["dataset_config_name"]),
        ({"pretrained_model_name_or_path": None}, ["pretrained_model_name_or_path"]),
    ],
)  # fmt: skip
def test_a_bad_value_names_key_rule_and_remedy_in_one_line(values: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        given(**values)
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


def test_unknown_flags_and_keys_suggest_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown argument --learning_rat.*--learning_rate"):
        parse([*BASE, "--learning_rat", "1"])
    with pytest.raises(UserError, match=r"--dream_training is given; .*; leave it out"):
        parse([*BASE, "--dream_training"])
    path = tmp_path / "c.yaml"
    path.write_text("trian_batch_size: 4\n")
    with pytest.raises(UserError, match=r"unknown key 'trian_batch_size' in .*train_batch_size"):
        load_yaml(path)


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "a: [\n", "just words", "\x00", "seed: 1\nseed: 2\n", "output_dir: 2026-02-30\n", "[" * 5000]
)
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="config is") as caught:
        load_yaml(path)
    assert "\n" not in str(caught.value)


def test_help_and_typos_come_without_importing_torch() -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['train', *sys.argv[1:]]\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('torch' in sys.modules, end.code)\n"
    )
    helped = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout.strip().endswith("False 0")
    assert all(f"{group}:" in helped.stdout for group in ("objective", "LoRA", "checkpoints"))
    assert "--ambient_level" in helped.stdout
    typo = subprocess.run([sys.executable, "-c", code, "--rnak", "4"], capture_output=True, text=True, check=True)
    assert typo.stdout.strip() == "False 2"
    assert typo.stderr.count("\n") == 1
    assert "--rank" in typo.stderr


def test_yaml_dump_holds_only_what_is_set() -> None:
    assert "rank" not in yaml.safe_dump(given().to_dict())
    assert given(lora=True).to_dict()["rank"] == 4
