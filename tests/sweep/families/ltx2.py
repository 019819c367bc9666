"""LTX-2: video with sound."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from sweep.build import Case
from sweep.families.video_parts import byte_tokenizer, frames
from tiny import picture

HIDDEN, LAYERS = 16, 1


def gemma() -> Gemma3ForConditionalGeneration:
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={
                "vocab_size": len(byte_tokenizer()),
                "hidden_size": HIDDEN,
                "intermediate_size": 16,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "pad_token_id": 0,
            },
            vision_config={
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            mm_tokens_per_image=4,
            image_token_index=3,
        )
    )


def connectors() -> LTX2TextConnectors:
    stream = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    return LTX2TextConnectors(
        caption_channels=HIDDEN,
        text_proj_in_factor=LAYERS + 1,
        connector_rope_base_seq_len=32,
        rope_type="split",
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in stream.items()},
    )


def transformer() -> Any:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        vae_scale_factors=(2, 8, 8),
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=HIDDEN,
        rope_type="split",
    )


def vae() -> Any:
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        down_block_types=("LTX2VideoDownBlock3D",),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )


def audio_vae() -> Any:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )


def vocoder() -> LTX2Vocoder:
    return LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
        output_sampling_rate=16000,
    )


def condition() -> LTX2VideoCondition:
    return LTX2VideoCondition(picture(0, 32, 32), crf=0)


def reference() -> list[LTX2ReferenceCondition]:
    return [LTX2ReferenceCondition(frames(5, 32))]


PARTS = {
    "tokenizer": lambda: byte_tokenizer(padding_side="left"),
    "text_encoder": gemma,
    "connectors": connectors,
    "transformer": transformer,
    "vae": vae,
    "audio_vae": audio_vae,
    "vocoder": vocoder,
}
CALL = {
    "height": 32,
    "width": 32,
    "max_sequence_length": 64,
    "spatio_temporal_guidance_blocks": [1],
}
OFF = {
    "guidance_scale": 1.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
}

CASES = [
    Case("LTX2Pipeline", PARTS, CALL, OFF),
    Case("LTX2ImageToVideoPipeline", PARTS, {**CALL, "image": lambda: picture(0, 32, 32), "image_crf": 0}, OFF),
    Case("LTX2ConditionPipeline", PARTS, {**CALL, "conditions": condition}, OFF),
    Case("LTX2InContextPipeline", PARTS, {**CALL, "reference_conditions": reference}, OFF),
    Case(
        "LTX2HDRPipeline",
        PARTS,
        {**CALL, "reference_conditions": reference, "stg_scale": 1.0, "modality_scale": 3.0},
        {name: value for name, value in OFF.items() if not name.startswith("audio")},
    ),
]
