"""Decoders that pipelines encode text with, and tokenizers for them."""

from __future__ import annotations

import copy
from typing import Any

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


def decoder(config: type, tokenizer: Any, **changes: Any) -> Any:
    """The configuration of a language model of two layers: many pipelines take the last layer but one."""
    return config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **changes,
    )
