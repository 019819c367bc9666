"""Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tiny_models as models
from sweep.build import Case
from sweep.families.from_tiny import chat_tokenizer
from tiny import picture

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)


class ImageOnlyProcessor(Qwen3VLProcessor):
    """Without the video processor, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def processor() -> ImageOnlyProcessor:
    pictures = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
    return ImageOnlyProcessor(pictures, chat_tokenizer(CHAT), CHAT)


def text_encoder() -> Qwen3VLForConditionalGeneration:
    tokenizer = models.qwen_tokenizer()
    token = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in models.QWEN_SPECIAL_TOKENS}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            image_token_id=token["image_pad"],
            video_token_id=token["video_pad"],
            vision_start_token_id=token["vision_start"],
            vision_end_token_id=token["vision_end"],
        )
    )


def transformer() -> diffusers.QwenImage21Transformer2DModel:
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def vae() -> diffusers.AutoencoderKLQwenImage21:
    return diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


CASES = [
    Case(
        "QwenImage21Pipeline",
        {
            "transformer": transformer,
            "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "vae": vae,
            "text_encoder": text_encoder,
            "processor": processor,
        },
        {"height": 32, "width": 32, "image": lambda: picture(0, 32, 32), "output_resolution": 32},
    ),
]
