"""A tokenizer and a processor with Qwen2.5-VL's classes, special tokens and ids, made locally, without a download.

The real vocabulary cannot be had offline. What matters to a pipeline is that the special tokens have the ids that the
text encoder's configuration names, and that a prompt costs about the tokens it really costs: the BPE merges are trained
on the prompt templates until every word of them is one token, as it is in the real vocabulary, so the templates' system
prompts come out at exactly the 34 and 64 tokens that the pipelines cut off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen2VLProcessor

# Consecutive in the real vocabulary, from 151643 on.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class ImageOnlyQwen2VLProcessor(Qwen2VLProcessor):
    """Qwen2VLProcessor without its video processor, whose module imports torchvision. Edit pipelines pass no video."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def special_ids(first: int) -> dict[str, int]:
    return {token: first + index for index, token in enumerate(SPECIAL_TOKENS)}


def make_tokenizer(texts: Iterable[str], *, first_special_id: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer in which every word of `texts` is one token and any other text still has tokens."""
    words = [part for text in texts for part in re.split(r"<\|.*?\|>", text)]
    backend = Qwen2Tokenizer().backend_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=first_special_id, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words, trainer=trainer)
    model = json.loads(backend.to_str())["model"]
    specials = special_ids(first_special_id)
    learned = {token: index for token, index in model["vocab"].items() if token not in specials}
    return Qwen2Tokenizer(
        vocab=learned | specials,
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=131072,
    )


def make_processor(tokenizer: Qwen2Tokenizer, *, max_pixels: int) -> Qwen2VLProcessor:
    """The PIL image processor, with or without torchvision, so that every machine prepares the same pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return ImageOnlyQwen2VLProcessor(Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=max_pixels), tokenizer)
