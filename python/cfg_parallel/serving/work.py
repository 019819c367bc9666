"""What goes between the server and the process of a replica. Pickled: both ends are ours.

To the process: ("work", Work), ("cancel", id). From it:

    ("ready", Facts)                          the model is loaded
    ("unusable", message)                     it cannot be, and the process ends
    ("step", id, step, steps, one_device)     a denoising step is done; of the run on one device, to compare with
    ("partial", id, index, [Picture])         the picture so far
    ("done", id, [Picture], metrics)
    ("failed", id, reason, message)           reason: "cancelled", "refused" (the request's fault) or "error"
    ("followers", [(device, lost)], restarts) when that has changed; lost: why, or None
    ("warning", text)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Work:
    """A generation. `prompt` and `params` are those of `Omni.generate`; `partial_images`: how many to show on the way;
    `compare`: run one device as well."""

    id: str
    prompt: dict[str, Any]
    params: dict[str, Any]
    partial_images: int = 0
    compare: bool = False


@dataclass(frozen=True)
class Facts:
    """What a request has to know of the pipeline. `scales`: the guidance scales that it takes."""

    pipeline: str
    takes_image: bool
    needs_image: bool
    several_images: bool
    takes_mask: bool
    takes_negative_prompt: bool
    scales: tuple[str, ...]
    partial_images: bool
    takes_size: bool = True  # else a result is as large as the picture that is sent
    default_steps: int | None = None


@dataclass(frozen=True)
class Picture:
    """8-bit pixels, row by row."""

    mode: str
    size: tuple[int, int]  # width, height
    pixels: bytes

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        return cls(image.mode, image.size, image.tobytes())

    def image(self) -> Image.Image:
        from PIL import Image

        return Image.frombytes(self.mode, self.size, self.pixels)
