"""Decoders that pipelines encode text with, and tokenizers for them."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tiny_models as models
from sweep.build import Case

WIDTH = 16
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CASES: list[Case] = []


def chat_tokenizer() -> Any:
    tokenizer = copy.deepcopy(models.qwen_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def t5_tokenizer(length: int) -> Any:
    """With the length that a pipeline pads prompts to where its caller cannot say."""
    tokenizer = copy.deepcopy(models.t5_tokenizer())
    tokenizer.model_max_length = length
    return tokenizer


def decoder(config: type, tokenizer: Any, layers: int = 2) -> Any:
    """The configuration of a language model. Two layers, because many pipelines take the last layer but one."""
    return config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def qwen3_vl(cls: type, layers: int = 2) -> Any:
    tokenizer = models.qwen_tokenizer()
    token = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in models.QWEN_SPECIAL_TOKENS}
    return cls(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            image_token_id=token["image_pad"],
            video_token_id=token["video_pad"],
            vision_start_token_id=token["vision_start"],
            vision_end_token_id=token["vision_end"],
        )
    )


class ImageOnlyProcessor(Qwen3VLProcessor):
    """Qwen3VLProcessor without its video processor, which needs torchvision. It has the parts that __init__ names."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def qwen3_vl_processor() -> Any:
    images = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32})
    return ImageOnlyProcessor(images, chat_tokenizer(), chat_template=CHAT_TEMPLATE)


QWEN3_VL = {"text_encoder": lambda: qwen3_vl(Qwen3VLForConditionalGeneration), "processor": qwen3_vl_processor}


def flux2_vae() -> Any:
    """2 x 2 pixels to a latent."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )


def qwen_image_vae() -> Any:
    """4 x 4 pixels to a latent."""
    return models.qwen_parts(models.qwen_tokenizer())["vae"]


def wan_vae() -> Any:
    """8 x 8 pixels to a latent."""
    return diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
