"""Parts of the pipelines in tiny_models.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers import Qwen2Tokenizer

import tiny_models as models
from sweep.build import Case

LENGTH = {"max_sequence_length": 40}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def parts_of(make: Callable[[], Any], *names: str) -> dict[str, Callable[[], Any]]:
    """The named components of a tiny pipeline."""
    return {name: lambda name=name: getattr(make(), name) for name in names}


def chat_tokenizer(template: str = CHAT) -> Qwen2Tokenizer:
    tokenizer = copy.deepcopy(models.qwen_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


CASES: list[Case] = []
