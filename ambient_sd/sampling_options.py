"""The options of sampling that every command which samples has: `ambient_sd.sampling.SamplingConfig` adds what it does with them.

They stand in a module of their own because a command line is built from them, and `--help` must not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import REQUIRED, check, check_modes, option

SCHEDULERS = {
    "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
}  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")
MOST_IMAGES = 1009  # of a prompt: seeds of more would collide (`ambient_sd.sampling.image_seed`)


@dataclass(frozen=True)
class SamplingOptions:
    """Say with which model and how images are sampled.

    With a `guidance_scale` of 1 or less there is no guidance, and the guard, which measures guidance, measures nothing. `seed` gives, with
    the place of an image, the image's own seed. `batch_size` changes rounding and nothing else.

    Raises:
        UserError: a value breaks its rule.

    Example:
        >>> SamplingOptions("my-model", guidance_scale=4).guidance_scale
        4.0
    """

    # fmt: off
    model: str = option(REQUIRED, "pipeline folder, whole model in one .safetensors file, or hub id; or a LoRA that names its base: folder, file or hub id", positional=True, metavar="MODEL")
    lora_weights: str | None = option(None, "LoRA on the model: folder, .safetensors file, hub id, or a file on the hub (owner/name/file.safetensors)", alias="adapter", metavar="LORA")
    scheduler: str | None = option(None, "sampler (default: the model's; models of flow matching have no other)", choices=tuple(SCHEDULERS))
    num_inference_steps: int = option(50, "steps of the sampler", low=1)
    guidance_scale: float | None = option(None, "classifier-free guidance (of FLUX.1 and Qwen-Image the true one, true_cfg_scale); 1 or less is none, and then there are no scores (default: 7.5 of Stable Diffusion 1, 2 and XL, of transformers that of their pipeline)", low=0)
    resolution: int | None = option(None, "side of the images in pixels (default: the model's)", low=8, multiple=8)
    seed: int = option(0, "seed: start noise")
    dtype: str | None = option(None, "precision of the weights (default: bfloat16 on a GPU that has it, float32 elsewhere)", choices=DTYPES)
    device: str | None = option(None, "torch device (default: a GPU if there is one)")
    batch_size: int = option(4, "images that go through the network together", low=1)
    revision: str | None = option(None, "revision of the hub repository: branch, tag or commit")
    variant: str | None = option(None, "variant of the weight files, e.g. fp16")
    single_file_config: str | None = option(None, "of a model in one .safetensors file: diffusers folder or hub id with its settings and tokenizer (default: those of the first model of its architecture)", metavar="MODEL")
    pretrained_vae_model_name_or_path: str | None = option(None, "another VAE in place of the model's own: folder with config.json, or hub id (default: that of a LoRA's training)", metavar="VAE")
    base_above: float | None = option(None, "noise level (sigma / alpha) above which the base stands in for the fine-tuned network: fewer copies, nothing to train; try 1.6", low=0, metavar="LEVEL")
    base: str | None = option(None, "the base of --base_above (default: MODEL without its LoRA), or of a LoRA that is given as MODEL", metavar="MODEL")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)
        check_modes(self)
        # What holds no index here may be a LoRA, also one on the hub; `ambient_sd.sampling.adapted` looks.
        if Path(self.model, "model_index.json").exists():
            self.check_base()

    def check_base(self) -> None:
        """Refuse, of a model that is no LoRA, a base without effect and a level without a base."""
        if self.base is not None and self.base_above is None:
            raise UserError("base is given", rule="it has no effect here: base_above is off, and MODEL is no LoRA",
                            remedy="add --base_above, or leave it out")  # fmt: skip
        if self.base_above is not None and self.base is None and self.lora_weights is None:
            raise UserError(
                "base_above without a base", rule="a model without LoRA holds none", remedy="give --base MODEL"
            )
