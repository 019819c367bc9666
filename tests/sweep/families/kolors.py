"""Kolors."""

from __future__ import annotations

import functools
import io
import tempfile
from pathlib import Path

import diffusers
import sentencepiece
import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

import tiny_models as models
from sweep.build import Case, image


@functools.cache
def tokenizer() -> ChatGLMTokenizer:
    """Trained on the prompts."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(models.PROMPTS + models.NEGATIVE_PROMPTS),
        model_writer=written,
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.model"
        file.write_bytes(written.getvalue())
        return ChatGLMTokenizer(str(file))


def text_encoder() -> ChatGLMModel:
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=tokenizer().vocab_size,
        hidden_size=16,
        ffn_hidden_size=16,
        kv_channels=8,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        seq_length=64,
        original_rope=True,
    )
    encoder = ChatGLMModel(config)
    for parameter in encoder.parameters():  # they come as whatever the memory held
        torch.nn.init.ones_(parameter)
    return encoder


def unet() -> diffusers.UNet2DConditionModel:
    return models.unet(
        16,
        in_channels=4,
        sample_size=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


PARTS = {
    "text_encoder": text_encoder,
    "tokenizer": tokenizer(),
    "unet": unet,
    "scheduler": lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **models.SD_BETAS),
}
CALL = {"max_sequence_length": 40}

CASES = [
    Case("KolorsPipeline", PARTS, CALL),
    Case("KolorsImg2ImgPipeline", PARTS, CALL | {"image": image, "strength": 1.0}),
    Case("KolorsPAGPipeline", PARTS, CALL),
]
