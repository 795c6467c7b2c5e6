"""Qwen-Image: a double-stream transformer on packed 16-channel latents, Qwen2.5-VL as text encoder, trained by flow matching.

conditioning   Qwen2.5-VL's last hidden state of the caption in a template, without the template's first 34 rows; as many rows as tokens
x0             (mean + std * draw - latents_mean) / latents_std, channel by channel; the VAE is one of videos, of one frame here
timestep       t / 1000
output         the flow eps - x0, in patches of 2 x 2

Its pipeline guides by two calls, with a negative prompt that has to be given. Not here: Edit, ControlNet, Layered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.flow import read_rows
from ambient_sd.families.flux import Packed, pack, unpack
from ambient_sd.families.guidance import Guidance
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model

_OTHERS = {"guidance_embeds": False, "zero_cond_t": False, "use_additional_t_cond": False, "use_layer3d_rope": False}


class QwenImage(Packed):
    """Describe Qwen-Image.

    Example:
        >>> QWEN_IMAGE.latent_shape({"z_dim": 16, "temperal_downsample": [False, True, True]}, (512, 768))
        (16, 96, 64)
    """

    name = "Qwen-Image"
    pipeline = "QwenImagePipeline"
    guidance: Mapping[str, Guidance] = {
        "QwenImagePipeline": Guidance(
            network="transformer", sample="hidden_states", embeds="encoder_hidden_states", timesteps=1000.0, halves="calls",
            scale="true_cfg_scale", normalizes=True, mask=("encoder_hidden_states_mask", 1), tokens=False,
        ),
    }  # fmt: skip
    parts: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "QwenImageTransformer2DModel"), "vae": ("diffusers", "AutoencoderKLQwenImage"),
        "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"), "tokenizer": ("transformers", "AutoTokenizer"),
    }  # fmt: skip
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    vae_needs = ("z_dim", "temperal_downsample", "latents_mean", "latents_std")
    shifted = False
    text_length, text_most = 512, 1024

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        self.check_width(
            model, network, "joint_attention_dim", model.text_config("text_encoder").get_text_config().hidden_size
        )
        for key, plain in _OTHERS.items():
            if network.get(key, plain) != plain:
                raise UserError(f"the transformer of {model.name} has {key} = {network[key]!r}",
                                rule="editing, layered and distilled variants take more than a caption", remedy="give a text-to-image base")  # fmt: skip
        vae = model.vae_settings
        for key in ("latents_mean", "latents_std"):
            good = isinstance(vae[key], list) and len(vae[key]) == vae["z_dim"] and all(_number(v) for v in vae[key])
            if not good or (key == "latents_std" and min(vae[key]) <= 0):
                raise UserError(f"the VAE of {model.name} has {key} = {vae[key]!r}"[:200], rule=f"it holds a number for each of {vae['z_dim']} channels, and a spread is above 0",
                                remedy="fetch the base anew")  # fmt: skip

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        return int(2 ** len(vae["temperal_downsample"]))

    def latent_shape(self, vae: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, ...]:
        factor = self.vae_factor(vae)
        return int(vae["z_dim"]), size[1] // factor, size[0] // factor

    def encode(self, vae: Any, pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(send(pixels.to(vae.dtype), vae.device).unsqueeze(2)).latent_dist
        z = posterior.mean.float() + posterior.std.float() * send(draw, vae.device).unsqueeze(2)
        mean, std = _spread(vae)
        return ((z - mean.to(z.device)) * (1.0 / std).to(z.device)).squeeze(2).cpu()

    def decode(self, vae: Any, x0: torch.Tensor) -> torch.Tensor:
        z = send(x0.to(vae.dtype), vae.device).unsqueeze(2)
        mean, std = (one.to(z) for one in _spread(vae))
        pixels: torch.Tensor = vae.decode(z / (1.0 / std) + mean, return_dict=False)[0].squeeze(2)
        return pixels

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        tokenizer, model, stock = parts["tokenizer"], parts["text_encoder"], _stock()
        texts, skip = [stock.prompt_template_encode.format(c) for c in captions], stock.prompt_template_encode_start_idx
        found = tokenizer(texts, max_length=stock.tokenizer_max_length + skip, padding=True, truncation=True)
        ids, mask = (send(torch.tensor(found[name]), model.device) for name in ("input_ids", "attention_mask"))
        # Of the words that might follow none is asked for.
        states = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
        ).hidden_states
        rows = read_rows(states[-1].float(), found["attention_mask"], skip)
        return {name: value[:, : self.text_length] for name, value in rows.items()}

    def around(self, tokenizer: Any) -> int:
        stock = _stock()  # what stands before the caption is not counted
        return len(tokenizer(stock.prompt_template_encode.format("")).input_ids) - int(
            stock.prompt_template_encode_start_idx
        )

    def inputs(
        self, embeddings: Mapping[str, torch.Tensor], sizes: torch.Tensor | None, device: torch.device | str
    ) -> dict[str, Any]:
        mask = embeddings["mask"]
        # As the pipeline: without a mask where there is nothing to hide, which spares attention one.
        hides = min(mask.sum(1).tolist()) < mask.shape[1]
        return {
            "encoder_hidden_states": send(embeddings["hidden"], device),
            "encoder_hidden_states_mask": send(mask, device) if hides else None,
        }

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        high, wide = (side // 2 for side in x_t.shape[-2:])
        output = network(
            hidden_states=pack(x_t), timestep=timesteps / 1000, img_shapes=[[(1, high, wide)]] * len(x_t), return_dict=False, **inputs
        )[0]  # fmt: skip
        return unpack(output, high)


@functools.cache
def _stock() -> Any:
    """Return the pipeline without parts: it knows its template."""
    import diffusers

    return diffusers.QwenImagePipeline(None, None, None, None, None)  # type: ignore[arg-type]


def _spread(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the VAE's channels, (1, C, 1, 1, 1)."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


QWEN_IMAGE = QwenImage()
