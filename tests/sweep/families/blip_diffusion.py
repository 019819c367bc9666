"""BLIP-Diffusion."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel

import tiny_models as models
from sweep.build import Case
from sweep.families.stable_diffusion import controlnet, unet
from tiny import picture


class QFormer(diffusers.ModelMixin, diffusers.ConfigMixin):
    """In the place of Blip2QFormerModel, which asks for methods that transformers 5 does not have."""

    @register_to_config
    def __init__(self, num_query_tokens: int = 2) -> None:
        super().__init__()
        self.proj_layer = torch.nn.Linear(3, num_query_tokens * 16)

    def forward(self, image_input: torch.Tensor, text_input: Any = None, return_dict: bool = False) -> torch.Tensor:
        return self.proj_layer(image_input.mean((2, 3))).unflatten(1, (self.config.num_query_tokens, 16))


CASES = [
    Case(
        "BlipDiffusionControlNetPipeline",
        {
            "text_encoder": lambda: models.clip_text_encoder(ContextCLIPTextModel),
            "unet": unet,
            "scheduler": lambda: diffusers.PNDMScheduler(
                skip_prk_steps=True, set_alpha_to_one=False, **models.SD_BETAS
            ),
            "qformer": lambda: QFormer(),
            "controlnet": controlnet,
            "image_processor": lambda: BlipImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False),
        },
        {
            "prompt": ["on a sofa"],
            "reference_image": lambda: picture(0, 16, 16),
            "condtioning_image": lambda: picture(1, 16, 16),
            "source_subject_category": ["cat"],
            "target_subject_category": ["dog"],
            "neg_prompt": "blurry",
            "prompt_reps": 1,
            "output_type": "np",
        },
    )
]
