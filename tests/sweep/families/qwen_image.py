"""Qwen-Image."""

from __future__ import annotations

import functools
import sys
from typing import Any
from unittest import mock

import diffusers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tiny_models as models
from sweep.build import Case
from sweep.families.from_tiny import parts_of
from tiny import picture


def image() -> Any:
    return picture(0, 32, 32)


def mask() -> Any:
    return picture(1, 32, 32).convert("L")


def processor() -> models.ImageOnlyProcessor:
    return models.ImageOnlyProcessor(Qwen2VLImageProcessorPil(), models.qwen_tokenizer())


def controlnet(extra: int = 0) -> diffusers.QwenImageControlNetModel:
    return diffusers.QwenImageControlNetModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        extra_condition_channels=extra,
    )


class SmallPictures(Case):
    """A pipeline that makes a picture a megapixel, and here about 32 x 32 pixels."""

    @property
    def cls(self) -> Any:
        return _small(super().cls)


@functools.cache
def _small(cls: Any) -> Any:
    module = sys.modules[cls.__module__]
    original = module.calculate_dimensions

    @functools.wraps(cls.__call__)
    def call(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(module, "calculate_dimensions", lambda area, ratio: original(32 * 32, ratio)):
            return cls.__call__(*args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": __name__})


def changed(model: Any, **changes: Any) -> Any:
    """A new model of another configuration."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return type(model)(**config | changes)


def layered_transformer() -> diffusers.QwenImageTransformer2DModel:
    extra = {"use_additional_t_cond": True, "use_layer3d_rope": True}
    return changed(models.qwen_image().transformer, in_channels=32, out_channels=8, **extra)


def layered_vae() -> diffusers.AutoencoderKLQwenImage:
    """Of pictures with an alpha channel, and another number of latent channels: four would be taken for latents."""
    latents = {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    return changed(models.qwen_image().vae, input_channels=4, **latents)


QWEN = parts_of(models.qwen_image, "transformer", "scheduler", "vae", "text_encoder", "tokenizer")
EDIT = {**QWEN, "processor": processor}
SIZE = {"height": 32, "width": 32}
EDIT_CALL = {**SIZE, "image": image}
IMAGE = {**SIZE, "image": image, "strength": 1.0}

CASES = [
    Case("QwenImagePipeline", QWEN, SIZE),
    Case("QwenImageImg2ImgPipeline", QWEN, IMAGE),
    Case("QwenImageInpaintPipeline", QWEN, {**IMAGE, "mask_image": mask}),
    Case("QwenImageControlNetPipeline", {**QWEN, "controlnet": controlnet}, {**SIZE, "control_image": image}),
    Case(
        "QwenImageControlNetInpaintPipeline",
        {**QWEN, "controlnet": lambda: controlnet(4)},
        {**SIZE, "control_image": image, "control_mask": mask},
    ),
    SmallPictures("QwenImageEditPipeline", EDIT, EDIT_CALL),
    SmallPictures("QwenImageEditPlusPipeline", EDIT, EDIT_CALL),
    SmallPictures("QwenImageEditInpaintPipeline", EDIT, {**IMAGE, "mask_image": mask}),
    SmallPictures(
        "QwenImageLayeredPipeline",
        {**EDIT, "transformer": layered_transformer, "vae": layered_vae},
        {"image": lambda: image().convert("RGBA"), "layers": 2, "cfg_normalize": True, "output_type": "pt"},
    ),
]
