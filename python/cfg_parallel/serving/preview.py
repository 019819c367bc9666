"""The picture so far: latents of a step, decoded as the pipeline decodes its last ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image


def can_preview(pipe: Any) -> bool:
    """Whether the pipeline shows its latents, and has a VAE that makes pictures of them."""
    vae: Any = getattr(pipe, "vae", None)
    shows = "latents" in getattr(pipe, "_callback_tensor_inputs", ())
    # With this setting the pipeline changes the VAE's dtype to decode.
    upcasts = bool(getattr(getattr(vae, "config", None), "force_upcast", False)) and "float16" in str(vae.dtype)
    return shows and vae is not None and hasattr(pipe, "image_processor") and not upcasts


@contextmanager
def previews(pipe: Any, count: int, show: Callable[[int, list[Image.Image]], None]) -> Iterator[dict[str, Any]]:
    """Arguments for the pipeline's call, with which `show(index, pictures)` is called `count` times, evenly spread."""
    sizes: list[tuple[int, int]] = []
    prepare_latents = pipe.prepare_latents
    signature = inspect.signature(prepare_latents)

    def noting(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        if "height" in bound and "width" in bound:
            sizes.append((bound["height"], bound["width"]))
        return prepare_latents(*args, **kwargs)

    shown = 0

    def on_step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal shown
        if shown < count and step + 1 >= round(pipe.num_timesteps * (shown + 1) / (count + 1)):
            show(shown, decode(pipe, values["latents"], sizes[-1] if sizes else None))
            shown += 1
        return {}

    pipe.prepare_latents = noting
    try:
        yield {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": ["latents"]}
    finally:
        del pipe.prepare_latents


def decode(pipe: Any, latents: Any, size: tuple[int, int] | None) -> list[Image.Image]:
    """`size`: height and width of the picture, which packed latents do not know."""
    import torch

    with torch.no_grad():
        return _decode(pipe, latents, size)


def _decode(pipe: Any, latents: Any, size: tuple[int, int] | None) -> list[Image.Image]:
    import torch

    config = pipe.vae.config
    if latents.dim() == 3 and size is not None:
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    latents = latents.to(pipe.vae.dtype)
    if mean is not None and std is not None:
        shape = (1, -1, *[1] * (latents.dim() - 2))
        mean, std = (torch.tensor(each).view(shape).to(latents.device, latents.dtype) for each in (mean, std))
        latents = latents / (1.0 / std) + mean
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    pictures = pipe.vae.decode(latents, return_dict=False)[0]
    if pictures.dim() == 5:  # a video of one frame
        pictures = pictures[:, :, 0]
    shown: list[Image.Image] = pipe.image_processor.postprocess(pictures, output_type="pil")
    return shown
