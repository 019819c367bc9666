"""Stable Diffusion 1 and 2."""

from __future__ import annotations

from sweep.build import Case, image

NO_CHECKER = {"requires_safety_checker": False}

CASES = [
    Case("StableDiffusionPipeline", NO_CHECKER),
    Case("StableDiffusionImg2ImgPipeline", NO_CHECKER, {"image": image, "strength": 1.0}),
]
