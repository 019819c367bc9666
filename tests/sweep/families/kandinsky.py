"""Kandinsky 2.1, 2.2 and 3, with their priors."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from transformers import CLIPImageProcessorPil, CLIPTextModelWithProjection, CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection as CLIPVisionModel

import tiny_models as models
from sweep.build import Case, image
from tiny import picture

WIDTH = 16


def movq() -> Any:
    return diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def unet(in_channels: int, **config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=8,  # noise and its variance
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        **config,
    )


def text_unet(in_channels: int) -> Any:
    return unet(in_channels, addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj")


def image_unet(in_channels: int, addition_embed_type: str = "image") -> Any:
    return unet(in_channels, addition_embed_type=addition_embed_type, encoder_hid_dim_type="image_proj")


def ddim() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def ddpm() -> Any:
    return diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, variance_type="learned_range")


def multilingual_clip() -> Any:
    return MultilingualCLIP(
        MCLIPConfig(
            transformerDimSize=WIDTH,
            imageDimSize=WIDTH,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=len(models.t5_tokenizer()),
        )
    )


def image_embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))


def hint() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def image_encoder() -> Any:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )


def kandinsky3_unet() -> Any:
    return diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        encoder_hid_dim=models.t5_text_encoder().config.d_model,
    )


def spread(pipe: Any) -> None:
    """The mean and standard deviation of image embeddings are zero until they are loaded."""
    pipe.prior.clip_std.data.fill_(1.0)


KANDINSKY = {
    "movq": movq,
    "unet": lambda: text_unet(4),
    "scheduler": ddim,
    "text_encoder": multilingual_clip,
    "tokenizer": models.t5_tokenizer(),
}
V22 = {"movq": movq, "unet": lambda: image_unet(4), "scheduler": ddpm}
V22_CONTROLNET = V22 | {"unet": lambda: image_unet(8, "image_hint")}
PRIOR = {
    "prior": lambda: diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1
    ),
    "image_encoder": image_encoder,
    "text_encoder": lambda: models.clip_text_encoder(CLIPTextModelWithProjection),
    "scheduler": lambda: diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
    ),
    "image_processor": lambda: CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16),
}
KANDINSKY3 = {
    "unet": kandinsky3_unet,
    "movq": movq,
    "scheduler": lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
}

EMBEDS = {"image_embeds": lambda: image_embeds(0), "negative_image_embeds": lambda: image_embeds(1)}
PIXELS = EMBEDS | {"output_type": "pt"}
FROM_IMAGE = {"image": image, "strength": 1.0}
INPAINT = {"image": image, "mask_image": lambda: picture(1, 16, 16).convert("L")}

CASES = [
    Case("KandinskyPipeline", KANDINSKY, PIXELS),
    Case("KandinskyImg2ImgPipeline", KANDINSKY, PIXELS | FROM_IMAGE | {"strength": 0.75}),
    Case("KandinskyInpaintPipeline", KANDINSKY | {"unet": lambda: text_unet(9)}, PIXELS | INPAINT),
    Case("KandinskyPriorPipeline", PRIOR, {"output_type": "pt"}, prepare=spread),
    Case("KandinskyV22Pipeline", V22, EMBEDS),
    Case("KandinskyV22Img2ImgPipeline", V22, EMBEDS | FROM_IMAGE),
    Case("KandinskyV22InpaintPipeline", V22 | {"unet": lambda: image_unet(9)}, EMBEDS | INPAINT),
    Case("KandinskyV22ControlnetPipeline", V22_CONTROLNET, PIXELS | {"hint": hint}),
    Case("KandinskyV22ControlnetImg2ImgPipeline", V22_CONTROLNET, PIXELS | FROM_IMAGE | {"hint": hint}),
    Case("KandinskyV22PriorPipeline", PRIOR, {"output_type": "pt"}, prepare=spread),
    Case("KandinskyV22PriorEmb2EmbPipeline", PRIOR, FROM_IMAGE | {"output_type": "pt"}, prepare=spread),
    Case("Kandinsky3Pipeline", KANDINSKY3),
    Case("Kandinsky3Img2ImgPipeline", KANDINSKY3, FROM_IMAGE),
]
