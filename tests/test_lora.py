"""LoRAs on a live pipeline: every way to load, weigh, fuse and drop them reaches the followers before the next step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cfg_parallel
from reference import reference
from tiny import TINY, generate

peft = pytest.importorskip("peft", reason="LoRAs need peft")
pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked")]

MODULES = {"to_q", "to_k", "to_v", "to_out.0"}


def save_lora(name: str, folder: Path, seed: int) -> Path:
    """A LoRA with random weights, as a user would have it on disk."""
    tiny = TINY[name]
    pipe = tiny.build()
    denoiser = getattr(pipe, tiny.denoiser)
    denoiser.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=sorted(MODULES)), adapter_name="default")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, weight in denoiser.named_parameters():
            if "lora_" in path:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    layers = peft.get_peft_model_state_dict(denoiser)
    pipe.save_lora_weights(folder / str(seed), **{f"{tiny.denoiser}_lora_layers": layers})
    return folder / str(seed)


# Each is done to the enabled pipeline and to a plain one, in this order.
CHANGES: list[tuple[str, Callable[[Any, Path, Path], Any]]] = [
    ("load", lambda pipe, a, b: pipe.load_lora_weights(a, adapter_name="a")),
    ("weigh", lambda pipe, a, b: pipe.set_adapters("a", 0.4)),
    ("load another", lambda pipe, a, b: pipe.load_lora_weights(b, adapter_name="b")),
    ("mix", lambda pipe, a, b: pipe.set_adapters(["a", "b"], [0.7, -0.3])),
    ("turn off", lambda pipe, a, b: pipe.disable_lora()),
    ("turn on", lambda pipe, a, b: pipe.enable_lora()),
    ("fuse", lambda pipe, a, b: pipe.fuse_lora(adapter_names=["a"], lora_scale=0.9)),
    ("unfuse", lambda pipe, a, b: pipe.unfuse_lora()),
    ("delete", lambda pipe, a, b: pipe.delete_adapters("b")),
    ("unload", lambda pipe, a, b: pipe.unload_lora_weights()),
]


@pytest.mark.parametrize("name", ["qwen_image", "sdxl"])
def test_loras_of_a_live_pipeline(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    a, b = (save_lora(name, tmp_path, seed) for seed in (1, 2))
    plain, enabled = tiny.build(), tiny.build()
    with cfg_parallel.enable_cfg_parallel(enabled, devices=["cpu", "cpu"]) as handle:
        before = generate(enabled, tiny.inputs())
        for what, change in CHANGES:
            for pipe in (enabled, plain):
                change(pipe, a, b)
            got = generate(enabled, tiny.inputs())
            assert torch.equal(got, reference(tiny, plain, tiny.inputs())), what
            assert not torch.equal(got, before), what  # the change is one
            assert handle.report.parallel_steps == handle.report.steps, what
            before = got
