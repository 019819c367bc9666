"""OmniGen."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from PIL import Image
from transformers import LlamaTokenizer

import tiny_models as models
from sweep.build import Case
from sweep.families.hunyuandit import vae
from tiny import picture

SIZE = 32  # 16 x 16 pixels to a token: the pipeline counts on it


class Processor(processor_omnigen.OmniGenMultiModalProcessor):  # type: ignore[misc]
    """Without torchvision."""

    def __init__(self, text_tokenizer: Any, max_image_size: int = 1024) -> None:
        self.text_tokenizer = text_tokenizer
        self.collator = processor_omnigen.OmniGenCollator()
        self.reset_max_image_size(max_image_size)

    def reset_max_image_size(self, max_image_size: int) -> None:
        self.max_image_size = max_image_size

    def process_image(self, image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(processor_omnigen.crop_image(image, self.max_image_size))
        return torch.from_numpy(pixels / np.float32(127.5) - 1).permute(2, 0, 1)


if not hasattr(pipeline_omnigen, "OmniGenMultiModalProcessor"):
    pipeline_omnigen.OmniGenMultiModalProcessor = Processor


def tokenizer() -> LlamaTokenizer:
    """A token for each letter."""
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *string.ascii_letters, *string.digits, *string.punctuation]
    return LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def transformer() -> diffusers.OmniGenTransformer2DModel:
    return diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_layers=1,
        pad_token_id=0,
        vocab_size=len(tokenizer()),
        max_position_embeddings=1024,
        original_max_position_embeddings=1024,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        pos_embed_max_size=8,
        time_step_dim=16,
    )


CASES = [
    Case(
        "OmniGenPipeline",
        {"transformer": transformer, "vae": vae, "tokenizer": tokenizer},
        {
            "prompt": f"{models.PROMPTS[0]} <img><|image_1|></img>",
            "input_images": lambda: [picture(0, SIZE, SIZE)],
            "img_guidance_scale": 1.6,
            "height": SIZE,
            "width": SIZE,
        },
    ),
]
