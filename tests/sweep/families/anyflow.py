"""AnyFlow."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import UMT5Config, UMT5EncoderModel

import tiny_models as models
from sweep.build import Case
from sweep.families.video_parts import TEXT_LENGTH, wan_vae

DENOISER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def parts(transformer: type, **config: Any) -> dict[str, Any]:
    return {
        "tokenizer": lambda: models.t5_tokenizer(),
        "text_encoder": lambda: models.t5_text_encoder(UMT5EncoderModel, UMT5Config),
        "transformer": lambda: transformer(**DENOISER, **config),
        "vae": wan_vae,
        "scheduler": lambda: diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    }


CASES = [
    Case("AnyFlowPipeline", parts(diffusers.AnyFlowTransformer3DModel), TEXT_LENGTH),
    Case(
        "AnyFlowFARPipeline",
        parts(diffusers.AnyFlowFARTransformer3DModel, chunk_partition=(1, 1), full_chunk_limit=2),
        {**TEXT_LENGTH, "height": 32, "width": 32},
    ),
]
