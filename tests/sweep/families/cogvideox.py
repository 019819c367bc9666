"""CogVideoX and ConsisID."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

from sweep.build import Case
from sweep.families.video_parts import TEXT_LENGTH, frames
from tiny import picture

DENOISER = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "num_layers": 1,
    "max_text_seq_length": 16,
    "use_rotary_positional_embeddings": True,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
}

CALL = {**TEXT_LENGTH, "height": 32, "width": 32}


def image() -> Any:
    return picture(0, 32, 32)


def transformer(in_channels: int) -> Any:
    return diffusers.CogVideoXTransformer3DModel(in_channels=in_channels, **DENOISER)


def vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=32,
        sample_width=32,
    )


def parts(in_channels: int, scheduler: type = diffusers.CogVideoXDPMScheduler) -> dict[str, Any]:
    return {
        "transformer": lambda: transformer(in_channels),
        "vae": vae,
        "scheduler": lambda: scheduler(rescale_betas_zero_snr=True, snr_shift_scale=3.0),
    }


class ConsisIDCase(Case):
    """diffusers leaves a dummy in the class's place where OpenCV is missing, which it only needs to draw faces."""

    @property
    def cls(self) -> Any:
        return ConsisIDPipeline


def consisid_transformer() -> Any:
    return diffusers.ConsisIDTransformer3DModel(
        in_channels=8,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=1,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=1,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=32,
        LFE_ff_mult=1,
        **DENOISER,
    )


def face(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


CASES = [
    Case("CogVideoXPipeline", parts(4, diffusers.CogVideoXDDIMScheduler), CALL),
    Case("CogVideoXImageToVideoPipeline", parts(8), {**CALL, "image": image}),
    Case("CogVideoXVideoToVideoPipeline", parts(4), {**CALL, "video": lambda: frames(5, 32), "strength": 1.0}),
    Case(
        "CogVideoXFunControlPipeline",
        parts(8, diffusers.CogVideoXDDIMScheduler),
        {**CALL, "control_video": lambda: frames(5, 32)},
    ),
    ConsisIDCase(
        "ConsisIDPipeline",
        {**parts(8), "transformer": consisid_transformer},
        {
            **CALL,
            "image": image,
            "id_vit_hidden": lambda: [face(1, 2, 8) for _ in range(5)],
            "id_cond": lambda: face(1, 8),
        },
    ),
]
