"""Bria 3.2 and FIBO."""

from __future__ import annotations

import json
from typing import Any

import diffusers
from transformers import SmolLM3Config, SmolLM3ForCausalLM

import tiny_models as models
from sweep.build import Case, image
from sweep.families.language_models import QWEN3_VL, WIDTH, decoder, flux2_vae, wan_vae

FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 6, 6],
}


BRIA = {"transformer": lambda: diffusers.BriaTransformer2DModel(**FLUX)}
FIBO = {
    "transformer": lambda: diffusers.BriaFiboTransformer2DModel(text_encoder_dim=WIDTH, **FLUX),
    "vae": wan_vae,
    "text_encoder": lambda: SmolLM3ForCausalLM(decoder(SmolLM3Config, models.qwen_tokenizer())),
    "tokenizer": models.qwen_tokenizer(),
}
FIBO2 = QWEN3_VL | {
    "transformer": lambda: diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * WIDTH,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=64,
        axes_dims=(4, 6, 6),
        axes_lens=(256, 32, 32),
    ),
    "vae": flux2_vae,
}
EDIT = json.dumps({"edit_instruction": models.PROMPTS[0]})
SIZE = {"height": 64, "width": 64}


def few_layers(pipe: Any) -> None:
    """It stacks hidden states of 35 layers."""
    pipe.text_encoder_out_layers = ((0, 1, 2), (0, 1, 2))


CASES = [
    Case("BriaPipeline", BRIA, {"max_sequence_length": 16}),
    Case("BriaFiboPipeline", FIBO, SIZE),
    Case("BriaFiboEditPipeline", FIBO, SIZE | {"image": image, "prompt": EDIT}),
    Case("BriaFibo2Pipeline", FIBO2, prepare=few_layers),
]
