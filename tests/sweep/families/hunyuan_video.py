"""Hunyuan Video, Framepack, SkyReels 1."""

from __future__ import annotations

from typing import Any

import diffusers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import tiny_models as models
from sweep.build import Case, image
from sweep.families.wan import image_processor

SPECIAL = ["<pad>", "<unk>", "<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for prompt in models.PROMPTS + models.NEGATIVE_PROMPTS for word in prompt.split()})
    known = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="<unk>"))
    known.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": SPECIAL[2:]}
    return PreTrainedTokenizerFast(tokenizer_object=known, **special)


def text_encoder() -> LlamaModel:
    return LlamaModel(LlamaConfig(vocab_size=len(tokenizer()), **LLAMA))


def llava() -> LlavaForConditionalGeneration:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    text = {"model_type": "llama", "vocab_size": len(tokenizer()), **LLAMA}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=SPECIAL.index("<image>"), pad_token_id=0)
    )


def vae() -> diffusers.AutoencoderKLHunyuanVideo:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def transformer(cls: Any = diffusers.HunyuanVideoTransformer3DModel, **config: Any) -> Any:
    base = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    }
    return cls(**base | config)


def siglip() -> SiglipVisionModel:
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
    )


def siglip_processor() -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": 8, "width": 8})


PARTS = {
    "transformer": transformer,
    "vae": vae,
    "text_encoder": text_encoder,
    "tokenizer": tokenizer,
}
CALL = {"max_sequence_length": 16, "prompt_template": {"template": "a photo of {}", "crop_start": 3}}
PICTURE_TEMPLATE = {  # the picture is four tokens
    "template": (
        "<|start_header_id|> system <|end_header_id|> <image> <|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> {} <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|>"
    ),
    "crop_start": 8,
    "image_emb_start": 3,
    "image_emb_end": 7,
    "image_emb_len": 4,
}

CASES = [
    Case("HunyuanVideoPipeline", PARTS, CALL),
    Case(
        "HunyuanSkyreelsImageToVideoPipeline",
        {**PARTS, "transformer": lambda: transformer(in_channels=8)},
        {**CALL, "image": image},
    ),
    Case(
        "HunyuanVideoImageToVideoPipeline",
        {
            **PARTS,
            "transformer": lambda: transformer(image_condition_type="token_replace", guidance_embeds=False),
            "text_encoder": llava,
            "image_processor": image_processor,
        },
        {**CALL, "image": image, "prompt_template": PICTURE_TEMPLATE},
    ),
    Case(
        "HunyuanVideoFramepackPipeline",
        {
            **PARTS,
            "transformer": lambda: transformer(
                diffusers.HunyuanVideoFramepackTransformer3DModel,
                patch_size=2,
                has_image_proj=True,
                image_proj_dim=16,
                has_clean_x_embedder=True,
            ),
            "image_encoder": siglip,
            "feature_extractor": siglip_processor,
        },
        {**CALL, "image": image, "latent_window_size": 2, "num_frames": 10},
        note="Frames are made in two sections.",
    ),
]
