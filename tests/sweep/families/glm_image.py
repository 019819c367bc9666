"""GLM-Image, with the tokens that its language model would give."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

import tiny_models as models
from sweep.build import Case

CODEBOOK = 16


def text_encoder() -> Any:
    config = T5Config(vocab_size=len(ByT5Tokenizer()), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def prior_token_ids() -> torch.Tensor:
    return torch.randint(CODEBOOK, (1, 16), generator=torch.Generator().manual_seed(0))


PARTS = {
    "transformer": lambda: diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=CODEBOOK,
    ),
    "vae": lambda: models.vae(4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
    "text_encoder": text_encoder,
    "tokenizer": ByT5Tokenizer(),
    "processor": None,
    "vision_language_encoder": None,
}
CALL = {"prompt": 'a sign that says "red dog"', "prior_token_ids": prior_token_ids}

CASES = [Case("GlmImagePipeline", PARTS, CALL)]
