"""The parts of tiny.py's pipelines: the real classes of tokenizers, encoders, denoisers and VAEs in the smallest sizes.

Made on the spot: nothing is downloaded. Each function at the end of the file puts one pipeline together.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import diffusers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PROMPTS = ["a photo of a cat on a sofa, high quality", "a red dog"]
NEGATIVE_PROMPTS = ["blurry", "low quality, bad hands"]
QWEN_SPECIAL_TOKENS = ["im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]


# -- Text encoders and tokenizers


class ImageOnlyProcessor(Qwen2VLProcessor):
    """Qwen2VLProcessor without its video processor, which needs torchvision. It has the parts that __init__ names."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """The bytes, and the bytes that end a word, as the published vocabulary begins. Not trained: the order in which the
    trainer meets words, and so the ids, differs from process to process."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


@functools.cache
def t5_tokenizer() -> T5Tokenizer:
    """The prompts' words, and letters for other words."""
    words = sorted({f"\u2581{word}" for prompt in PROMPTS + NEGATIVE_PROMPTS for word in prompt.split()})
    pieces = [(word, -1.0) for word in words] + [(letter, -9.0) for letter in string.printable if letter not in " \n"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *pieces]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


@functools.cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    """Trained on the pipelines' own templates, so that one word is one token as in the published vocabulary: they drop
    a fixed number of template tokens (34, 64) from the embeddings, and what they leave must be the prompt."""
    pipes = (diffusers.QwenImagePipeline(*[None] * 5), diffusers.QwenImageEditPipeline(*[None] * 6))
    templates = [pipe.prompt_template_encode.replace("{}", "\n") for pipe in pipes]
    corpus = [templates + PROMPTS + NEGATIVE_PROMPTS + ["Picture 1: Picture 2:"]]
    special_tokens = [f"<|{name}|>" for name in QWEN_SPECIAL_TOKENS]
    return Qwen2Tokenizer().train_new_from_iterator(
        corpus, 1000, new_special_tokens=special_tokens, show_progress=False
    )


def clip_text_encoder(cls: type = CLIPTextModel) -> CLIPTextModel | CLIPTextModelWithProjection:
    tokenizer = clip_tokenizer()
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=2,  # SDXL and SD 3 take the last but one
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_text_encoder(cls: type = T5EncoderModel, config: type = T5Config) -> T5EncoderModel | UMT5EncoderModel:
    return cls(config(vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))


def qwen_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    tokenizer = qwen_tokenizer()
    token = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in QWEN_SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        image_token_id=token["image_pad"],
        video_token_id=token["video_pad"],
        vision_start_token_id=token["vision_start"],
        vision_end_token_id=token["vision_end"],
        vision_token_id=token["vision_pad"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)


# -- Denoisers, VAEs, pipelines


def vae(latent_channels: int, **config: Any) -> diffusers.AutoencoderKL:
    """AutoencoderKL with 2 x 2 pixels to a latent."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **config,
    )


def qwen_parts(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],  # 4 x 4 pixels to a latent
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "text_encoder": qwen_text_encoder(),
        "tokenizer": tokenizer,
    }


@contextmanager
def small_images() -> Iterator[None]:
    """The Qwen-Image edit pipelines make a picture a megapixel; inside this block they make it about 32 x 32 pixels."""
    with ExitStack() as stack:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            original = module.calculate_dimensions
            small = functools.partial(lambda original, target_area, ratio: original(32 * 32, ratio), original)
            stack.enter_context(mock.patch.object(module, "calculate_dimensions", small))
        yield


class QwenImageEditPipeline(diffusers.QwenImageEditPipeline):
    @functools.wraps(diffusers.QwenImageEditPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with small_images():
            return super().__call__(*args, **kwargs)


class QwenImageEditPlusPipeline(diffusers.QwenImageEditPlusPipeline):
    @functools.wraps(diffusers.QwenImageEditPlusPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with small_images():
            return super().__call__(*args, **kwargs)


def qwen_image() -> diffusers.DiffusionPipeline:
    return diffusers.QwenImagePipeline(**qwen_parts(qwen_tokenizer()))


def qwen_image_edit(cls: type[diffusers.DiffusionPipeline]) -> diffusers.DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    processor = ImageOnlyProcessor(Qwen2VLImageProcessorPil(), tokenizer)
    return cls(processor=processor, **qwen_parts(tokenizer))


def flux() -> diffusers.DiffusionPipeline:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(4, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def chroma() -> diffusers.DiffusionPipeline:
    return diffusers.ChromaPipeline(
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(4, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=t5_text_encoder(),
        tokenizer=t5_tokenizer(),
    )


def wan() -> diffusers.DiffusionPipeline:
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=t5_text_encoder(UMT5EncoderModel, UMT5Config),
        tokenizer=t5_tokenizer(),
    )


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def unet(cross_attention_dim: int, attention_head_dim: Any = 2, **config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=attention_head_dim,
        cross_attention_dim=cross_attention_dim,
        **config,
    )


def sd_parts(in_channels: int) -> dict[str, Any]:
    return {
        "unet": unet(16, in_channels=in_channels),
        "vae": vae(4),
        "text_encoder": clip_text_encoder(),
        "tokenizer": clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sd15() -> diffusers.DiffusionPipeline:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SD_BETAS)
    return diffusers.StableDiffusionPipeline(scheduler=scheduler, **sd_parts(4))


def instruct_pix2pix() -> diffusers.DiffusionPipeline:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SD_BETAS)
    return diffusers.StableDiffusionInstructPix2PixPipeline(scheduler=scheduler, **sd_parts(8))


def sdxl() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(
            32,  # both text encoders' hidden states side by side
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD_BETAS),
        vae=vae(4),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
    )


def sd3() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=clip_text_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text_encoder(),
        tokenizer_3=t5_tokenizer(),
    )
