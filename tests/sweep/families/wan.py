"""Wan, and what is built on it: Lucy Edit, ChronoEdit, SkyReels 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

import tiny_models as models
from sweep.build import Case, image
from sweep.families.from_tiny import LENGTH, parts_of
from tiny import picture


def transformer(cls: Any = diffusers.WanTransformer3DModel, **config: Any) -> Callable[[], Any]:
    base = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return lambda: cls(**base | config)


def image_encoder(cls: Any = CLIPVisionModel) -> Any:
    return cls(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            projection_dim=16,
            num_hidden_layers=2,  # the last but one is used
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    )


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def video(frames: int = 5, size: int = 16) -> list[Any]:
    return [picture(frame, size, size) for frame in range(frames)]


WAN = parts_of(models.wan, "transformer", "scheduler", "vae", "text_encoder", "tokenizer")
TWO = {**WAN, "transformer_2": WAN["transformer"], "boundary_ratio": 0.9}
CONDITION = {"in_channels": 16 + 16 + 4, "image_dim": 16}
WITH_PICTURE = {
    **WAN,
    "transformer": transformer(**CONDITION),
    "image_encoder": image_encoder,
    "image_processor": image_processor,
}
CHRONO = {**WITH_PICTURE, "transformer": transformer(diffusers.ChronoEditTransformer3DModel, **CONDITION)}
VACE = transformer(diffusers.WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=96)
ANIMATE = transformer(
    diffusers.WanAnimateTransformer3DModel,
    latent_channels=16,
    motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=8,
    face_encoder_hidden_dim=16,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=2,
    motion_encoder_batch_size=2,
    **CONDITION,
)
SKYREELS = {**WAN, "transformer": transformer(diffusers.SkyReelsV2Transformer3DModel)}
SKYREELS_PICTURE = {
    **WITH_PICTURE,
    "transformer": transformer(diffusers.SkyReelsV2Transformer3DModel, **CONDITION),
    "image_encoder": lambda: image_encoder(CLIPVisionModelWithProjection),
}
FORCING = {**LENGTH, "num_frames": 9, "base_num_frames": 9}

CASES = [
    Case("WanPipeline", TWO, LENGTH),
    Case("WanImageToVideoPipeline", WITH_PICTURE, {**LENGTH, "image": image}),
    Case("WanVideoToVideoPipeline", WAN, {**LENGTH, "video": video, "strength": 1.0}),
    Case(
        "WanVACEPipeline",
        {**WAN, "transformer": VACE, "transformer_2": VACE, "boundary_ratio": 0.9},
        {**LENGTH, "video": video, "mask": lambda: [frame.convert("L") for frame in video()]},
    ),
    Case(
        "LucyEditPipeline",
        {**WAN, "transformer": transformer(in_channels=32), "expand_timesteps": True},
        {**LENGTH, "video": video},
    ),
    Case("ChronoEditPipeline", CHRONO, {**LENGTH, "image": image}),
    Case(
        "WanAnimatePipeline",
        {**WITH_PICTURE, "transformer": ANIMATE},
        {**LENGTH, "image": image, "pose_video": video, "face_video": video, "segment_frame_length": 5},
    ),
    Case("SkyReelsV2Pipeline", SKYREELS, LENGTH),
    Case("SkyReelsV2ImageToVideoPipeline", SKYREELS_PICTURE, {**LENGTH, "image": image}),
    Case("SkyReelsV2DiffusionForcingPipeline", SKYREELS, {**FORCING, "ar_step": 2, "causal_block_size": 1}),
    Case("SkyReelsV2DiffusionForcingImageToVideoPipeline", SKYREELS, {**FORCING, "image": image}),
    Case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        SKYREELS,
        {**FORCING, "video": video, "num_frames": 13, "overlap_history": 5},
    ),
]
