"""Random pipelines of Z-Image, Qwen-Image, Lumina-Image 2.0, Sana and AuraFlow at toy width, as `tiny_flow`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_flow import tiny_qwen_tokenizer, tiny_t5_tokenizer, tiny_vae, woken
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer whose words are letters."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*marks, "▁", "\n", *(chr(c) for c in range(33, 127))]
    return GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], add_bos_token=True)


def tiny_gemma(width: int) -> Gemma2Model:
    """A Gemma 2 of a width, for that tokenizer."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tiny_gemma_tokenizer()), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=4096, attn_implementation="eager",
        )
    ).eval()  # fmt: skip


def tiny_z_image_pipeline(seed: int = 0) -> ZImagePipeline:
    """A random Z-Image."""
    torch.manual_seed(seed)
    tokenizer = tiny_qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24, axes_dims=[8, 4, 4],
        axes_lens=[640, 32, 32],
    )  # fmt: skip
    encoder = Qwen3Model(
        Qwen3Config(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=8, max_position_embeddings=1024)
    ).eval()  # fmt: skip
    return ZImagePipeline(
        transformer=woken(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(), text_encoder=encoder,
        tokenizer=tokenizer,
    )  # fmt: skip


def tiny_qwen_image_pipeline(seed: int = 0) -> QwenImagePipeline:
    """A random Qwen-Image."""
    torch.manual_seed(seed)
    tokenizer = tiny_qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[-0.7, 0.1, 0.9, 0.0],
        latents_std=[2.0, 1.5, 0.5, 1.0],
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
                         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
                         "rope_parameters": {"mrope_section": [1, 2, 3], "rope_type": "default", "rope_theta": 1e6}},
            vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24},
        )
    ).eval()  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    return QwenImagePipeline(
        transformer=woken(transformer), scheduler=FlowMatchEulerDiscreteScheduler(**shift), vae=vae.eval(), text_encoder=encoder,
        tokenizer=tokenizer,
    )  # fmt: skip


def tiny_lumina2_pipeline(seed: int = 0) -> Lumina2Pipeline:
    """A random Lumina-Image 2.0; its pipeline counts on 8 pixels a latent."""
    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=16, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=24,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=16, sample_size=32, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=woken(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=vae.eval(), text_encoder=tiny_gemma(24),
        tokenizer=tiny_gemma_tokenizer(),
    )  # fmt: skip


def tiny_sana_pipeline(seed: int = 0, *, euler: bool = False) -> SanaPipeline:
    """A random Sana, with the scheduler that it is published with or Euler's."""
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24, sample_size=16, patch_size=1,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=8, attention_head_dim=4, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip
    flow: Any = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if euler else DPMSolverMultistepScheduler(**flow)
    return SanaPipeline(
        transformer=woken(transformer), scheduler=scheduler, vae=vae.eval(), text_encoder=tiny_gemma(24), tokenizer=tiny_gemma_tokenizer()
    )  # fmt: skip


def tiny_auraflow_pipeline(seed: int = 0) -> AuraFlowPipeline:
    """A random AuraFlow."""
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, out_channels=4, pos_embed_max_size=256,
    )  # fmt: skip
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=128, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    ).eval()  # fmt: skip
    return AuraFlowPipeline(
        transformer=woken(woken(transformer)), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73), text_encoder=woken(encoder),
        vae=tiny_vae(4, shift_factor=None, scaling_factor=0.13025), tokenizer=tiny_t5_tokenizer(),
    )  # fmt: skip
