"""Motif-Video, with a guider."""

from __future__ import annotations

import diffusers
from transformers import T5Gemma2EncoderConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

import tiny_models as models
from sweep.build import Case, image
from sweep.families.video_parts import byte_tokenizer, wan_vae


def text_encoder() -> T5Gemma2Encoder:
    return T5Gemma2Encoder(
        T5Gemma2EncoderConfig(
            text_config={
                "vocab_size": len(byte_tokenizer()),
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "dropout_rate": 0.0,
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
        ),
        eoi_token_index=4,
    )


PARTS = {
    "tokenizer": lambda: byte_tokenizer(),
    "text_encoder": text_encoder,
    "transformer": lambda: diffusers.MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=2,
        num_decoder_layers=1,
        text_embed_dim=16,
        image_embed_dim=8,
        rope_axes_dim=(4, 4, 4),
    ),
    "vae": wan_vae,
    "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
}
CALL = {"max_sequence_length": 64}
OFF = {"negative_prompt": models.PROMPTS[0]}  # the scale belongs to the guider

CASES = [
    Case("MotifVideoPipeline", PARTS, CALL, OFF),
    Case(
        "MotifVideoImage2VideoPipeline",
        {**PARTS, "feature_extractor": lambda: SiglipImageProcessorPil(size={"height": 16, "width": 16})},
        {**CALL, "image": image, "prompt": models.PROMPTS[0]},
        OFF,
    ),
]
