"""The demo model is a real model in the real format, made the same way each time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file

from cfg_parallel import demo
from cfg_parallel.errors import ConfigurationError
from helpers_demo import demo_model

_WEIGHTS = (
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.fixture(scope="module")
def pipe() -> diffusers.DiffusionPipeline:
    return diffusers.DiffusionPipeline.from_pretrained(demo_model())


def test_it_loads_with_from_pretrained_as_the_published_classes(pipe: diffusers.DiffusionPipeline) -> None:
    assert type(pipe) is diffusers.QwenImageEditPipeline
    assert type(pipe.transformer) is diffusers.QwenImageTransformer2DModel
    assert type(pipe.vae) is diffusers.AutoencoderKLQwenImage
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(pipe.text_encoder) is transformers.Qwen2_5_VLForConditionalGeneration
    assert type(pipe.tokenizer) is transformers.Qwen2Tokenizer
    assert isinstance(pipe.processor, transformers.ProcessorMixin)


def test_model_index_names_classes_that_exist() -> None:
    index = json.loads((demo_model() / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImageEditPipeline"
    components = {name: entry for name, entry in index.items() if not name.startswith("_")}
    assert set(components) == {"processor", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    for library, name in components.values():
        assert hasattr({"diffusers": diffusers, "transformers": transformers}[library], name), name


def test_the_latent_layout_and_the_schedule_are_the_published_ones(pipe: diffusers.DiffusionPipeline) -> None:
    assert (pipe.transformer.config.in_channels, pipe.transformer.config.out_channels) == (64, 16)
    assert (pipe.vae_scale_factor, pipe.latent_channels) == (8, 16)
    assert pipe.scheduler.config.shift_terminal == 0.02
    assert pipe.scheduler.config.use_dynamic_shifting


@pytest.mark.parametrize(
    "text", ["turn this cat into a dog", "d\u00e9j\u00e0 vu \u732b \U0001f600", " two  spaces\n\ttab "]
)
def test_the_tokenizer_round_trips_any_text(pipe: diffusers.DiffusionPipeline, text: str) -> None:
    ids = pipe.tokenizer(text).input_ids
    assert pipe.tokenizer.decode(ids) == text
    assert len(ids) <= len(text.encode())
    assert pipe.processor.tokenizer(text).input_ids == ids


def test_a_special_token_is_one_token(pipe: diffusers.DiffusionPipeline) -> None:
    for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"):
        assert pipe.tokenizer(token).input_ids == [pipe.tokenizer.convert_tokens_to_ids(token)]
    assert pipe.text_encoder.config.image_token_id == pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_the_processor_gives_one_image_token_for_each_group_of_patches(pipe: diffusers.DiffusionPipeline) -> None:
    from PIL import Image

    with Image.open(demo.demo_photo()) as photo:
        inputs = pipe.processor(text=["<|image_pad|> hello"], images=photo.convert("RGB"), return_tensors="pt")
    patches = int(inputs["image_grid_thw"].prod())
    assert inputs["pixel_values"].shape[0] == patches
    assert int((inputs["input_ids"] == pipe.text_encoder.config.image_token_id).sum()) == patches // 4


def test_the_prompts_reach_the_prediction(pipe: diffusers.DiffusionPipeline) -> None:
    """Otherwise guidance would change nothing, and comparing two pictures would show nothing."""
    torch.manual_seed(0)
    latents = torch.randn(1, 64, 64)
    predictions = []
    with torch.no_grad():
        for prompt in (demo.PROMPT, demo.NEGATIVE_PROMPT):
            ids = pipe.tokenizer(prompt, return_tensors="pt").input_ids
            embeds = pipe.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            predictions.append(
                pipe.transformer(
                    hidden_states=latents,
                    timestep=torch.tensor([0.5]),
                    encoder_hidden_states=embeds,
                    encoder_hidden_states_mask=None,
                    img_shapes=[[(1, 8, 8)]],
                    return_dict=False,
                )[0]
            )
    cond, uncond = predictions
    assert (cond - uncond).std() > 0.02 * cond.std()


def test_the_build_depends_on_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = demo.build_demo_model(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state was left as it was"
    other = demo.build_demo_model(tmp_path / "other", seed=1)
    for name in _WEIGHTS:
        first, second, third = (load_file(folder / name) for folder in (demo_model(), again, other))
        assert first.keys() == second.keys() == third.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not all(torch.equal(first[key], third[key]) for key in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"], "nothing temporary is left"


def test_an_incomplete_model_is_rebuilt_and_a_complete_one_is_kept(tmp_path: Path) -> None:
    folder = demo.ensure_demo_model(tmp_path / "model")
    stamp = (folder / "model_index.json").stat().st_mtime_ns
    assert demo.ensure_demo_model(folder) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == stamp
    (folder / _WEIGHTS[0]).unlink()
    assert not demo.is_complete(folder)
    demo.ensure_demo_model(folder)
    assert demo.is_complete(folder)


def test_an_interrupted_build_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, folder: Path) -> None:
        Path(folder).mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(diffusers.QwenImageEditPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.build_demo_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigurationError, match=r"thesis\.tex"):
        demo.build_demo_model(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_cache_folder_follows_the_xdg_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_folder().parent == tmp_path / "cfg-parallel"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/ignored")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert demo.cache_folder().parent == tmp_path / ".cache" / "cfg-parallel"
    assert demo.cache_folder().name.startswith(f"demo-{demo.FORMAT_VERSION}")


def test_the_photograph_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from cfg_parallel.images import load_image

    assert load_image(demo.demo_photo()).size == (512, 600)
    assert "matplotlib.pyplot" not in sys.modules
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(ConfigurationError, match="pip install"):
        demo.demo_photo()
