"""Diffusers pipelines in their published geometry, with random weights made on the GPU in seconds.

    pipe = build_pipeline("qwen-image-edit")                      # 20 B denoiser, 7 B text encoder, VAE, on cuda
    picture = pipe(**inputs("qwen-image-edit", steps=20)).images

Speed does not depend on the values of the weights, and neither does the comparison of two ways to run them; quality
cannot be judged from these pictures. Configurations are those of the published checkpoints, in model_specs.py.
Qwen-Image and Qwen-Image-Edit are complete: a prompt (and a photo) go in, a picture comes out. So are the others with
`text_encoders=True`; without, they take random prompt embeddings of the shapes their text encoders produce.
`scale="tiny"` is the same pipeline, small enough for a CPU in seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from benchmarks import clip_t5_text, folder_models
from benchmarks.model_specs import SPECS, TEXT_REAL, TEXT_TINY, VISION_REAL, VISION_TINY, Spec
from benchmarks.qwen_text import make_processor, make_tokenizer, special_ids
from benchmarks.random_weights import build_random
from PIL import Image

PROMPT = "Turn the background into a snowy mountain landscape at sunset and keep the person unchanged"
NEGATIVE_PROMPT = "low quality, blurry"
# With the template, and a photo of 1024 x 1024 pixels, each makes an even number of tokens. Diffusers' Ulysses shares
# odd ones too (`ulysses_anything`), in twice the time.
_PROMPTS = {
    "QwenImagePipeline": (PROMPT, "low quality, very blurry"),
    "QwenImageEditPipeline": (PROMPT.replace("the person", "the whole person"), NEGATIVE_PROMPT),
}

_TEXT_KEY_GAIN = 4.0
_FIRST_SPECIAL_ID = {"real": 151643, "tiny": 2048}
_MAX_PIXELS = {"real": 12845056, "tiny": 56 * 56}


def find(name: str) -> str:
    """The model of that name, of that checkpoint's name, or in that folder. Raises ValueError if there is none."""
    named = next((key for key, known in SPECS.items() if name in (key, known.checkpoint)), None)
    if named is not None:
        return named
    if not folder_models.is_folder(name):
        raise ValueError(f"expected a folder with a model_index.json, or some of {','.join(SPECS)}, but got {name!r}")
    folder_models.spec(name)  # raises for one that cannot be compared
    return name


def argument(text: str) -> str:
    """An argparse type: what `find` takes."""
    try:
        return find(text)
    except (ValueError, OSError, AttributeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def spec(name: str) -> Spec:
    name = find(name)
    return SPECS[name] if name in SPECS else folder_models.spec(name)


def label(name: str, scale: str = "real") -> str:
    """What a row calls it."""
    if name not in SPECS:
        return Path(name).resolve().name
    return name if scale == "real" else f"{name} ({scale})"


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
    text = _pick(scale, TEXT_REAL, TEXT_TINY)
    config = Qwen2_5_VLConfig(
        text_config=text | {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]},
        vision_config=dict(_pick(scale, VISION_REAL, VISION_TINY)),
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
    # Joint attention with unit-scale logits spreads over all the image tokens, and two prompts then differ by 2 % in
    # the prediction: a generation that lost its guidance could pass for a right one. Attention that is sharp on
    # the text tokens makes it 35 % (60 layers, 2048 image tokens, prompts that differ in 20 of 340 tokens).
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
    text_encoders: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Any:
    """A pipeline as `from_pretrained(checkpoint, torch_dtype=dtype).to(device)` would give it, with random weights.

    `text_encoders` adds text encoders and tokenizers; the Qwen-Image models always have theirs. `log` receives one line
    per component, after its weights are in place.
    """
    model = spec(name)
    if name not in SPECS:
        return folder_models.load(name, device, dtype)

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
    elif text_encoders:
        for number, encoder in enumerate(model.text_encoders):
            suffix = f"_{number + 1}" if number else ""
            built = clip_t5_text.build_encoder(encoder, device=device, dtype=dtype, seed=seed + 2 + number, scale=scale)
            parts[f"text_encoder{suffix}"] = placed(f"text_encoder{suffix}", built)
            parts[f"tokenizer{suffix}"] = clip_t5_text.make_tokenizer(encoder, [PROMPT, NEGATIVE_PROMPT], scale=scale)
    pipeline_class = getattr(diffusers, model.pipeline)
    expected, _ = pipeline_class._get_signature_keys(pipeline_class)
    absent = {key: None for key in expected if key not in parts and key not in model.pipeline_kwargs}
    pipe = pipeline_class(**parts, **absent, **model.pipeline_kwargs)
    if name.startswith("qwen"):
        _add_tokenizer(pipe, scale)
    return pipe


def _add_tokenizer(pipe: Any, scale: str) -> None:
    template, cut = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
    tokenizer = make_tokenizer(
        [template.format(f"{PROMPT} {NEGATIVE_PROMPT}"), *_PROMPTS[type(pipe).__name__], PROMPT, NEGATIVE_PROMPT],
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
    try:
        from matplotlib import cbook
    except ImportError as error:
        raise ImportError("The photograph is part of Matplotlib: pip install matplotlib, or give an image.") from error
    picture = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    side = min(picture.size)
    return picture.crop((0, 0, side, side)).resize((size, size), Image.Resampling.LANCZOS)


def resolution(name: str, *, size: int | None = None, scale: str = "real") -> dict[str, int]:
    """`size` is the side of the square picture, or the number of lines (480, 720) of a 16:9 video of 81 frames."""
    if name not in SPECS:
        return {"height": size, "width": size} if size else {}  # else what the pipeline makes by itself
    size = size or _pick(scale, spec(name).size, spec(name).tiny_size)
    if spec(name).pipeline != "WanPipeline":
        return {"height": size, "width": size}
    width = {480: 832, 720: 1280}.get(size, size)
    return {"height": size, "width": width, "num_frames": _pick(scale, 81, 5)}


def size_label(name: str, *, size: int | None = None, scale: str = "real") -> str:
    shape = resolution(name, size=size, scale=scale)
    return "x".join(str(shape[key]) for key in ("width", "height", "num_frames") if key in shape) or "default"


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
    text_encoders: bool = False,
) -> dict[str, Any]:
    """Arguments of one guided generation. Call it again for every generation: the generator inside is used up.

    `image` replaces the photograph that goes into an edit model; `text_encoders` is what the pipeline was built with.
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
    if name not in SPECS:
        call |= {"prompt": PROMPT}
        call |= {"negative_prompt": NEGATIVE_PROMPT} if folder_models.takes(name, "negative_prompt") else {}
        if folder_models.takes_photograph(name):
            call["image"] = photo(size or 1024) if image is None else image
        return call
    if text_encoders or name.startswith("qwen"):
        call["prompt"], call["negative_prompt"] = _PROMPTS.get(model.pipeline, (PROMPT, NEGATIVE_PROMPT))
        if model.pipeline == "QwenImageEditPipeline":
            call["image"] = photo(shape["width"]) if image is None else image
        return call

    draw = torch.Generator("cpu").manual_seed(seed + 1)
    for key, dims in _embedding_shapes(name, scale).items():
        for prefix in ("", "negative_"):
            call[prefix + key] = torch.randn(1, *dims, generator=draw).to(device=device, dtype=dtype)
    return call


def guidance_off(name: str) -> dict[str, Any]:
    """Changes to `inputs(name)` that leave one call per step."""
    if name.startswith("qwen") or (name not in SPECS and "true_cfg_scale" in spec(name).guidance):
        return {"true_cfg_scale": 1.0, "negative_prompt": None}
    return {"true_cfg_scale" if "true_cfg_scale" in spec(name).guidance else "guidance_scale": 1.0}


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
