"""For `cfg-parallel serve small_models:build`: the pipeline in the folder SMALL_MODEL, where an edit model makes a
photograph about 32 x 32 pixels, and not a megapixel."""

from __future__ import annotations

import os
from typing import Any

import diffusers

from tiny_models import small_images

_small = small_images()  # for as long as the process lasts


def build(device: str) -> Any:
    _small.__enter__()
    return diffusers.DiffusionPipeline.from_pretrained(os.environ["SMALL_MODEL"])
