"""A picture that goes in with both prompts is looked at once in a generation, and the result is the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import cfg_parallel
from cfg_parallel.vision import pictures_seen_once

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import models

pytestmark = pytest.mark.usefixtures("forked")


class Encoder(torch.nn.Module):
    """A text encoder that sees, as transformers names its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.eval()

    def get_image_features(self, pixels: torch.Tensor, **options: Any) -> dict[str, Any]:
        self.asked += 1
        return {"features": pixels * 2, "parts": (pixels[:1], pixels[1:]), "layers": options.get("layers")}


class Processor:
    tokenizer = None

    def __init__(self) -> None:
        self.image_processor = self
        self.asked = 0

    def preprocess(self, image: Image.Image) -> dict[str, torch.Tensor]:
        self.asked += 1
        return {"pixels": torch.from_numpy(np.array(image))}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("small_photographs")
def test_an_edit_looks_at_its_photograph_once() -> None:
    def build() -> Any:
        pipe = models.build_pipeline("qwen-image-edit", device="cpu", dtype=torch.float32, scale="tiny")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generate(pipe: Any, **changes: Any) -> torch.Tensor:
        call = models.inputs("qwen-image-edit", steps=2, device="cpu", dtype=torch.float32, scale="tiny")
        return torch.from_numpy(pipe(**(call | changes)).images)

    plain, pipe = build(), build()
    visual = pipe.text_encoder.model.visual
    photo = models.photo(64)
    with (
        cfg_parallel.enable_cfg_parallel(pipe, devices=["cpu", "cpu"]),
        mock.patch.object(visual, "forward", wraps=visual.forward) as seen,
    ):
        assert torch.equal(generate(pipe, image=photo), generate(plain, image=photo))
        assert seen.call_count == 1
        generate(pipe, image=photo)
        assert seen.call_count == 2  # nothing is kept from one generation to the next
    for owner in (pipe.text_encoder, pipe.text_encoder.model, pipe.processor.image_processor):
        assert not {"get_image_features", "preprocess"} & owner.__dict__.keys()


def test_only_the_same_is_remembered() -> None:
    encoder = Encoder()
    pixels = torch.arange(6.0).reshape(2, 3)
    with pictures_seen_once([encoder, None, "other"]):
        first = encoder.get_image_features(pixels, layers=2)
        again = encoder.get_image_features(pixels.clone(), layers=2)
        assert encoder.asked == 1
        assert torch.equal(first["features"], again["features"]) and type(again["parts"]) is tuple
        for other in (pixels + 1, pixels.double(), pixels[:1], pixels * -0.0):
            encoder.get_image_features(other, layers=2)
        encoder.get_image_features(pixels * 0.0, layers=2)  # equal to one of them but for the sign
        encoder.get_image_features(pixels, layers=3)
        encoder.get_image_features(pixels)
        assert encoder.asked == 8
    encoder.get_image_features(pixels)
    assert encoder.asked == 9


def test_what_is_changed_afterwards_changes_nothing_that_is_remembered() -> None:
    encoder = Encoder()
    pixels = torch.ones(2, 3)
    with pictures_seen_once([encoder]):
        first = encoder.get_image_features(pixels)
        first["features"].zero_()
        second = encoder.get_image_features(pixels)
        second["features"].zero_()
        assert torch.equal(encoder.get_image_features(pixels)["features"], torch.full((2, 3), 2.0))
        assert encoder.asked == 1
        pixels.add_(1)
        assert torch.equal(encoder.get_image_features(pixels)["features"], torch.full((2, 3), 4.0))
        assert encoder.asked == 2


def test_gradients_training_and_unknown_arguments_ask_again() -> None:
    encoder = Encoder()
    pixels = torch.ones(2, 3)
    with pictures_seen_once([encoder]):
        with torch.enable_grad():
            for _ in range(2):
                encoder.get_image_features(pixels)
        assert encoder.asked == 2
        for _ in range(2):
            encoder.get_image_features(pixels, layers=object())
        assert encoder.asked == 4
        encoder.train()
        for _ in range(2):
            encoder.get_image_features(pixels)
        assert encoder.asked == 6


def test_a_configuration_that_names_a_processor_is_none() -> None:
    class Config(dict[str, Any]):
        tokenizer = image_processor = ("transformers", "Qwen2VLImageProcessor")

    with pictures_seen_once([Config(), {"tokenizer": None}]):
        pass


def test_a_processor_and_what_the_user_has_put_there() -> None:
    processor = Processor()
    own = mock.Mock(side_effect=processor.preprocess)
    processor.preprocess = own  # type: ignore[method-assign]
    image = Image.new("RGB", (4, 4), "red")
    with pictures_seen_once([processor]):
        for _ in range(2):
            assert processor.preprocess(image)["pixels"].sum() == 255 * 16
        image.putpixel((0, 0), (0, 0, 0))
        assert processor.preprocess(image)["pixels"].sum() == 255 * 15
    assert own.call_count == 2
    assert processor.preprocess is own
