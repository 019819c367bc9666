"""Hunyuan Image, and Hunyuan Video 1.5: their guidance is a component."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

import tiny_models as models
from sweep.build import Case, image
from sweep.families.from_tiny import chat_tokenizer
from sweep.families.hunyuan_video import siglip, siglip_processor


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """Of two layers: the last but two hidden states are used."""
    config = models.qwen_text_encoder().config.to_dict()
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": None}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))


def glyph_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(ByT5Tokenizer()), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def image_transformer(**config: Any) -> diffusers.HunyuanImageTransformer2DModel:
    base = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": 16,
        "rope_axes_dim": (8, 8),
    }
    return diffusers.HunyuanImageTransformer2DModel(**base | config)


def video_transformer(task: str) -> diffusers.HunyuanVideo15Transformer3DModel:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type=task,
    )


VIDEO_VAE = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 4,
}


def image_vae() -> diffusers.AutoencoderKLHunyuanImage:
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75,
    )


def refiner_vae() -> diffusers.AutoencoderKLHunyuanImageRefiner:
    return diffusers.AutoencoderKLHunyuanImageRefiner(**VIDEO_VAE)


def video_vae() -> diffusers.AutoencoderKLHunyuanVideo15:
    return diffusers.AutoencoderKLHunyuanVideo15(**VIDEO_VAE)


def shorten(pipe: Any) -> None:
    """The prompt is padded to a few tokens, and no template is before it."""
    pipe.tokenizer_max_length = 24
    pipe.tokenizer_2_max_length = 16
    pipe.system_message = ""
    pipe.prompt_template_encode = "{}"
    pipe.prompt_template_encode_start_idx = 0
    pipe.vision_num_semantic_tokens = 4


ENCODERS = {
    "text_encoder": text_encoder,
    "tokenizer": lambda: models.qwen_tokenizer(),
    "text_encoder_2": glyph_encoder,
    "tokenizer_2": lambda: ByT5Tokenizer(),
}
IMAGE = {
    **ENCODERS,
    "transformer": image_transformer,
    "vae": image_vae,
    "guider": lambda: diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
}
REFINER = {
    **IMAGE,
    "transformer": lambda: image_transformer(
        in_channels=16,
        out_channels=8,
        text_embed_2_dim=None,
        patch_size=(1, 1, 1),
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=True,
    ),
    "vae": refiner_vae,
}
VIDEO = {
    **ENCODERS,
    "text_encoder": lambda: text_encoder().model.language_model,
    "tokenizer": chat_tokenizer,
    "vae": video_vae,
    "guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
}
CALL = {"prompt": 'a cat on a sofa, "hello"'}
OFF = {"negative_prompt": None}  # a guider is not switched off by an argument

CASES = [
    Case("HunyuanImagePipeline", IMAGE, CALL, OFF, shorten),
    Case("HunyuanImageRefinerPipeline", REFINER, {"image": image}, OFF, shorten),
    Case("HunyuanVideo15Pipeline", {**VIDEO, "transformer": lambda: video_transformer("t2v")}, CALL, OFF, shorten),
    Case(
        "HunyuanVideo15ImageToVideoPipeline",
        {
            **VIDEO,
            "transformer": lambda: video_transformer("i2v"),
            "image_encoder": siglip,
            "feature_extractor": siglip_processor,
        },
        {**CALL, "image": image},
        OFF,
        shorten,
    ),
]
