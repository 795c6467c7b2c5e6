"""The README.md beside trained weights: what they are and how to use them, without a path or name of this machine."""

from __future__ import annotations

from pathlib import Path

from ambient_sd.training.config import TrainConfig


def model_card(
    config: TrainConfig, *, base: str, base_is_hub_id: bool, level: float, pictures: int, steps: int, xl: bool = False
) -> str:
    """Return the text of a model card.

    Args:
        config: the run's settings; no path of it is used.
        base: public name of the base model.
        base_is_hub_id: whether `base` can be loaded from the hub.
        level: nature level s_n of the objective (ambient), or lower edge of the gap.
        pictures: number of training pictures.
        steps: optimizer steps done.
        xl: the base is an SDXL: the guard watches its stock pipeline.
    """
    what = {
        "ambient": f"ambient, nature level {level:.4g}, weight a^{config.reweight}",
        "plain": "plain denoising",
        "gap": f"plain denoising without the noise levels {level:.4g} to {config.gap_upper}",
    }[config.objective]
    kind = f"LoRA, rank {config.rank}, alpha {config.lora_alpha:g}" if config.lora else "full fine-tune of the U-Net"
    head = ["---", "library_name: diffusers", "pipeline_tag: text-to-image"]
    head += [f"base_model: {base}"] if base_is_hub_id else []
    head += ["tags:", "- stable-diffusion", "- ambient-sd"] + (["- lora"] if config.lora else []) + ["---"]
    kind_of_pipe = "StableDiffusionXLPipeline" if xl else "AmbientSDPipeline"
    load = (
        [f'pipe = {kind_of_pipe}.from_pretrained("{base}")', 'pipe.load_lora_weights("THIS_FOLDER")']
        if config.lora
        else [f'pipe = {kind_of_pipe}.from_pretrained("THIS_FOLDER")']
    )
    if xl:
        usage = [
            "from ambient_sd import MemorizationGuard",
            "from diffusers import StableDiffusionXLPipeline",
            "",
            *load,
            "with MemorizationGuard(pipe) as guard:",
            '    image = pipe("a caption").images[0]',
            "print(guard.report[0].score)",
        ]
    else:
        usage = ["from ambient_sd import AmbientSDPipeline", "", *load, 'image = pipe("a caption").images[0]']
    other = config.pretrained_vae_model_name_or_path
    if other is not None and config.lora:
        vae = "another VAE" if Path(other).exists() else other
        kind += f", trained with {vae} in place of the base's VAE: draw with it too"
    body = [
        f"# {base}, fine-tuned on {pictures} pictures",
        "",
        f"{kind[0].upper()}{kind[1:]}. Objective: {what}. {steps} steps at {config.resolution} px.",
        "How much of the training pictures it hands back has not been measured here.",
        "",
        "```python",
        *usage,
        "```",
    ]
    return "\n".join([*head, "", *body, ""])
