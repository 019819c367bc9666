"""Flux 2 Klein."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import Qwen3Config, Qwen3ForCausalLM

import tiny_models as models
from sweep.build import Case
from sweep.families.from_tiny import LENGTH, chat_tokenizer
from tiny import picture


def text_encoder() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(models.qwen_tokenizer()),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def transformer() -> diffusers.Flux2Transformer2DModel:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * 16,  # of two layers of the encoder
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def vae() -> diffusers.AutoencoderKLFlux2:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def image() -> Any:
    return picture(0, 64, 64)  # no smaller one is allowed


KLEIN = {
    "transformer": transformer,
    "vae": vae,
    "text_encoder": text_encoder,
    "tokenizer": chat_tokenizer,
    "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
}
CALL = {**LENGTH, "text_encoder_out_layers": (1, 2)}

CASES = [
    Case("Flux2KleinPipeline", KLEIN, {**CALL, "image": image}),
    Case(
        "Flux2KleinInpaintPipeline",
        KLEIN,
        {
            **CALL,
            "image": lambda: picture(0, 16, 16),
            "image_reference": lambda: picture(2, 16, 16),
            "mask_image": lambda: picture(1, 16, 16).convert("L"),
            "strength": 1.0,
        },
    ),
]
