"""Lumina-Next and Lumina-Image 2.0."""

from __future__ import annotations

import diffusers
from transformers import Gemma2Config, Gemma2Model, GemmaConfig, GemmaModel

import tiny_models as models
from sweep.build import Case
from sweep.families.language_models import WIDTH, decoder

SIZE = {"height": 64, "width": 64}  # 8 x 8 pixels to a latent, whatever the VAE says
TOKENIZER = models.t5_tokenizer()

LUMINA = {
    "transformer": lambda: diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    ),
    "text_encoder": lambda: GemmaModel(decoder(GemmaConfig, TOKENIZER)),
    "tokenizer": TOKENIZER,
}
LUMINA2 = {
    "transformer": lambda: diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 16, 16),
        cap_feat_dim=WIDTH,
    ),
    "text_encoder": lambda: Gemma2Model(decoder(Gemma2Config, TOKENIZER)),
    "tokenizer": TOKENIZER,
}

CASES = [
    Case("LuminaPipeline", LUMINA, SIZE),
    Case("Lumina2Pipeline", LUMINA2, SIZE),
]
