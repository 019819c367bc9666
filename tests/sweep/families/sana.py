"""Sana: pictures, control nets, perturbed attention."""

from __future__ import annotations

from typing import Any

import diffusers

from sweep.build import Case
from sweep.families import gemma
from tiny import picture

SIZE = 32
SIZES: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 8,
}


def vae() -> diffusers.AutoencoderDC:
    """4 x 4 pixels to a latent."""
    each = ((),) * 3
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(4, 4, 8),
        decoder_block_out_channels=(4, 4, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=each,
        decoder_qkv_multiscales=each,
        scaling_factor=0.41407,
    )


def scheduler() -> diffusers.DPMSolverMultistepScheduler:
    return diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


PARTS = {
    "tokenizer": gemma.tokenizer(),
    "text_encoder": gemma.text_encoder,
    "vae": vae,
    "transformer": lambda: diffusers.SanaTransformer2DModel(num_layers=2, **SIZES),
    "scheduler": scheduler,
}
TEXT = {"max_sequence_length": 40, "complex_human_instruction": []}
CALL = TEXT | {"height": SIZE, "width": SIZE, "use_resolution_binning": False}

CASES = [
    Case("SanaPipeline", PARTS, CALL),
    Case(
        "SanaControlNetPipeline",
        PARTS | {"controlnet": lambda: diffusers.SanaControlNetModel(num_layers=1, **SIZES)},
        CALL | {"control_image": lambda: picture(2, SIZE, SIZE)},
    ),
    Case("SanaPAGPipeline", PARTS, CALL),
]
