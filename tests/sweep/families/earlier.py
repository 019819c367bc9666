"""Pipelines from before or beside Stable Diffusion."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.shap_e import ShapERenderer
from transformers import CLIPVisionModel

import tiny_models as models
from sweep.build import Case, image
from sweep.families.stable_diffusion import image_encoder, image_processor, prior
from tiny import picture


def dit() -> diffusers.DiTTransformer2DModel:
    """Its thousandth class means no class."""
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )


def bert() -> LDMBertModel:
    return LDMBertModel(
        LDMBertConfig(
            vocab_size=len(models.clip_tokenizer()),
            d_model=16,
            encoder_layers=1,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            head_dim=8,
        )
    )


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


def svd_vae() -> diffusers.AutoencoderKLTemporalDecoder:
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), layers_per_block=1, latent_channels=4
    )


def svd_unet() -> diffusers.UNetSpatioTemporalConditionModel:
    return diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        in_channels=8,
        out_channels=4,
        num_attention_heads=(2, 2),
        cross_attention_dim=16,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )


def renderer() -> ShapERenderer:
    return ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=8, d_hidden=8, n_output=12, n_hidden_layers=6
    )


CASES = [
    Case(
        "DiTPipeline",
        {"transformer": dit, "scheduler": lambda: diffusers.DDIMScheduler()},
        {"class_labels": [3], "output_type": "pt"},
    ),
    Case("LDMTextToImagePipeline", {"vqvae": lambda: models.vae(4), "bert": bert, "tokenizer": lambda: models.clip_tokenizer(), "scheduler": lambda: diffusers.DDIMScheduler(**models.SD_BETAS)}),
    Case(
        "ShapEPipeline",
        {"prior": lambda: shap_e_prior(), "scheduler": heun, "shap_e_renderer": renderer},
    ),
    Case(
        "ShapEImg2ImgPipeline",
        {
            "prior": lambda: shap_e_prior(embedding_proj_norm_type="layer"),
            "image_encoder": lambda: image_encoder(CLIPVisionModel),
            "image_processor": image_processor,
            "scheduler": heun,
            "shap_e_renderer": renderer,
        },
        {"image": image},
    ),
    Case(
        "StableVideoDiffusionPipeline",
        {
            "vae": svd_vae,
            "unet": svd_unet,
            "image_encoder": lambda: image_encoder(image_size=224, patch_size=56),
            "feature_extractor": image_processor,
            "scheduler": lambda: diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", **models.SD_BETAS),
        },
        {"image": lambda: picture(0, 32, 32), "max_guidance_scale": 4.0},
        {"max_guidance_scale": 1.0},
    ),
]
