"""DreamLite, editing a picture."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tiny_models as models
from sweep.build import Case, image

TOKENS = models.QWEN_SPECIAL_TOKENS


class ImageOnlyProcessor(Qwen3VLProcessor):
    """Qwen3VLProcessor without its video processor, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def processor() -> ImageOnlyProcessor:
    images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64)
    return ImageOnlyProcessor(images, models.qwen_tokenizer())


def text_encoder() -> Qwen3VLForConditionalGeneration:
    tokenizer = models.qwen_tokenizer()
    token = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in TOKENS}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        image_token_id=token["image_pad"],
        video_token_id=token["video_pad"],
        vision_start_token_id=token["vision_start"],
        vision_end_token_id=token["vision_end"],
    )
    return Qwen3VLForConditionalGeneration(config)


def unet() -> diffusers.DreamLiteUNetModel:
    return diffusers.DreamLiteUNetModel(
        sample_size=8,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def vae() -> diffusers.AutoencoderTiny:
    """2 x 2 pixels to a latent."""
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


CASES = [
    Case(
        "DreamLitePipeline",
        {
            "text_encoder": text_encoder,
            "tokenizer": models.qwen_tokenizer(),
            "processor": processor,
            "vae": vae,
            "unet": unet,
        },
        {"image": image, "image_guidance_scale": 1.5},
    ),
]
