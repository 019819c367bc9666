"""What the families of video pipelines share: frames, a tokenizer of bytes, a small Wan VAE."""

from __future__ import annotations

from typing import Any

import diffusers
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from sweep.build import Case
from tiny import picture

CASES: list[Case] = []
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part.get('text', '') }}{% endfor %}{% endif %}"
    "{% endfor %}"
)
TEXT_LENGTH = {"max_sequence_length": 16}


def frames(count: int, size: int = 16, seed: int = 0) -> list[Any]:
    return [picture(seed + i, size, size) for i in range(count)]


def byte_tokenizer(special_tokens: tuple[str, ...] = (), **settings: Any) -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", "<bos>", *special_tokens, *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=list(special_tokens),
        **settings,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def wan_vae(**config: Any) -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **config)
