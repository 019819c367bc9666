"""JoyImage-Edit."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.joyimage import image_processor
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor

import tiny_models as models
from sweep.build import Case, image
from sweep.families.language_models import QWEN3_VL, WIDTH, wan_vae

SIZE = 32
TRANSFORMER = {
    "in_channels": 16,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": WIDTH,
    "num_layers": 1,
    "rope_dim_list": [4, 6, 6],
}
SHARED = QWEN3_VL | {"vae": wan_vae, "tokenizer": models.qwen_tokenizer()}
EDIT = SHARED | {"transformer": lambda: diffusers.JoyImageEditTransformer3DModel(**TRANSFORMER)}
EDIT_PLUS = SHARED | {"transformer": lambda: diffusers.JoyImageEditPlusTransformer3DModel(**TRANSFORMER)}


def small_pictures(pipe: Any) -> None:
    """It makes a picture a megapixel."""
    image_processor.BUCKETS[SIZE] = [(SIZE, SIZE)]
    processor = JoyImageEditImageProcessor(vae_scale_factor=pipe.vae_scale_factor_spatial, basesize=SIZE)
    name = "vae_image_processor" if hasattr(pipe, "vae_image_processor") else "image_processor"
    setattr(pipe, name, processor)


CALL = {"height": SIZE, "width": SIZE}

CASES = [
    Case("JoyImageEditPipeline", EDIT, CALL | {"image": image}, prepare=small_pictures),
    Case("JoyImageEditPlusPipeline", EDIT_PLUS, CALL | {"images": lambda: [image()]}, prepare=small_pictures),
]
