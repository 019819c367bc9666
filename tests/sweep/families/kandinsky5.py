"""Kandinsky 5 and 6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tiny_models as models
from sweep.build import Case, image

SIZE = {"height": 32, "width": 32}
TRANSFORMER = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 16,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (4, 6, 6),
}


def transformer(visual_cond: bool) -> Any:
    return diffusers.Kandinsky5Transformer3DModel(visual_cond=visual_cond, **TRANSFORMER)


def kandinsky6_transformer() -> Any:
    return diffusers.Kandinsky6Transformer3DModel(
        in_audio_dim=4, out_audio_dim=4, visual_token_type_num_embeddings=2, **TRANSFORMER
    )


def image_vae() -> Any:
    """8 x 8 pixels to a latent, as the pipelines take for granted."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )


def video_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4
    )


def processor() -> Any:
    return models.ImageOnlyProcessor(Qwen2VLImageProcessorPil(), models.qwen_tokenizer())


def short(template: str) -> Callable[[Any], None]:
    """A template of one token before the prompt, and small pictures where the pipeline takes a megapixel only."""

    def prepare(pipe: Any) -> None:
        pipe.prompt_template = template
        pipe.prompt_template_encode_start_idx = 1
        pipe.resolutions = [(32, 32)]

    return prepare


SHORT = short("<|im_start|>{}<|im_end|>")
SHORT_WITH_IMAGE = short("<|im_start|>{}<|vision_start|><|image_pad|><|vision_end|><|im_end|>")
SHARED = {"text_encoder": models.qwen_text_encoder, "tokenizer": processor}
TEXT_TO_IMAGE = SHARED | {"vae": image_vae, "transformer": lambda: transformer(False)}
IMAGE_TO_IMAGE = TEXT_TO_IMAGE | {"transformer": lambda: transformer(True)}
VIDEO = SHARED | {"vae": video_vae, "transformer": lambda: transformer(True)}
KANDINSKY6 = SHARED | {
    "vae": video_vae,
    "transformer": kandinsky6_transformer,
    "audio_vae": lambda: diffusers.MMAudioVAE(mel_bins=8, latent_channels=4, hidden_channels=8, layers_per_block=1),
    "vocoder": lambda: diffusers.MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(2,),
        upsample_kernel_sizes=(4,),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3, 5),),
    ),
}

CASES = [
    Case("Kandinsky5T2IPipeline", TEXT_TO_IMAGE, SIZE, prepare=SHORT),
    Case("Kandinsky5I2IPipeline", IMAGE_TO_IMAGE, SIZE, prepare=SHORT_WITH_IMAGE),
    Case("Kandinsky5T2VPipeline", VIDEO, SIZE, prepare=SHORT),
    Case("Kandinsky5I2VPipeline", VIDEO, SIZE | {"num_frames": 17}, prepare=SHORT),
    Case("Kandinsky6TI2VAPipeline", KANDINSKY6, SIZE | {"image": image, "max_sequence_length": 256}),
]
