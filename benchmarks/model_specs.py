"""Published configurations of the models that are measured, and tiny ones of the same shape.

Each `Spec` names the checkpoint whose config.json files it repeats; what is left out is the class's default in
diffusers, which the checkpoint has too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder: its class in transformers, published and tiny configurations, and what its tokenizer needs."""

    model: str
    real: dict[str, Any]
    tiny: dict[str, Any]
    pad_token: str
    max_length: int

    def config(self, scale: str) -> dict[str, Any]:
        return self.real if scale == "real" else self.tiny


@dataclass(frozen=True)
class Spec:
    """One model: classes, published and tiny configurations, and what its call needs for guidance to be on."""

    checkpoint: str  # whose configuration this is
    pipeline: str
    denoiser: str
    denoiser_real: dict[str, Any]
    denoiser_tiny: dict[str, Any]
    vae: str
    vae_real: dict[str, Any]
    vae_tiny: dict[str, Any]
    scheduler: str
    scheduler_config: dict[str, Any]
    guidance: dict[str, float]
    text_encoders: tuple[TextEncoder, ...] = ()  # text_encoder, text_encoder_2, ...; Qwen-Image's is described below
    size: int = 1024
    tiny_size: int = 64
    steps: int = 50
    vae_dtype: torch.dtype | None = None  # where the published usage differs from the pipeline's dtype
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def denoiser_attribute(self) -> str:
        return "unet" if self.denoiser.startswith("UNet") else "transformer"


# CLIP ViT-L/14 as published with SD 1.5, SDXL, SD 3.5 and FLUX.1, and OpenCLIP bigG. All have `eos_token_id` 2, with
# which the pooled output is that of the highest id: <|endoftext|>.
_CLIP: dict[str, Any] = {"max_position_embeddings": 77, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_CLIP_L: dict[str, Any] = _CLIP | {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_G: dict[str, Any] = _CLIP | {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_CLIP_TINY: dict[str, Any] = _CLIP | {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
CLIP_L = TextEncoder("CLIPTextModel", _CLIP_L, _CLIP_TINY, pad_token="<|endoftext|>", max_length=77)
CLIP_L_PROJECTED = replace(CLIP_L, model="CLIPTextModelWithProjection")
CLIP_G = TextEncoder("CLIPTextModelWithProjection", _CLIP_G, _CLIP_TINY, pad_token="!", max_length=77)

# The encoder of T5 v1.1 XXL; UMT5 XXL has a larger vocabulary, and relative positions in every layer.
_T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_T5_TINY: dict[str, Any] = _T5_XXL | {
    "vocab_size": 256,
    "d_model": 64,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
T5_XXL = TextEncoder("T5EncoderModel", _T5_XXL, _T5_TINY, pad_token="<pad>", max_length=512)
UMT5_XXL = replace(T5_XXL, model="UMT5EncoderModel", real=_T5_XXL | {"vocab_size": 256384})

# The four-level image VAE of SD 1.5, SDXL, SD 3.5 and FLUX.1; they differ in latent channels and scaling.
_KL_REAL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
_KL_TINY: dict[str, Any] = _KL_REAL | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
_KL_16: dict[str, Any] = {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 1024,
}
_SD3_LATENTS: dict[str, Any] = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
_FLUX_LATENTS: dict[str, Any] = {"scaling_factor": 0.3611, "shift_factor": 0.1159}

_CAUSAL_VAE_TINY: dict[str, Any] = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 0}

_SD_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}

_QWEN: dict[str, Any] = {
    "denoiser": "QwenImageTransformer2DModel",
    "denoiser_real": {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
    "denoiser_tiny": {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    "vae": "AutoencoderKLQwenImage",
    "vae_real": {},
    "vae_tiny": _CAUSAL_VAE_TINY,
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "scheduler_config": {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
    },
    "guidance": {"true_cfg_scale": 4.0},
}

_WAN: dict[str, Any] = {
    "pipeline": "WanPipeline",
    "denoiser": "WanTransformer3DModel",
    "denoiser_tiny": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 64,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    },
    "vae": "AutoencoderKLWan",
    "vae_real": {},
    "vae_tiny": _CAUSAL_VAE_TINY,
    "vae_dtype": torch.float32,
    "scheduler": "UniPCMultistepScheduler",
    "scheduler_config": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    "guidance": {"guidance_scale": 5.0},
    "text_encoders": (UMT5_XXL,),
    "size": 480,
}

SPECS: dict[str, Spec] = {
    "qwen-image": Spec(checkpoint="Qwen/Qwen-Image", pipeline="QwenImagePipeline", **_QWEN),
    "qwen-image-edit": Spec(checkpoint="Qwen/Qwen-Image-Edit", pipeline="QwenImageEditPipeline", **_QWEN),
    "sd15": Spec(
        checkpoint="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline="StableDiffusionPipeline",
        denoiser="UNet2DConditionModel",
        denoiser_real={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        denoiser_tiny={
            "sample_size": 64,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
        },
        vae="AutoencoderKL",
        vae_real=_KL_REAL | {"sample_size": 512},
        vae_tiny=_KL_TINY,
        scheduler="PNDMScheduler",
        scheduler_config=_SD_BETAS | {"skip_prk_steps": True, "set_alpha_to_one": False},
        guidance={"guidance_scale": 7.5},
        text_encoders=(CLIP_L,),
        size=512,
        pipeline_kwargs={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "sdxl": Spec(
        checkpoint="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline="StableDiffusionXLPipeline",
        denoiser="UNet2DConditionModel",
        denoiser_real={
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        denoiser_tiny={
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "cross_attention_dim": 64,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
            "use_linear_projection": True,
        },
        vae="AutoencoderKL",
        vae_real=_KL_REAL | {"sample_size": 1024, "scaling_factor": 0.13025},
        vae_tiny=_KL_TINY,
        scheduler="EulerDiscreteScheduler",
        scheduler_config=_SD_BETAS | {"timestep_spacing": "leading"},
        guidance={"guidance_scale": 5.0},
        text_encoders=(CLIP_L, CLIP_G),
        pipeline_kwargs={"add_watermarker": False},
    ),
    "sd35-large": Spec(
        checkpoint="stabilityai/stable-diffusion-3.5-large",
        pipeline="StableDiffusion3Pipeline",
        denoiser="SD3Transformer2DModel",
        denoiser_real={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 38,
            "attention_head_dim": 64,
            "num_attention_heads": 38,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        denoiser_tiny={
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 64,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
        vae="AutoencoderKL",
        vae_real=_KL_REAL | _KL_16 | _SD3_LATENTS,
        vae_tiny=_KL_TINY | _KL_16 | _SD3_LATENTS,
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config={"shift": 3.0},
        guidance={"guidance_scale": 3.5},
        text_encoders=(CLIP_L_PROJECTED, CLIP_G, T5_XXL),
        steps=28,
    ),
    "flux1-dev": Spec(
        checkpoint="black-forest-labs/FLUX.1-dev",
        pipeline="FluxPipeline",
        denoiser="FluxTransformer2DModel",
        denoiser_real={
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        denoiser_tiny={
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
        },
        vae="AutoencoderKL",
        vae_real=_KL_REAL | _KL_16 | _FLUX_LATENTS,
        vae_tiny=_KL_TINY | _KL_16 | _FLUX_LATENTS,
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config={
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
        guidance={"true_cfg_scale": 4.0, "guidance_scale": 3.5},
        text_encoders=(CLIP_L, T5_XXL),
        steps=28,
    ),
    "wan21-1.3b": Spec(
        checkpoint="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        denoiser_real={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        **_WAN,
    ),
    "wan21-14b": Spec(
        checkpoint="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        denoiser_real={"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        **_WAN,
    ),
}

# Qwen2.5-VL-7B-Instruct, the text encoder of both Qwen-Image models.
TEXT_REAL: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_window_layers": 28,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION_REAL: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "tokens_per_second": 2,
}
TEXT_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 2064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}
VISION_TINY: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
}
