"""PRX, of latents and of pixels."""

from __future__ import annotations

import diffusers
from transformers import T5GemmaConfig, T5GemmaEncoderModel
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from sweep.build import Case
from sweep.families import gemma


def text_encoder() -> T5GemmaEncoder:
    config = T5GemmaConfig(
        encoder=gemma.SIZES, decoder=gemma.SIZES, is_encoder_decoder=False, vocab_size=gemma.SIZES["vocab_size"]
    )
    encoder: T5GemmaEncoder = T5GemmaEncoderModel(config).encoder
    return encoder


def transformer(in_channels: int) -> diffusers.PRXTransformer2DModel:
    return diffusers.PRXTransformer2DModel(
        in_channels=in_channels,
        context_in_dim=16,
        hidden_size=16,
        num_heads=2,
        depth=2,
        mlp_ratio=2.0,
        axes_dim=[4, 4],
    )


PARTS = {"text_encoder": text_encoder, "tokenizer": gemma.tokenizer()}
CALL = {"use_resolution_binning": False}

CASES = [
    Case(
        "PRXPipeline",
        PARTS | {"transformer": lambda: transformer(4)},
        CALL | {"height": 64, "width": 64},  # 8 x 8 pixels to a latent, without a VAE
    ),
    Case("PRXPixelPipeline", PARTS | {"transformer": lambda: transformer(3), "prompt_max_tokens": 40}, CALL),
]
