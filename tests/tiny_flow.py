"""Random pipelines of today's transformers at toy width: diffusers' and transformers' own classes, real tokenizers, no network."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from ambient_sd.assets.tiny import SIZE, tiny_tokenizer

_LETTERS = [chr(c) for c in range(33, 127)]


def tiny_t5_tokenizer(length: int = 512) -> T5TokenizerFast:
    """A T5 tokenizer whose words are letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -1.0), *((letter, -2.0) for letter in _LETTERS)]
    inner = Tokenizer(Unigram(pieces, unk_id=2))
    inner.pre_tokenizer = Metaspace()
    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0, model_max_length=length
    )  # fmt: skip


def tiny_t5(width: int) -> T5EncoderModel:
    """A T5 encoder of a width, for that tokenizer."""
    return T5EncoderModel(
        T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    ).eval()  # fmt: skip


def tiny_clip(width: int, projection: int | None, tokenizer: Any) -> Any:
    """A CLIP text encoder, with a projection or without, for a tiny tokenizer."""
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, projection_dim=projection or width, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip


def tiny_vae(channels: int = 16, **options: Any) -> AutoencoderKL:
    """An AutoencoderKL that halves the sides, with a scale and a shift."""
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=SIZE, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **{"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False, **options},
    ).eval()  # fmt: skip


def tiny_sd3_pipeline(seed: int = 0, *, t5: bool = True, dual: bool = True) -> StableDiffusion3Pipeline:
    """A random Stable Diffusion 3.5 (`dual` attention and query norms) or 3, with or without T5."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=12 + 20, out_channels=16, pos_embed_max_size=24,
        dual_attention_layers=(0,) if dual else (), qk_norm="rms_norm" if dual else None,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(),
        text_encoder=tiny_clip(16, 12, tokenizer), tokenizer=tokenizer, text_encoder_2=tiny_clip(24, 20, tokenizer_2),
        tokenizer_2=tokenizer_2, text_encoder_3=tiny_t5(48) if t5 else None, tokenizer_3=tiny_t5_tokenizer() if t5 else None,
    )  # fmt: skip


def tiny_flux_pipeline(seed: int = 0, *, dev: bool = True) -> FluxPipeline:
    """A random FLUX.1: dev takes the guidance scale and shifts by resolution, schnell neither."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=dev,
    )  # fmt: skip
    shift = (
        {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0} if dev else {"shift": 1.0}
    )
    return FluxPipeline(
        transformer=woken(transformer), scheduler=FlowMatchEulerDiscreteScheduler(**shift), vae=tiny_vae(),
        text_encoder=tiny_clip(16, None, tokenizer), tokenizer=tokenizer, text_encoder_2=tiny_t5(24), tokenizer_2=tiny_t5_tokenizer(),
    )  # fmt: skip


# As Qwen3's: what is asked, the answer's head, and an empty thought where none is wanted.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tiny_qwen_tokenizer() -> Qwen2TokenizerFast:
    """A Qwen tokenizer whose words are bytes, with its chat."""
    letters = sorted(ByteLevel.alphabet())
    inner = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), Bytes()
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=inner, vocab=inner.get_vocab(), merges=[], unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=4096,
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_qwen3(width: int, layers: int) -> Qwen3ForCausalLM:
    """A Qwen3 of a width, for that tokenizer."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=264, hidden_size=width, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def tiny_klein_pipeline(seed: int = 0, *, distilled: bool = False) -> Flux2KleinPipeline:
    """A random FLUX.2 klein."""
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 8, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=16, sample_size=SIZE, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        transformer=woken(transformer), scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=vae,
        text_encoder=tiny_qwen3(8, 28), tokenizer=tiny_qwen_tokenizer(), is_distilled=distilled,
    )  # fmt: skip


def tiny_chroma_pipeline(seed: int = 0) -> ChromaPipeline:
    """A random Chroma."""
    torch.manual_seed(seed)
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    return ChromaPipeline(
        transformer=woken(transformer), scheduler=FlowMatchEulerDiscreteScheduler(**shift), vae=tiny_vae(), text_encoder=tiny_t5(24),
        tokenizer=tiny_t5_tokenizer(),
    )  # fmt: skip


def woken(network: torch.nn.Module) -> Any:
    """A fresh transformer with an effect of text and time that can be seen: its first weights are tiny, its gates shut."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return network.eval()
