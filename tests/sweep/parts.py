"""Tiny components by the name of their class, for pipelines that name the class in their signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from transformers import CLIPTextModelWithProjection

import tiny_models as models

PARTS: dict[str, Callable[[], Any]] = {
    "CLIPTextModel": models.clip_text_encoder,
    "CLIPTextModelWithProjection": lambda: models.clip_text_encoder(CLIPTextModelWithProjection),
    "CLIPTokenizer": models.clip_tokenizer,
    "T5EncoderModel": models.t5_text_encoder,
    "T5Tokenizer": models.t5_tokenizer,
    "T5TokenizerFast": models.t5_tokenizer,
    "AutoencoderKL": lambda: models.vae(4),
    "UNet2DConditionModel": lambda: models.unet(16, in_channels=4, sample_size=8),
    "KarrasDiffusionSchedulers": lambda: diffusers.PNDMScheduler(
        skip_prk_steps=True, set_alpha_to_one=False, **models.SD_BETAS
    ),
    "FlowMatchEulerDiscreteScheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "StableDiffusionSafetyChecker": lambda: None,
    "CLIPImageProcessor": lambda: None,
    "CLIPImageProcessorPil": lambda: None,
}
