"""LongCat: images, edits of images, audio."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tiny_models as models
from sweep.build import Case, image

LATENT_CHANNELS = 16  # the pipelines know no other
_calculate_dimensions = pipeline_longcat_image_edit.calculate_dimensions


def transformer() -> Any:
    return diffusers.LongCatImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def processor() -> Any:
    return models.ImageOnlyProcessor(Qwen2VLImageProcessorPil(), models.qwen_tokenizer())


def short_prompts(pipe: Any) -> None:
    pipe.tokenizer_max_length = 16


def small_pictures(pipe: Any) -> None:
    """It makes a picture a megapixel."""
    short_prompts(pipe)
    small = functools.partial(lambda target_area, ratio: _calculate_dimensions(32 * 32, ratio))
    pipeline_longcat_image_edit.calculate_dimensions = small


IMAGE = {
    "transformer": transformer,
    "vae": lambda: models.vae(LATENT_CHANNELS, shift_factor=0.1159, scaling_factor=0.3611),
    "text_encoder": models.qwen_text_encoder,
    "tokenizer": models.qwen_tokenizer(),
    "text_processor": processor,
}
AUDIO = {
    "transformer": lambda: diffusers.LongCatAudioDiTTransformer(
        dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=32, latent_dim=8
    ),
    "vae": lambda: diffusers.LongCatAudioDiTVae(
        channels=8, c_mults=[1, 2], strides=[2, 2], latent_dim=8, encoder_latent_dim=16
    ),
    "text_encoder": lambda: models.t5_text_encoder(UMT5EncoderModel, UMT5Config),
    "tokenizer": models.t5_tokenizer(),
}

CASES = [
    Case("LongCatImagePipeline", IMAGE, {"enable_prompt_rewrite": False}, prepare=short_prompts),
    Case("LongCatImageEditPipeline", IMAGE, {"image": image}, prepare=small_pictures),
    Case("LongCatAudioDiTPipeline", AUDIO, {"audio_duration_s": 0.7}),
]
