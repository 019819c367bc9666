"""Sana: pictures, control nets, perturbed attention, videos."""

from __future__ import annotations

from typing import Any

import diffusers

import tiny_models as models
from sweep.build import Case, image
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


def video_vae() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def video_transformer() -> diffusers.SanaVideoTransformer3DModel:
    return diffusers.SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=4,
        rope_max_seq_len=32,
    )


def world_vae() -> diffusers.AutoencoderKLLTX2Video:
    """2 frames of 2 x 2 pixels to a latent."""
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(True,),
        upsample_factor=(1,),
        patch_size=1,
    )


def world_transformer() -> diffusers.SanaWMTransformer3DModel:
    return diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=2,
        chunk_plucker_channels=12,  # 6 for each of a latent's frames
        caption_channels=16,
    )


PARTS = {
    "tokenizer": gemma.tokenizer(),
    "text_encoder": gemma.text_encoder,
    "vae": vae,
    "transformer": lambda: diffusers.SanaTransformer2DModel(num_layers=2, **SIZES),
    "scheduler": scheduler,
}
VIDEO = {
    "tokenizer": gemma.tokenizer(),
    "text_encoder": gemma.text_encoder,
    "vae": video_vae,
    "transformer": video_transformer,
}
TEXT = {"max_sequence_length": 40, "complex_human_instruction": []}
CALL = TEXT | {"height": SIZE, "width": SIZE, "use_resolution_binning": False}
FRAMES = {"frames": 5}

CASES = [
    Case("SanaPipeline", PARTS, CALL),
    Case(
        "SanaControlNetPipeline",
        PARTS | {"controlnet": lambda: diffusers.SanaControlNetModel(num_layers=1, **SIZES)},
        CALL | {"control_image": lambda: picture(2, SIZE, SIZE)},
    ),
    Case("SanaPAGPipeline", PARTS, CALL),
    Case("SanaVideoPipeline", VIDEO | {"scheduler": scheduler}, CALL | FRAMES),
    Case("SanaImageToVideoPipeline", VIDEO, CALL | FRAMES | {"image": lambda: picture(0, SIZE, SIZE)}),
    Case(
        "SanaWMPipeline",
        VIDEO | {"vae": world_vae, "transformer": world_transformer},
        {
            "image": image,
            "prompt": models.PROMPTS[0],
            "action": "w-2,j-2",
            "intrinsics": [16.0, 16.0, 8.0, 8.0],
            "chi_prompt": models.PROMPTS[1:],
            "max_sequence_length": 40,
        },
    ),
]
