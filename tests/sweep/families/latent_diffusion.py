"""Latent Diffusion and DiT."""

from __future__ import annotations

import diffusers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

import tiny_models as models
from sweep.build import Case


def dit() -> diffusers.DiTTransformer2DModel:
    """Its thousandth class means no class."""
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )


def bert() -> LDMBertModel:
    return LDMBertModel(
        LDMBertConfig(
            vocab_size=len(models.clip_tokenizer()),
            d_model=16,
            encoder_layers=1,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            head_dim=8,
        )
    )


CASES = [
    Case(
        "DiTPipeline",
        {"transformer": dit, "scheduler": lambda: diffusers.DDIMScheduler()},
        {"class_labels": [3], "output_type": "pt"},
    ),
    Case(
        "LDMTextToImagePipeline",
        {
            "vqvae": lambda: models.vae(4),
            "bert": bert,
            "tokenizer": lambda: models.clip_tokenizer(),
            "scheduler": lambda: diffusers.DDIMScheduler(**models.SD_BETAS),
        },
    ),
]
