"""HiDream-I1."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_models as models
from sweep.build import Case
from sweep.families.language_models import WIDTH, decoder

TOKENIZER = models.t5_tokenizer()


def transformer() -> Any:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[models.t5_text_encoder().config.d_model, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0, 2),
    )


def shrink(pipe: Any) -> None:
    pipe.default_sample_size = 8


PARTS = {
    "transformer": transformer,
    "text_encoder_4": lambda: LlamaForCausalLM(decoder(LlamaConfig, TOKENIZER, layers=3)),
    "tokenizer_4": TOKENIZER,
}

# A mixture of experts: where two are as good, the last bit of a batched product decides between them.
CASES = [Case("HiDreamImagePipeline", PARTS, {"max_sequence_length": 16}, prepare=shrink, tolerance=0.5)]
