"""Latents of diffusers' AutoencoderKL, which most families share.

x0 = (mean + std * draw - shift) * scale        shift 0 where the VAE names none; without std * draw where the family draws nothing
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.family import Family
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model


class KLFamily(Family):
    """Describe what families with an AutoencoderKL have in common.

    Attributes:
        vae_needs: settings of the VAE that are computed with.

    Example:
        >>> KLFamily().latent_shape({"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}, (512, 768))
        (16, 96, 64)
    """

    vae_needs: tuple[str, ...] = ("latent_channels", "block_out_channels")

    def check_parts(
        self, model: Model, network: Mapping[str, Any], vae: Mapping[str, Any], keys: tuple[str, ...]
    ) -> None:
        """Check that network (by `keys`) and VAE say what is computed from their settings.

        Raises:
            UserError: a setting is missing or damaged.
        """
        for part, settings, names in (
            (self.network, network, keys), ("vae", vae, self.vae_needs),
        ):  # fmt: skip
            if absent := [key for key in names if key not in settings]:
                raise _damaged(model, part, f"no {absent[0]!r}", "the file is damaged or cut short")
            if wrong := [k for k in names if k in _COUNTS and not _counts(k, settings[k])]:
                raise _damaged(model, part, f"{wrong[0]} = {settings[wrong[0]]!r}", "the file is damaged")
        scale = vae.get("scaling_factor", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise _damaged(model, "vae", f"scaling_factor = {scale!r}", "latents are multiplied by it")

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        return int(2 ** (len(vae["block_out_channels"]) - 1))

    def latent_shape(self, vae: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, ...]:
        factor = self.vae_factor(vae)
        return int(vae["latent_channels"]), size[1] // factor, size[0] // factor

    def encode(self, vae: Any, pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(send(pixels.to(vae.dtype), vae.device)).latent_dist
        z: torch.Tensor = posterior.mean.float()
        if self.draws:
            z = z + posterior.std.float() * send(draw, vae.device)
        return ((z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).cpu()

    def decode(self, vae: Any, x0: torch.Tensor) -> torch.Tensor:
        z = send(x0.to(vae.dtype), vae.device) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels: torch.Tensor = vae.decode(z, return_dict=False)[0]
        return pixels


_LISTS = ("block_out_channels", "encoder_block_out_channels", "all_patch_size")
_COUNTS = (
    *_LISTS, "in_channels", "latent_channels", "patch_size", "sample_size", "joint_attention_dim", "cap_feat_dim", "caption_channels",
    "z_dim",
)  # fmt: skip


def _damaged(model: Model, part: str, what: str, rule: str) -> UserError:
    return UserError(f"{part}/config.json of {model.name} has {what}", rule=rule, remedy="fetch the base anew")


def _counts(key: str, value: Any) -> bool:
    """Tell whether `in_channels` and the like is a whole number above 0, and `block_out_channels` and the like a list of them."""
    if key in _LISTS:
        return isinstance(value, list) and bool(value) and all(type(v) is int and v > 0 for v in value)
    return type(value) is int and value > 0
