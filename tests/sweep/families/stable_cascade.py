"""Stable Cascade: the prior, and the decoder of what it gives."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from transformers import CLIPTextModelWithProjection

import tiny_models as models
from sweep.build import Case

CLIP_WIDTH = 16


def unet(**config: Any) -> Any:
    return diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=CLIP_WIDTH,
        **config,
    )


SHARED = {
    "text_encoder": lambda: models.clip_text_encoder(CLIPTextModelWithProjection),
    "scheduler": diffusers.DDPMWuerstchenScheduler(),
}
PRIOR = SHARED | {
    "prior": lambda: unet(clip_text_in_channels=CLIP_WIDTH, clip_image_in_channels=CLIP_WIDTH, switch_level=(False,)),
    "resolution_multiple": 2.0,
}
DECODER = SHARED | {
    "decoder": lambda: unet(effnet_in_channels=4, timestep_conditioning_type=("sca",)),
    "vqgan": lambda: PaellaVQModel(levels=2, bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=8),
    "latent_dim_scale": 4.0,
}


def image_embeddings() -> torch.Tensor:
    return torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))


CASES = [
    Case("StableCascadePriorPipeline", PRIOR, {"output_type": "pt"}),
    Case("StableCascadeDecoderPipeline", DECODER, {"image_embeddings": image_embeddings}),
]
