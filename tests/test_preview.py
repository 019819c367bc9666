"""The picture so far: after the last step it is the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from cfg_parallel.serving.preview import can_preview, decode, previews
from tiny import TINY


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_edit", "flux", "sd15", "sdxl", "sd3"])
def test_the_last_one_is_the_picture(name: str) -> None:
    tiny = TINY[name]
    pipe: Any = tiny.build()
    if not can_preview(pipe):
        pytest.fail(f"{name} shows no latents")
    shown: list[tuple[int, list[Image.Image]]] = []
    prepare = pipe.prepare_latents
    with previews(pipe, 3, lambda index, pictures: shown.append((index, pictures))) as call:
        final = pipe(**tiny.inputs(num_inference_steps=4, output_type="pil") | call).images
    assert [index for index, _ in shown] == [0, 1, 2] and pipe.prepare_latents == prepare
    distances = [np.abs(np.asarray(each[0], float) - np.asarray(final[0], float)).mean() for _, each in shown]
    assert distances[2] < distances[0]

    latents: list[Any] = []

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"])
        return {}

    size = tiny.size if tiny.takes_size else None
    pipe(**tiny.inputs(num_inference_steps=4, output_type="pil", callback_on_step_end=keep))
    np.testing.assert_array_equal(np.asarray(decode(pipe, latents[-1], size)[0]), np.asarray(final[0]))
