"""Cosmos 1, Predict 2 and 2.5, Transfer 2.5, Cosmos 3."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict
from diffusers.utils import is_torchvision_available

import tiny_models as models
from sweep.build import Case, image
from sweep.families.video_parts import TEXT_LENGTH, byte_tokenizer, frames, wan_vae


class Transforms:
    """What Cosmos takes from torchvision.transforms."""

    class InterpolationMode:
        NEAREST = "nearest"

    class functional:
        @staticmethod
        def resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
            return torch.nn.functional.interpolate(image, size, mode=interpolation)

        @staticmethod
        def to_tensor(picture: Any) -> torch.Tensor:
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


if not is_torchvision_available():
    transformer_cosmos.transforms = controlnet_cosmos.transforms = Transforms
    pipeline_cosmos2_5_predict.torchvision = SimpleNamespace(transforms=Transforms)


class Unchecked:
    """In the place of the safety checker, which would be downloaded."""

    def to(self, device: Any) -> Unchecked:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


DENOISER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "out_channels": 16,
}

VISION_TOKENS = ("<|vision_start|>",)
PROJECTION = {
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 16,
    "encoder_hidden_states_channels": 32,
}


def transformer(in_channels: int, **config: Any) -> Any:
    return diffusers.CosmosTransformer3DModel(in_channels=in_channels, **DENOISER | config)


def vae() -> Any:
    return diffusers.AutoencoderKLCosmos(
        encoder_block_out_channels=(4, 4, 4, 4),
        decode_block_out_channels=(4, 4, 4, 4),
        attention_resolutions=(4,),
        resolution=16,
        num_layers=1,
        latents_mean=[0.0] * 16 * 4,
        latents_std=[1.0] * 16 * 4,
    )


def cosmos1(in_channels: int) -> dict[str, Any]:
    return {
        "transformer": lambda: transformer(in_channels),
        "vae": vae,
        "scheduler": lambda: diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
        ),
        "safety_checker": lambda: Unchecked(),
    }


def cosmos2(in_channels: int) -> dict[str, Any]:
    return {
        "transformer": lambda: transformer(in_channels, extra_pos_embed_type=None),
        "vae": wan_vae,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        "safety_checker": lambda: Unchecked(),
    }


def cosmos2_5(**config: Any) -> dict[str, Any]:
    return cosmos2(17) | {
        "tokenizer": byte_tokenizer,
        "text_encoder": models.qwen_text_encoder,
        "transformer": lambda: transformer(17, extra_pos_embed_type=None, **PROJECTION, **config),
        "scheduler": lambda: diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True
        ),
    }


def controlnet() -> Any:
    shared = {name: value for name, value in DENOISER.items() if name not in ("num_layers", "out_channels")}
    return diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2, in_channels=18, latent_channels=18, model_channels=24, **shared, **PROJECTION
    )


def cosmos3() -> dict[str, Any]:
    return {
        "transformer": lambda: diffusers.Cosmos3OmniTransformer(
            head_dim=12,
            hidden_size=24,
            intermediate_size=16,
            latent_channel=16,
            patch_latent_dim=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            num_key_value_heads=1,
            vocab_size=len(byte_tokenizer(VISION_TOKENS)),
            rope_axes_dim=(2, 2, 2),
        ),
        "text_tokenizer": lambda: byte_tokenizer(VISION_TOKENS),
        "vae": wan_vae,
        "scheduler": lambda: diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True
        ),
        "enable_safety_checker": False,
    }


CASES = [
    Case("CosmosTextToWorldPipeline", cosmos1(16), TEXT_LENGTH),
    Case("CosmosVideoToWorldPipeline", cosmos1(17), {**TEXT_LENGTH, "video": lambda: frames(1), "num_frames": 17}),
    Case("Cosmos2TextToImagePipeline", cosmos2(16), TEXT_LENGTH),
    Case("Cosmos2VideoToWorldPipeline", cosmos2(17), {**TEXT_LENGTH, "image": image}),
    Case(
        "Cosmos2_5_TransferPipeline",
        {**cosmos2_5(controlnet_block_every_n=1), "controlnet": controlnet},
        {
            "max_sequence_length": 128,
            "controls": lambda: frames(5),
            "num_frames_per_chunk": 5,
            "negative_prompt": models.NEGATIVE_PROMPTS[0],
        },
    ),
    Case("Cosmos2_5_PredictBasePipeline", cosmos2_5(), {"max_sequence_length": 128, "image": image}),
    Case("Cosmos3OmniPipeline", cosmos3(), {"use_system_prompt": False}),
]
