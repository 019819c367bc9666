"""ACE-Step 1.5."""

from __future__ import annotations

import diffusers
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from transformers import Qwen3Config, Qwen3Model

import tiny_models as models
from sweep.build import Case
from sweep.families.language_models import WIDTH, decoder

LATENT_CHANNELS = 4
TOKENIZER = models.qwen_tokenizer()
ATTENTION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 8,
}

PARTS = {
    "transformer": lambda: diffusers.AceStepTransformer1DModel(
        in_channels=3 * LATENT_CHANNELS,
        audio_acoustic_hidden_dim=LATENT_CHANNELS,
        num_hidden_layers=2,
        **ATTENTION,
    ),
    "condition_encoder": lambda: AceStepConditionEncoder(
        text_hidden_dim=WIDTH,
        timbre_hidden_dim=LATENT_CHANNELS,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **ATTENTION,
    ),
    "vae": lambda: diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=LATENT_CHANNELS,
        sampling_rate=4,
    ),
    "text_encoder": lambda: Qwen3Model(decoder(Qwen3Config, TOKENIZER)),
    "tokenizer": TOKENIZER,
    "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
}

CASES = [Case("AceStepPipeline", PARTS, {"audio_duration": 8.0})]
