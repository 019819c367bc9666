"""Shap-E."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.shap_e import ShapERenderer
from transformers import CLIPVisionModel

from sweep.build import Case, image
from sweep.families.stable_diffusion import image_encoder, image_processor, prior


def shap_e_prior(**config: Any) -> diffusers.PriorTransformer:
    """Predicts a mean, which is used, and a variance, which is not."""
    return prior(
        embedding_dim=8,
        embedding_proj_dim=16,
        clip_embed_dim=16,
        num_embeddings=4,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
        **config,
    )


def heun() -> diffusers.HeunDiscreteScheduler:
    return diffusers.HeunDiscreteScheduler(
        beta_schedule="exp", prediction_type="sample", use_karras_sigmas=True, clip_sample=True
    )


def renderer() -> ShapERenderer:
    return ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=8, d_hidden=8, n_output=12, n_hidden_layers=6
    )


PARTS = {"scheduler": heun, "shap_e_renderer": renderer}

CASES = [
    Case("ShapEPipeline", PARTS | {"prior": lambda: shap_e_prior()}),
    Case(
        "ShapEImg2ImgPipeline",
        PARTS
        | {
            "prior": lambda: shap_e_prior(embedding_proj_norm_type="layer"),
            "image_encoder": lambda: image_encoder(CLIPVisionModel),
            "image_processor": image_processor,
        },
        {"image": image},
    ),
]
