"""CLIP, T5 and UMT5 text encoders with random weights, and tokenizers that go with them, made locally.

The real vocabularies cannot be had offline. The tokenizers have the published classes, special tokens, ids and lengths.
Every word of the texts that they are made for is one token, as common words are in the real vocabularies; other text is
spelt out.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from itertools import pairwise

import torch
import transformers
from benchmarks.model_specs import TextEncoder
from benchmarks.random_weights import build_random
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTokenizer, T5Tokenizer
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.umt5.modeling_umt5 import UMT5Attention


def construct_encoder(encoder: TextEncoder, *, scale: str = "real") -> nn.Module:
    model = getattr(transformers, encoder.model)
    return model(model.config_class(**encoder.config(scale)))


@torch.no_grad()
def build_encoder(
    encoder: TextEncoder, *, device: torch.device | str, dtype: torch.dtype, seed: int, scale: str = "real"
) -> nn.Module:
    """The encoder in `dtype` on `device`. Two prompts that differ in a few words still differ after all its layers."""
    model = build_random(lambda: construct_encoder(encoder, scale=scale), device=device, dtype=dtype, seed=seed)
    # As T5 is initialised: embeddings smaller than what a layer adds would be lost in what all tokens have in common,
    # and T5 does not scale its logits, which queries and keys at unit scale would make sqrt(d_kv) large.
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.mul_(module.embedding_dim**0.5)
        elif isinstance(module, (T5Attention, UMT5Attention)):
            module.q.weight.mul_(module.key_value_proj_dim**-0.5)
    return model


def make_tokenizer(encoder: TextEncoder, texts: Iterable[str], *, scale: str = "real") -> CLIPTokenizer | T5Tokenizer:
    if encoder.model.startswith("CLIP"):
        return _clip_tokenizer(encoder, texts, encoder.config(scale)["vocab_size"])
    return _t5_tokenizer(encoder, texts)


def _clip_tokenizer(encoder: TextEncoder, texts: Iterable[str], vocab_size: int) -> CLIPTokenizer:
    """As in the published vocabulary, bytes come first, then bytes that end a word; the two special tokens are last."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = _merges(word for text in texts for word in re.findall("[a-z]+", text.lower()))
    tokens = dict.fromkeys([*alphabet, *(f"{byte}</w>" for byte in alphabet), *map("".join, merges)])
    vocab = {token: index for index, token in enumerate(tokens)}
    vocab |= {"<|startoftext|>": vocab_size - 2, "<|endoftext|>": vocab_size - 1}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=encoder.pad_token, model_max_length=encoder.max_length)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each word. What comes later leaves earlier words as they are."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            pair = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))  # a new one if no old one is left
            ranks.setdefault(pair, len(ranks))
            at = pairs.index(pair)
            pieces[at : at + 2] = ["".join(pair)]
    return list(ranks)


def _t5_tokenizer(encoder: TextEncoder, texts: Iterable[str]) -> T5Tokenizer:
    words = dict.fromkeys(f"\u2581{word}" for text in texts for word in text.split())
    spelling = [char for char in string.printable if not char.isspace()]
    pieces = [("\u2581", -9.0), *((word, -1.0) for word in words), *((char, -9.0) for char in spelling)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]
    return T5Tokenizer(vocab=vocab, extra_ids=0, pad_token=encoder.pad_token, model_max_length=encoder.max_length)
