"""Z-Image."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import Qwen3Config, Qwen3Model, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import tiny_models as models
from sweep.build import Case, image
from sweep.families.language_models import WIDTH, chat_tokenizer, decoder
from tiny import picture

SIZES = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def transformer(**config: Any) -> Any:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, n_layers=2, cap_feat_dim=WIDTH, axes_dims=(8, 4, 4), axes_lens=(256, 32, 32), **SIZES, **config
    )


def controlnet(in_channels: int) -> Any:
    return diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=in_channels,
        add_control_noise_refiner="control_noise_refiner",
        **SIZES,
    )


def siglip() -> Any:
    return Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_patches=4,
            patch_size=8,
        )
    )


def halve_vae(pipe: Any) -> None:
    """The pipeline gives it pictures in bfloat16."""
    pipe.vae.to(torch.bfloat16)


PARTS = {
    "transformer": transformer,
    "vae": lambda: models.vae(4, shift_factor=0.1159, scaling_factor=0.3611),
    "text_encoder": lambda: Qwen3Model(decoder(Qwen3Config, models.qwen_tokenizer())),
    "tokenizer": chat_tokenizer,
}
OMNI = PARTS | {
    "transformer": lambda: transformer(siglip_feat_dim=WIDTH),
    "siglip": siglip,
    "siglip_processor": lambda: Siglip2ImageProcessorPil(patch_size=8, max_num_patches=4),
}
CALL = {"max_sequence_length": 32}
CONTROL = CALL | {"control_image": image}
MASK = {"image": image, "mask_image": lambda: picture(1, 16, 16).convert("L")}
PICTURES = {"image": lambda: [picture(0, 64, 64)]}  # smaller ones are refused
OFF = {"guidance_scale": 0.0}

CASES = [
    Case("ZImagePipeline", PARTS, CALL, OFF),
    Case("ZImageImg2ImgPipeline", PARTS, CALL | {"image": image, "strength": 1.0}, OFF),
    Case("ZImageInpaintPipeline", PARTS, CALL | MASK, OFF),
    Case("ZImageControlNetPipeline", PARTS | {"controlnet": lambda: controlnet(4)}, CONTROL, OFF),
    Case("ZImageControlNetInpaintPipeline", PARTS | {"controlnet": lambda: controlnet(9)}, CONTROL | MASK, OFF),
    Case("ZImageOmniPipeline", OMNI, CALL | PICTURES, OFF, prepare=halve_vae),
]
