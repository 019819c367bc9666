"""Hunyuan-DiT."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import BertConfig, BertModel, BertTokenizer

import tiny_models as models
from sweep.build import Case
from tiny import picture

SIZE = 32
SIZES: dict[str, Any] = {
    "sample_size": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 16,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 32,
    "pooled_projection_dim": 16,
    "use_style_cond_and_image_meta_size": False,
}


def vae() -> diffusers.AutoencoderKL:
    """8 x 8 pixels to a latent: the pipelines count on it."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )


def tokenizer() -> BertTokenizer:
    words = sorted({word for prompt in models.PROMPTS + models.NEGATIVE_PROMPTS for word in prompt.split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=77)


def text_encoder() -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=len(tokenizer()),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=77,
        )
    )


def transformer() -> diffusers.HunyuanDiT2DModel:
    return diffusers.HunyuanDiT2DModel(num_layers=2, **SIZES)


def control_net() -> diffusers.HunyuanDiT2DControlNetModel:
    return diffusers.HunyuanDiT2DControlNetModel(transformer_num_layers=2, **SIZES)


PARTS = {
    "vae": vae,
    "tokenizer": tokenizer,
    "text_encoder": text_encoder,
    "tokenizer_2": models.t5_tokenizer(),
    "text_encoder_2": models.t5_text_encoder,
    "transformer": transformer,
    "scheduler": lambda: diffusers.DDPMScheduler(beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False),
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
CALL = {"height": SIZE, "width": SIZE, "use_resolution_binning": False}

CASES = [
    Case("HunyuanDiTPipeline", PARTS, CALL),
    Case(
        "HunyuanDiTControlNetPipeline",
        PARTS | {"controlnet": control_net},
        CALL | {"control_image": lambda: picture(2, SIZE, SIZE)},
    ),
    Case("HunyuanDiTPAGPipeline", PARTS, CALL),
]
