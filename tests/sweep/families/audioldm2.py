"""AudioLDM 2."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

import tiny_models as models
from sweep.build import Case

LENGTH = 16  # tokens of a prompt


def roberta_tokenizer() -> RobertaTokenizer:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return RobertaTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def t5_tokenizer() -> Any:
    tokenizer = copy.deepcopy(models.t5_tokenizer())
    tokenizer.model_max_length = LENGTH
    return tokenizer


def clap() -> ClapModel:
    return ClapModel(
        ClapConfig(
            text_config={
                "vocab_size": len(roberta_tokenizer()),
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": LENGTH + 2,
                "projection_dim": 16,
            },
            audio_config={
                "hidden_size": 16,
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "num_attention_heads": [2, 2],
                "patch_embeds_hidden_size": 8,
                "spec_size": 64,
                "projection_dim": 16,
            },
            projection_dim=16,
        )
    )


def language_model() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=8, n_positions=64, bos_token_id=0, eos_token_id=0)
    config.max_new_tokens = 4
    return GPT2LMHeadModel(config)


def unet() -> diffusers.AudioLDM2UNet2DConditionModel:
    return diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=([None, 16, 32], [None, 16, 32]),
    )


def vocoder() -> SpeechT5HifiGan:
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
        )
    )


CASES = [
    Case(
        "AudioLDM2Pipeline",
        {
            "vae": lambda: models.vae(4, in_channels=1, out_channels=1),
            "text_encoder": clap,
            "tokenizer": roberta_tokenizer,
            "tokenizer_2": t5_tokenizer,
            "projection_model": lambda: diffusers.AudioLDM2ProjectionModel(16, 32, 16),
            "language_model": language_model,
            "feature_extractor": lambda: ClapFeatureExtractor(),
            "unet": unet,
            "vocoder": vocoder,
        },
    )
]
