"""EasyAnimate."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from sweep.build import Case
from sweep.families.video_parts import byte_tokenizer


def text_encoder() -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={
                "vocab_size": len(byte_tokenizer()),
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
                "bos_token_id": None,
                "eos_token_id": 1,
                "pad_token_id": 0,
            },
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
        )
    )


def parts(in_channels: int) -> dict[str, Any]:
    return {
        "tokenizer": byte_tokenizer,
        "text_encoder": text_encoder,
        "transformer": lambda: diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            out_channels=4,
            patch_size=2,
            num_layers=1,
            mmdit_layers=1,
            time_embed_dim=8,
            text_embed_dim=16,
            add_norm_text_encoder=True,
        ),
        "vae": lambda: diffusers.AutoencoderKLMagvit(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        ),
    }


def video(seed: int) -> torch.Tensor:
    return torch.rand((1, 3, 5, 16, 16), generator=torch.Generator().manual_seed(seed))


def mask() -> torch.Tensor:
    return (video(1)[:, :1] > 0.5).float() * 255


def without_index(pipe: Any) -> None:
    """`__call__` gives `encode_prompt` an argument that it does not take, in diffusers 0.42.1."""
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda text_encoder_index, **kwargs: encode(**kwargs)


CASES = [
    Case("EasyAnimatePipeline", parts(4)),
    Case(
        "EasyAnimateControlPipeline",
        parts(12),
        {"control_video": lambda: video(0)},
        prepare=without_index,
        note="`encode_prompt` is mended: diffusers 0.42.1 calls it with an argument that it does not take",
    ),
    Case(
        "EasyAnimateInpaintPipeline",
        parts(9),
        {"video": lambda: video(0), "mask_video": mask},
        prepare=lambda pipe: pipe.vae.register_to_config(cache_mag_vae=False),
        note="with the VAE setting `cache_mag_vae`, which diffusers 0.42.1 asks for and does not have",
    ),
]
