"""Diffusers pipelines in their published geometry, with random weights made on the GPU in seconds.

    pipe = build_pipeline("qwen-image-edit")                      # 20 B denoiser, 7 B text encoder, VAE, on cuda
    picture = pipe(**inputs("qwen-image-edit", steps=20)).images

Speed does not depend on the values of the weights, and neither does the comparison of two ways to run them; quality cannot
be judged from these pictures. Configurations are those of the published checkpoints, named in each `Spec`. Qwen-Image and
Qwen-Image-Edit are complete: a prompt (and a photo) go in, a picture comes out. The others take random prompt embeddings
of the shapes their text encoders produce. `scale="tiny"` is the same pipeline, small enough for a CPU in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.qwen_text import make_processor, make_tokenizer, special_ids
from benchmarks.random_weights import build_random

PROMPT = "Turn the background into a snowy mountain landscape at sunset and keep the person unchanged"
NEGATIVE_PROMPT = "low quality, blurry"


@dataclass(frozen=True)
class Spec:
    """One model: classes, published and tiny configurations, and what its call needs for guidance to be on."""

    checkpoint: str  # whose configuration this is
    pipeline: str
    denoiser: str
    denoiser_real: dict[str, Any]
    denoiser_tiny: dict[str, Any]
    vae: str
    vae_real: dict[str, Any]
    vae_tiny: dict[str, Any]
    scheduler: str
    scheduler_config: dict[str, Any]
    guidance: dict[str, float]
    size: int = 1024
    tiny_size: int = 64
    steps: int = 50
    vae_dtype: torch.dtype | None = None  # where the published usage differs from the pipeline's dtype
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def denoiser_attribute(self) -> str:
        return "unet" if self.denoiser.startswith("UNet") else "transformer"


# The four-level image VAE of SD 1.5, SDXL, SD 3.5 and FLUX.1; they differ in latent channels and scaling.
_KL_REAL = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
_KL_TINY = _KL_REAL | dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
_KL_16 = dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, sample_size=1024)
_SD3_LATENTS = dict(scaling_factor=1.5305, shift_factor=0.0609)
_FLUX_LATENTS = dict(scaling_factor=0.3611, shift_factor=0.1159)

_CAUSAL_VAE_TINY = dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)

_SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)

_QWEN = dict(
    denoiser="QwenImageTransformer2DModel",
    denoiser_real=dict(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=60,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=3584,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    ),
    denoiser_tiny=dict(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)
    ),
    vae="AutoencoderKLQwenImage",
    vae_real={},
    vae_tiny=_CAUSAL_VAE_TINY,
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_config=dict(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    ),
    guidance=dict(true_cfg_scale=4.0),
)

_WAN = dict(
    pipeline="WanPipeline",
    denoiser="WanTransformer3DModel",
    denoiser_tiny=dict(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32
    ),
    vae="AutoencoderKLWan",
    vae_real={},
    vae_tiny=_CAUSAL_VAE_TINY,
    vae_dtype=torch.float32,
    scheduler="UniPCMultistepScheduler",
    scheduler_config=dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    guidance=dict(guidance_scale=5.0),
    size=480,
)

SPECS: dict[str, Spec] = {
    "qwen-image": Spec(checkpoint="Qwen/Qwen-Image", pipeline="QwenImagePipeline", **_QWEN),
    "qwen-image-edit": Spec(checkpoint="Qwen/Qwen-Image-Edit", pipeline="QwenImageEditPipeline", **_QWEN),
    "sd15": Spec(
        checkpoint="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline="StableDiffusionPipeline",
        denoiser="UNet2DConditionModel",
        denoiser_real=dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        denoiser_tiny=dict(
            sample_size=64,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
        ),
        vae="AutoencoderKL",
        vae_real=_KL_REAL | dict(sample_size=512),
        vae_tiny=_KL_TINY,
        scheduler="PNDMScheduler",
        scheduler_config=_SD_BETAS | dict(skip_prk_steps=True, set_alpha_to_one=False),
        guidance=dict(guidance_scale=7.5),
        size=512,
        pipeline_kwargs=dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False),
    ),
    "sdxl": Spec(
        checkpoint="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline="StableDiffusionXLPipeline",
        denoiser="UNet2DConditionModel",
        denoiser_real=dict(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        ),
        denoiser_tiny=dict(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            use_linear_projection=True,
        ),
        vae="AutoencoderKL",
        vae_real=_KL_REAL | dict(sample_size=1024, scaling_factor=0.13025),
        vae_tiny=_KL_TINY,
        scheduler="EulerDiscreteScheduler",
        scheduler_config=_SD_BETAS | dict(timestep_spacing="leading"),
        guidance=dict(guidance_scale=5.0),
        pipeline_kwargs=dict(add_watermarker=False),
    ),
    "sd35-large": Spec(
        checkpoint="stabilityai/stable-diffusion-3.5-large",
        pipeline="StableDiffusion3Pipeline",
        denoiser="SD3Transformer2DModel",
        denoiser_real=dict(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=38,
            attention_head_dim=64,
            num_attention_heads=38,
            joint_attention_dim=4096,
            caption_projection_dim=2432,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
        denoiser_tiny=dict(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        vae="AutoencoderKL",
        vae_real=_KL_REAL | _KL_16 | _SD3_LATENTS,
        vae_tiny=_KL_TINY | _KL_16 | _SD3_LATENTS,
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config=dict(shift=3.0),
        guidance=dict(guidance_scale=3.5),
        steps=28,
    ),
    "flux1-dev": Spec(
        checkpoint="black-forest-labs/FLUX.1-dev",
        pipeline="FluxPipeline",
        denoiser="FluxTransformer2DModel",
        denoiser_real=dict(
            patch_size=1,
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        ),
        denoiser_tiny=dict(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        vae="AutoencoderKL",
        vae_real=_KL_REAL | _KL_16 | _FLUX_LATENTS,
        vae_tiny=_KL_TINY | _KL_16 | _FLUX_LATENTS,
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config=dict(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        guidance=dict(true_cfg_scale=4.0, guidance_scale=3.5),
        steps=28,
    ),
    "wan21-1.3b": Spec(
        checkpoint="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        denoiser_real=dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        **_WAN,
    ),
    "wan21-14b": Spec(
        checkpoint="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        denoiser_real=dict(num_attention_heads=40, ffn_dim=13824, num_layers=40),
        **_WAN,
    ),
}

# Qwen2.5-VL-7B-Instruct, the text encoder of both Qwen-Image models.
_TEXT_REAL = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_window_layers=28,
    max_position_embeddings=128000,
    rms_norm_eps=1e-6,
    vocab_size=152064,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
)
_VISION_REAL = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, tokens_per_second=2
)
_TEXT_TINY = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=2064,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
)
_VISION_TINY = dict(
    depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[1]
)
_TEXT_KEY_GAIN = 4.0
_FIRST_SPECIAL_ID = {"real": 151643, "tiny": 2048}
_MAX_PIXELS = {"real": 12845056, "tiny": 56 * 56}


def spec(name: str) -> Spec:
    if name not in SPECS:
        raise ValueError(f"Unknown model {name!r}. Known: {', '.join(SPECS)}.")
    return SPECS[name]


def _pick(scale: str, real: Any, tiny: Any) -> Any:
    if scale not in ("real", "tiny"):
        raise ValueError(f"Expected `scale` to be 'real' or 'tiny', but got {scale!r}.")
    return real if scale == "real" else tiny


def denoiser_config(name: str, scale: str = "real") -> dict[str, Any]:
    return _pick(scale, spec(name).denoiser_real, spec(name).denoiser_tiny)


def construct_denoiser(name: str, *, scale: str = "real") -> torch.nn.Module:
    return getattr(diffusers, spec(name).denoiser)(**denoiser_config(name, scale))


def construct_vae(name: str, *, scale: str = "real") -> torch.nn.Module:
    return getattr(diffusers, spec(name).vae)(**_pick(scale, spec(name).vae_real, spec(name).vae_tiny))


def construct_text_encoder(*, scale: str = "real") -> torch.nn.Module:
    """Qwen2.5-VL, with the special token ids of the tokenizer that goes with it."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = special_ids(_FIRST_SPECIAL_ID[scale])
    text = _pick(scale, _TEXT_REAL, _TEXT_TINY)
    config = Qwen2_5_VLConfig(
        text_config=text | dict(bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"]),
        vision_config=dict(_pick(scale, _VISION_REAL, _VISION_TINY)),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def build_denoiser(
    name: str,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    scale: str = "real",
) -> torch.nn.Module:
    """The denoiser alone, with the weights that `build_pipeline` gives it for the same seed, device and dtype."""
    model = build_random(lambda: construct_denoiser(name, scale=scale), device=device, dtype=dtype, seed=seed)
    # Joint attention with unit-scale logits spreads over 8192 image tokens, and two prompts then differ by 2 % in the
    # prediction: a generation that lost its guidance would look right. Sharp attention to the text tokens prevents that.
    with torch.no_grad():
        for key, param in model.named_parameters():
            if key.endswith("norm_added_k.weight"):
                param.fill_(_TEXT_KEY_GAIN)
    return model


@torch.no_grad()
def build_pipeline(
    name: str,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    scale: str = "real",
    log: Callable[[str], None] = lambda line: None,
) -> DiffusionPipeline:
    """A pipeline as `from_pretrained(checkpoint, torch_dtype=dtype).to(device)` would give it, with random weights.

    `log` receives one line per component, after its weights are in place.
    """
    model = spec(name)

    def placed(part: str, module: torch.nn.Module) -> torch.nn.Module:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)  # so that the line comes when the weights are there
        log(f"{part}: {type(module).__name__}, {sum(p.numel() for p in module.parameters()) / 1e9:.2f} B parameters")
        return module

    denoiser = build_denoiser(name, device=device, dtype=dtype, seed=seed, scale=scale)
    vae = build_random(
        lambda: construct_vae(name, scale=scale), device=device, dtype=model.vae_dtype or dtype, seed=seed + 1
    )
    parts: dict[str, Any] = {
        model.denoiser_attribute: placed(model.denoiser_attribute, denoiser),
        "vae": placed("vae", vae),
        "scheduler": getattr(diffusers, model.scheduler)(**model.scheduler_config),
    }
    if name.startswith("qwen"):
        text_encoder = build_random(
            lambda: construct_text_encoder(scale=scale), device=device, dtype=dtype, seed=seed + 2
        )
        parts["text_encoder"] = placed("text_encoder", text_encoder)
    pipeline_class = getattr(diffusers, model.pipeline)
    expected, _ = pipeline_class._get_signature_keys(pipeline_class)
    absent = {key: None for key in expected if key not in parts and key not in model.pipeline_kwargs}
    pipe = pipeline_class(**parts, **absent, **model.pipeline_kwargs)
    if name.startswith("qwen"):
        _add_tokenizer(pipe, scale)
    return pipe


def _add_tokenizer(pipe: DiffusionPipeline, scale: str) -> None:
    template, cut = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
    tokenizer = make_tokenizer(
        [template.format(f"{PROMPT} {NEGATIVE_PROMPT}"), PROMPT, NEGATIVE_PROMPT],
        first_special_id=_FIRST_SPECIAL_ID[scale],
    )
    system = template.split("{}")[0].split("<|vision_start|>")[0]
    if len(tokenizer(system)["input_ids"]) != cut:
        raise RuntimeError(
            f"The local tokenizer makes {len(tokenizer(system)['input_ids'])} tokens of the system prompt that "
            f"{type(pipe).__name__} cuts off as {cut}; the real one makes {cut}."
        )
    pipe.register_modules(tokenizer=tokenizer)
    if "processor" in pipe.config:
        pipe.register_modules(processor=make_processor(tokenizer, max_pixels=_MAX_PIXELS[scale]))


def photo(size: int) -> Image.Image:
    """A real photograph, cropped to a square: the portrait in Matplotlib's sample data."""
    from matplotlib import cbook

    picture = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    side = min(picture.size)
    return picture.crop((0, 0, side, side)).resize((size, size), Image.Resampling.LANCZOS)


def resolution(name: str, *, size: int | None = None, scale: str = "real") -> dict[str, int]:
    """`size` is the side of the square picture, or the number of lines (480, 720) of a 16:9 video of 81 frames."""
    size = size or _pick(scale, spec(name).size, spec(name).tiny_size)
    if spec(name).pipeline != "WanPipeline":
        return {"height": size, "width": size}
    width = {480: 832, 720: 1280}.get(size, size)
    return {"height": size, "width": width, "num_frames": _pick(scale, 81, 5)}


def size_label(name: str, *, size: int | None = None, scale: str = "real") -> str:
    shape = resolution(name, size=size, scale=scale)
    return "x".join(str(shape[key]) for key in ("width", "height", "num_frames") if key in shape)


def inputs(
    name: str,
    *,
    size: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    scale: str = "real",
    image: Image.Image | None = None,
) -> dict[str, Any]:
    """Arguments of one guided generation. Call it again for every generation: the generator inside is used up.

    `image` replaces the photograph that goes into an edit model.
    """
    model = spec(name)
    shape = resolution(name, size=size, scale=scale)
    call: dict[str, Any] = dict(
        num_inference_steps=steps or model.steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        **model.guidance,
        **shape,
    )
    if name.startswith("qwen"):
        call |= dict(prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT)
        if model.pipeline == "QwenImageEditPipeline":
            call["image"] = photo(shape["width"]) if image is None else image
        return call

    draw = torch.Generator("cpu").manual_seed(seed + 1)
    for key, dims in _embedding_shapes(name, scale).items():
        for prefix in ("", "negative_"):
            call[prefix + key] = torch.randn(1, *dims, generator=draw).to(device=device, dtype=dtype)
    return call


def _embedding_shapes(name: str, scale: str) -> dict[str, tuple[int, ...]]:
    """Shapes, without the batch, of what the text encoders produce."""
    config = denoiser_config(name, scale)
    match spec(name).pipeline:
        case "StableDiffusionPipeline":
            return {"prompt_embeds": (77, config["cross_attention_dim"])}
        case "StableDiffusionXLPipeline":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            return {"prompt_embeds": (77, config["cross_attention_dim"]), "pooled_prompt_embeds": (pooled,)}
        case "StableDiffusion3Pipeline":  # 77 CLIP tokens, then 256 T5 tokens
            return {
                "prompt_embeds": (333, config["joint_attention_dim"]),
                "pooled_prompt_embeds": (config["pooled_projection_dim"],),
            }
        case "FluxPipeline":
            return {
                "prompt_embeds": (512, config["joint_attention_dim"]),
                "pooled_prompt_embeds": (config["pooled_projection_dim"],),
            }
        case "WanPipeline":
            return {"prompt_embeds": (512, config.get("text_dim", 4096))}
        case other:
            raise ValueError(f"No embedding shapes are known for {other}.")
