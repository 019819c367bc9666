"""Stable Audio Open and Stable Audio 3."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from transformers import T5GemmaConfig, T5GemmaEncoderModel

from sweep.build import Case
from sweep.families.language_models import WIDTH, t5_tokenizer

LATENT_CHANNELS = 4
TOKENIZER = t5_tokenizer(16)


def t5_gemma() -> Any:
    sizes = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return T5GemmaEncoderModel(T5GemmaConfig(encoder=sizes, decoder=sizes, is_encoder_decoder=False))


STABLE_AUDIO = {
    "transformer": lambda: diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
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
        decoder_input_channels=LATENT_CHANNELS,
        sampling_rate=4,
    ),
    "projection_model": lambda: StableAudioProjectionModel(32, conditioning_dim=8, min_value=0, max_value=32),
    "tokenizer": TOKENIZER,
    "scheduler": lambda: diffusers.EDMDPMSolverMultistepScheduler(
        prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    ),
}
STABLE_AUDIO_3 = {
    "transformer": lambda: diffusers.StableAudio3DiTModel(
        io_channels=LATENT_CHANNELS,
        embed_dim=32,
        depth=1,
        num_heads=2,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=LATENT_CHANNELS + 1,
        timestep_features_dim=8,
        ff_mult=1.0,
        num_memory_tokens=2,
    ),
    "vae": lambda: diffusers.AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=LATENT_CHANNELS,
        dim_heads=8,
        ff_mult=1,
        sampling_rate=8,
    ),
    "text_encoder": t5_gemma,
    "tokenizer": TOKENIZER,
    "duration_embedder": lambda: StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=8),
}

CASES = [
    Case("StableAudioPipeline", STABLE_AUDIO),
    Case("StableAudio3Pipeline", STABLE_AUDIO_3, {"duration": 8.0}),
]
