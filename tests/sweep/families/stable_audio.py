"""Stable Audio Open."""

from __future__ import annotations

import diffusers
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

from sweep.build import Case
from sweep.families.language_models import t5_tokenizer

PARTS = {
    "transformer": lambda: diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=8,
        cross_attention_input_dim=8,
        global_states_input_dim=16,
        time_proj_dim=8,
    ),
    "vae": lambda: diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=4,
    ),
    "projection_model": lambda: StableAudioProjectionModel(32, conditioning_dim=8, min_value=0, max_value=32),
    "tokenizer": lambda: t5_tokenizer(16),
    "scheduler": lambda: diffusers.EDMDPMSolverMultistepScheduler(
        prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    ),
}

CASES = [Case("StableAudioPipeline", PARTS)]
