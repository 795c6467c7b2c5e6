"""FLUX.2 klein: a transformer on batch-normalised patches of 32-channel latents, Qwen3 as its text encoder, trained by flow matching.

conditioning   Qwen3's hidden states after 9, 18 and 27 layers side by side, of the caption as a message of its chat; padding is read too
x0             (z - m) / sqrt(v + eps), z the posterior's mode in patches of 2 x 2, m and v of the VAE's batch norm; nothing is drawn
tokens         one each latent, with the places (0, row, column, 0); those of text (0, 0, 0, place)
timestep       t / 1000
output         the flow eps - x0

The distilled klein samples without guidance in four steps, which training by this loss undoes: the base is trained, and its LoRA serves
both. Not here: images as prompts, the variant with a cache for them (KV), FLUX.2 dev and its Mistral text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.bfl import NAMES
from ambient_sd.families.flow import FlowTransformer
from ambient_sd.families.guidance import Guidance
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model

_LAYERS = (9, 18, 27)  # of Qwen3
_STEPS = 50  # its pipeline's default, by which the shift goes too


class Flux2Klein(FlowTransformer):
    """Describe FLUX.2 klein, 4B and 9B.

    Example:
        >>> KLEIN.latent_shape({"block_out_channels": [128, 256, 512, 512], "latent_channels": 32}, (512, 768))
        (128, 48, 32)
    """

    name = "FLUX.2 klein"
    pipeline = "Flux2KleinPipeline"
    guidance: Mapping[str, Guidance] = {
        "Flux2KleinPipeline": Guidance(
            network="transformer", sample="hidden_states", embeds="encoder_hidden_states", timesteps=1000.0, halves="calls",
            texts={"txt_ids": 1}, tokens=False,
        ),
    }  # fmt: skip
    parts: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "Flux2Transformer2DModel"), "vae": ("diffusers", "AutoencoderKLFlux2"),
        "text_encoder": ("transformers", "Qwen3ForCausalLM"), "tokenizer": ("transformers", "Qwen2TokenizerFast"),
    }  # fmt: skip
    shifted = False
    draws = False
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj")
    originals = NAMES
    text_length = 512
    needs = ("in_channels", "joint_attention_dim")

    def distilled(self, pipe: Any) -> str | None:
        if pipe.config.get("is_distilled"):
            return f"the {type(pipe).__name__} is distilled to a few steps (is_distilled)"
        return None

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        if model.index.get("is_distilled"):
            raise UserError(f"{model.name} is distilled to a few steps (is_distilled)", rule="training by the flow's loss undoes that",
                            remedy="train its base, such as black-forest-labs/FLUX.2-klein-base-4B: the LoRA serves both")  # fmt: skip
        text = model.text_config("text_encoder")
        if network["joint_attention_dim"] != len(_LAYERS) * text.hidden_size or text.num_hidden_layers < max(_LAYERS):
            raise UserError(
                f"the transformer of {model.name} has joint_attention_dim = {network['joint_attention_dim']}",
                rule=f"{len(_LAYERS)} hidden states of a text encoder with {text.num_hidden_layers} layers (at least {max(_LAYERS)}) come to {len(_LAYERS) * text.hidden_size}",
                remedy="give a base whose parts belong together",
            )

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        tokenizer, model = parts["tokenizer"], parts["text_encoder"]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for caption in captions
        ]  # fmt: skip
        found = tokenizer(
            texts, padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
        )
        ids, mask = (send(value, model.device) for value in (found.input_ids, found.attention_mask))
        # Without its head over the whole vocabulary, which nothing reads.
        output = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return {"hidden": torch.cat([output.hidden_states[layer] for layer in _LAYERS], dim=-1).float()}

    def around(self, tokenizer: Any) -> int:
        chat = [{"role": "user", "content": ""}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return len(tokenizer(text).input_ids)

    def shift(self, scheduler: Mapping[str, Any], tokens: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(tokens, _STEPS)

    def patch(self, network: Mapping[str, Any]) -> int:
        return 1

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        return 2 * super().vae_factor(vae)

    def latent_shape(self, vae: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, ...]:
        channels, high, wide = super().latent_shape(vae, size)
        return 4 * channels, high, wide

    def native_side(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        return 64 * self.vae_factor(vae)

    def encode(self, vae: Any, pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        z = vae.encode(send(pixels.to(vae.dtype), vae.device)).latent_dist.mode().float()
        mean, deviation = _norms(vae)
        return ((torch.nn.functional.pixel_unshuffle(z, 2) - mean) / deviation).cpu()

    def decode(self, vae: Any, x0: torch.Tensor) -> torch.Tensor:
        mean, deviation = _norms(vae)
        z = torch.nn.functional.pixel_shuffle(send(x0, vae.device) * deviation + mean, 2)
        pixels: torch.Tensor = vae.decode(z.to(vae.dtype), return_dict=False)[0]
        return pixels

    def usual_targets(self, network: Any) -> list[str]:
        # In the other blocks `to_out` is a list of layers.
        single = range(len(network.single_transformer_blocks))
        return [*self.lora_targets, *(f"single_transformer_blocks.{i}.attn.to_out" for i in single)]

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        (rows, length), (high, wide) = inputs["encoder_hidden_states"].shape[:2], x_t.shape[-2:]
        output = network(
            hidden_states=x_t.flatten(2).transpose(1, 2), timestep=timesteps / 1000, **inputs, return_dict=False,
            txt_ids=_places(rows, x_t.device, 1, 1, length), img_ids=_places(rows, x_t.device, high, wide, 1),
        )[0]  # fmt: skip
        flow: torch.Tensor = output.transpose(1, 2).unflatten(2, (high, wide))
        return flow


def _norms(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the VAE's batch norm, (1, 4 C, 1, 1) float32."""
    mean, variance = (v.float().view(1, -1, 1, 1) for v in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


def _places(rows: int, device: torch.device, *sides: int) -> torch.Tensor:
    """Return the places (0, i, j, k) of a block of tokens in order, (rows, i j k, 4)."""
    places = torch.cartesian_prod(*(torch.arange(side, device=device) for side in (1, *sides)))
    return places.expand(rows, -1, -1)


KLEIN = Flux2Klein()
