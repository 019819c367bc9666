"""A tiny but real Qwen-Image-Edit, made here instead of downloaded, and the photograph it edits.

Everything is the published pipeline's: its classes, its latent layout, its scheduler configuration, its prompt
template. Only the sizes are tiny and the weights are random, so the picture is noise-like and shows mechanics, not
quality. The pipeline works on about a megapixel whatever the model, so the denoiser attends over 8400 image tokens
and is most of a step.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfg_parallel.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import ProcessorMixin, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

# Part of the cache folder's name: raise it when the files that build_demo_model writes change.
FORMAT_VERSION = 1

PROMPT = "turn the photograph into a watercolour painting"
NEGATIVE_PROMPT = "low quality, blurry"

# https://huggingface.co/Qwen/Qwen-Image-Edit, scheduler/scheduler_config.json
_SCHEDULER_CONFIG: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}

# Qwen2's special tokens that the pipeline's prompt template and the processor need, in Qwen2's order.
_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Byte-level BPE merges, the most frequent pairs of the prompt template first ("\u0120" is the byte-level space).
_MERGES = (
    ("\u0120", "t"), ("h", "e"), ("\u0120", "a"), ("i", "n"), ("r", "e"), ("\u0120t", "he"), ("e", "r"), ("o", "n"),
    ("o", "r"), ("\u0120", "i"), ("a", "t"), ("i", "t"), ("\u0120", "o"), ("e", "s"), ("e", "n"), ("a", "g"),
    ("m", "ag"), ("\u0120i", "mag"), ("\u0120imag", "e"), ("o", "u"), ("t", "e"), ("\u0120", "s"), ("in", "g"),
    ("\u0120", "c"), ("i", "on"), ("t", "ion"),
)  # fmt: skip


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cfg-parallel/demo-<format version>`; `~/.cache` when the variable is unset or not absolute
    (as the XDG specification says). Without torchvision the model's processor is another class, hence another
    folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "cfg-parallel" / (f"demo-{FORMAT_VERSION}" + ("" if _has_torchvision() else "-no-torchvision"))


def is_complete(folder: Path) -> bool:
    """True if every component that `folder/model_index.json` names is there. An interrupted build never looks
    complete, because the folder is renamed into place; this catches files that were deleted later (a cache cleaner)."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    weights = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    components = [name for name in index if not name.startswith("_")]
    return (
        set(weights) <= set(components)
        and all((folder / name).is_dir() and any((folder / name).iterdir()) for name in components)
        and all((folder / name / f"{stem}.safetensors").is_file() for name, stem in weights.items())
    )


def ensure_demo_model(folder: Path | None = None) -> Path:
    """The demo model in `folder` (default: the cache folder), built first if it is absent or incomplete."""
    folder = cache_folder() if folder is None else folder
    return folder if is_complete(folder) else build_demo_model(folder)


def build_demo_model(folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write a tiny `QwenImageEditPipeline` with random weights to `folder` with `save_pretrained`, and return `folder`.

    The weights depend on `seed` alone; the global random state is left as it was. The files are written beside
    `folder` and renamed, so that no reader sees half of them. Replaces a demo model that is there (complete or not);
    a folder with anything else in it is refused.
    """
    import torch
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageEditPipeline,
        QwenImageTransformer2DModel,
    )

    target = Path(folder)
    _refuse_foreign(target)
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # in_channels, out_channels and patch_size are the published ones (16 latent channels in 2x2 patches).
        transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        )
        # Three down-samplings give the published factor of 8; the 16 latent channels keep the published statistics.
        vae = AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=0)
        text_encoder = _text_encoder(tokenizer)
    _make_sensitive(transformer, vae)
    pipe: Any = QwenImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**_SCHEDULER_CONFIG),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        processor=_processor(tokenizer),
        transformer=transformer,
    )

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        built, old = Path(scratch) / "built", Path(scratch) / "old"
        pipe.save_pretrained(built)
        if target.exists():
            target.rename(old)
        try:
            built.rename(target)
        except OSError:
            # Another process put its own there between the two renames; the seed is the same, so either will do.
            if not is_complete(target):
                raise
    return target


def _make_sensitive(transformer: Any, vae: Any) -> None:
    """Make the pixels depend on the prompts. As PyTorch initialises it, 8400 image tokens drown 290 text tokens, the
    two predictions differ by 4e-4 of their size and the decoder shows mostly its biases: 99.8 % of the pixels are
    the same with and without guidance, so comparing two pictures would prove little. With this, 15 %.
    """
    import torch

    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.attn.norm_added_k.weight.mul_(4)  # sharp attention to text: logits with a deviation of 4 instead of 1
        for name, parameter in vae.decoder.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        vae.decoder.conv_out.weight.mul_(3)  # pixels with a deviation of about 0.5 in [-1, 1]


def _refuse_foreign(target: Path) -> None:
    """Never replace a folder that this module did not write: `--model-dir ~` must not cost anybody their files."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"{target} is a file; name a folder for the demo model.")
    known = {"model_index.json", "processor", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    foreign = sorted(entry.name for entry in target.iterdir() if entry.name not in known)
    if foreign:
        raise ConfigurationError(
            f"{target} holds other files ({foreign[0]}); name a new or an empty folder for the demo model."
        )


def _tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE over all 256 bytes: every text round-trips, most words take a few tokens."""
    from transformers import AddedToken, Qwen2Tokenizer

    merges: Any = list(_MERGES)  # annotated as list[str], but it is given to tokenizers, which takes pairs
    symbols = [*sorted(_byte_symbols()), *("".join(pair) for pair in _MERGES)]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)},
        merges=merges,
        # Read by a processor that asks the tokenizer which token stands for an image; see _processor.
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        model_max_length=8192,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    return tokenizer


def _byte_symbols() -> list[str]:
    """The 256 printable characters that stand for the bytes in GPT-2's byte-level alphabet."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 8192,
            "bos_token_id": None,
            "eos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            # 16 dimensions a head: 2 + 3 + 3 frequency pairs for time, height and width.
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
            "rope_theta": 1000000.0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def _processor(tokenizer: Qwen2Tokenizer) -> ProcessorMixin:
    """What turns the photograph and the prompt into the text encoder's input.

    `Qwen2VLProcessor` holds a video processor, which transformers 5 has for torchvision only, so without torchvision
    it can be neither made nor loaded. `PaddleOCRVLProcessor` is the same processor for images alone: it, too, puts
    one image token for each 2x2 group of patches. diffusers says on loading that it expected the other class.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # At most 64 image tokens (256x256 pixels): the text encoder is not what the demo shows.
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 256 * 256}
    image_processor = Qwen2VLImageProcessorPil(size=pixels)
    if not _has_torchvision():
        from transformers import PaddleOCRVLProcessor

        return PaddleOCRVLProcessor(image_processor=image_processor, tokenizer=tokenizer)
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor

    return Qwen2VLProcessor(
        image_processor=image_processor, tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(size=pixels)
    )


def demo_photo() -> Path:
    """The photograph of Grace Hopper (512x600, public domain) that comes with Matplotlib."""
    # Not matplotlib.cbook.get_sample_data: importing matplotlib costs a second and may build a font cache.
    spec = importlib.util.find_spec("matplotlib")
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    for location in locations:
        photo = Path(location) / "mpl-data" / "sample_data" / "grace_hopper.jpg"
        if photo.is_file():
            return photo
    found = "has no mpl-data/sample_data/grace_hopper.jpg" if locations else "is not installed"
    raise ConfigurationError(
        f"the demo's photograph comes with matplotlib, which {found}: `pip install --force-reinstall matplotlib`, or "
        "use `cfg-parallel edit --image` with a picture of your own."
    )
