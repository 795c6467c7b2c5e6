"""docs/flags.md names every flag of diffusers' scripts and of ours, says what is true of it, and names tests that exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ambient_sd.training.config import TrainConfig, make_parser, parse
from ambient_sd.training.elsewhere import ELSEWHERE
from ambient_sd.utils.errors import UserError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
_BOTH = """
    pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir image_column caption_column
    max_train_samples cache_dir image_interpolation_mode resolution center_crop random_flip dataloader_num_workers seed
    train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps gradient_checkpointing learning_rate scale_lr
    lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_8bit_adam max_grad_norm
    mixed_precision allow_tf32 enable_xformers_memory_efficient_attention snr_gamma noise_offset prediction_type
    validation_epochs checkpointing_steps checkpoints_total_limit resume_from_checkpoint output_dir logging_dir report_to
    local_rank push_to_hub hub_token hub_model_id
"""
_FULL = "non_ema_revision input_perturbation dream_training dream_detail_preservation use_ema offload_ema foreach_ema \
validation_prompts tracker_project_name"
_LORA = "rank validation_prompt num_validation_images"
_XL = "pretrained_vae_model_name_or_path proportion_empty_prompts train_text_encoder timestep_bias_strategy \
timestep_bias_multiplier timestep_bias_begin timestep_bias_end timestep_bias_portion enable_npu_flash_attention debug_loss"
# What the scripts above lack of those of SD3, FLUX.1, FLUX.2 klein, Sana and Lumina-Image 2.0; the rest is in the second table.
_DREAMBOOTH = """
    instance_data_dir max_sequence_length guidance_scale lora_layers lr_num_cycles lr_power lora_blocks optimizer prodigy_beta3 prodigy_decouple
    prodigy_use_bias_correction prodigy_safeguard_warmup adam_weight_decay_text_encoder repeats cache_latents sample_batch_size
    prior_generation_precision upcast_before_saving skip_final_inference final_validation_prompt use_aspect_ratio_buckets
    text_encoder_out_layers system_prompt offload fsdp_text_encoder enable_vae_tiling do_fp8_training bnb_quantization_config_path
"""
THEIRS = {
    name: script
    for names, script in ((_BOTH, "both"), (_FULL, "full"), (_LORA, "LoRA"), (_XL, "XL"), (_DREAMBOOTH, "DB"))
    for name in names.split()
}


def rows(page: str = PAGE) -> dict[str, tuple[str, str, str]]:
    """Flag -> script, here, text of the first table."""
    return {m[1]: (m[2], m[3], m[4].strip())
            for m in re.finditer(r"^\| `(\w+)` \| (\w+) \| (same|better|absent) \|(.*)\|$", page, re.M)}  # fmt: skip


def ours() -> set[str]:
    section = PAGE.partition("| flag | what it is |")[2].partition("## Min-SNR")[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.M))


def mismatch(table: dict[str, tuple[str, str, str]], own: set[str]) -> list[str]:
    flags = {option.lstrip("-") for action in make_parser()._actions for option in action.option_strings}
    wrong = [f"{name}: no row" for name in THEIRS.keys() - table.keys()]
    for name, (script, here, text) in table.items():
        if THEIRS.get(name) != script:
            wrong.append(f"{name}: script")
        if (here in ("same", "better") and name not in flags) or (here == "absent" and name in flags):
            wrong.append(f"{name}: {here} is not true")
        if here in ("better", "absent") and not text:
            wrong.append(f"{name}: no reason")
    return wrong + [f"{name}: in neither or both tables" for name in FIELDS if (name in table) == (name in own)]


def test_the_table_and_the_settings_are_in_step() -> None:
    assert mismatch(rows(), ours()) == []
    assert ours() <= FIELDS.keys()


def test_each_absent_flag_ends_in_one_line_of_its_own() -> None:
    assert {name for name, (_, here, _) in rows().items() if here == "absent"} == ELSEWHERE.keys()
    for name, (why, instead) in ELSEWHERE.items():
        for spelled in (f"--{name}", f"--{name.replace('_', '-')}=1"):
            with pytest.raises(UserError) as caught:
                parse([spelled, "1"])
            assert str(caught.value) == f"{spelled.removesuffix('=1')} is given; {why}; {instead}"
        assert set(re.findall(r"--(\w+)", instead)) <= FIELDS.keys()
    with pytest.raises(UserError, match="unknown argument --dream"):
        parse(["--dream", "1"])


@pytest.mark.parametrize("flag", ["snr_gamma", "local_rank", "lora_dropout"])
def test_a_table_that_lacks_a_flag_or_says_something_wrong_of_it_is_noticed(flag: str) -> None:
    table, own = rows(), ours()
    own.discard(flag)
    if flag in table:
        script, here, text = table[flag]
        table[flag] = (script, "absent" if here == "better" else "same", text)
    assert [m for m in mismatch(table, own) if m.startswith(f"{flag}:")]


def test_each_defect_of_the_scripts_has_a_test_that_exists() -> None:
    section = PAGE.partition("## Defects of the scripts")[2]
    named = re.findall(r"^\| [^|]+ \| `(test_\w+)` \|$", section, re.M)
    assert len(named) == section.count("\n| ") - 1, "each row names one"
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}  # fmt: skip
    assert set(named) <= there
