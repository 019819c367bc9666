"""Gemma's tokenizer and encoder."""

from __future__ import annotations

import functools
import string

from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from sweep.build import Case


@functools.cache
def tokenizer() -> GemmaTokenizer:
    """A token for each letter."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.ascii_letters, *string.digits, *",.:"]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=40)


SIZES = {
    "vocab_size": len(tokenizer()),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def text_encoder() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**SIZES))


CASES: list[Case] = []
