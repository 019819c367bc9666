"""Two GPUs give what one GPU gives, bit for bit, over each transport."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import cfg_parallel
from cfg_parallel.compiling import compile_denoiser
from cfg_parallel.launch import finish_compiling
from reference import reference
from scripts import PREAMBLE, kill_a_leader, torchrun
from tiny import TINY, generate

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.timeout(240)]


_CASES = [(name, torch.bfloat16, "peer") for name in TINY]
_CASES += [(name, torch.float32, "peer") for name in ("qwen_image", "wan", "sdxl", "instruct_pix2pix")]
_CASES += [(name, torch.bfloat16, "nccl") for name in TINY]
_CASES += [(name, torch.float32, "nccl") for name in ("qwen_image", "sdxl", "instruct_pix2pix")]
_CASES += [(name, torch.bfloat16, "host") for name in ("qwen_image_edit", "sd15")]


@pytest.mark.parametrize(("name", "dtype", "transport"), _CASES)
def test_equals_one_gpu(name: str, dtype: torch.dtype, transport: str) -> None:
    tiny = TINY[name]
    plain = tiny.build().to("cuda:0", dtype)
    enabled = tiny.build().to("cuda:0", dtype)
    with cfg_parallel.enable_cfg_parallel(enabled, transport=transport, follower_timeout=60) as handle:
        for seed in range(2):
            got = generate(enabled, tiny.inputs(seed), seed)
            assert torch.equal(got, reference(tiny, plain, tiny.inputs(seed), seed=seed))
            report = handle.report
            assert report.transport == transport
            assert report.parallel_steps == report.steps >= 3


@pytest.mark.parametrize("name", ["qwen_image", "flux", "wan", "sdxl", "sd3", "instruct_pix2pix"])
def test_every_step_is_fused_once_its_kind_was_checked(name: str) -> None:
    tiny = TINY[name]
    plain, enabled = (tiny.build().to("cuda", torch.bfloat16) for _ in range(2))
    with cfg_parallel.enable_cfg_parallel(enabled, transport="peer", follower_timeout=60) as handle:
        for seed in range(5):
            inputs = tiny.inputs(seed, num_inference_steps=6)
            expected = reference(tiny, plain, tiny.inputs(seed, num_inference_steps=6), seed=seed)
            assert torch.equal(generate(enabled, inputs, seed), expected)
            # Those that are compared, those that store what UniPC asked for later, those that wait for the prediction.
            finish_compiling()
    report = handle.report
    assert sum(report.fused.values()) == report.steps
    assert all(what.endswith("(cuda)") for what in report.fused)
    assert not report.replayed


@pytest.mark.parametrize("name", ["qwen_image", "flux", "wan", "sdxl", "sd3", "instruct_pix2pix"])
@pytest.mark.parametrize("transport", ["peer", "nccl"])
def test_cuda_graphs_on_both_sides(name: str, transport: str) -> None:
    tiny = TINY[name]
    plain, enabled = (tiny.build().to("cuda", torch.bfloat16) for _ in range(2))
    with cfg_parallel.enable_cfg_parallel(
        enabled, transport=transport, cuda_graphs=True, follower_timeout=60
    ) as handle:
        for seed in range(3):
            inputs = tiny.inputs(seed, num_inference_steps=6)
            expected = reference(tiny, plain, tiny.inputs(seed, num_inference_steps=6), seed=seed)
            assert torch.equal(generate(enabled, inputs, seed), expected)
    report = handle.report
    assert report.graph_forwards == report.calls_shipped + report.calls_local, report


def test_new_weights_are_in_the_next_graph() -> None:
    tiny = TINY["qwen_image"]
    plain, enabled = (tiny.build().to("cuda", torch.bfloat16) for _ in range(2))
    with cfg_parallel.enable_cfg_parallel(enabled, cuda_graphs=True) as handle:
        for pipe in (enabled, enabled, plain):
            generate(pipe, tiny.inputs(num_inference_steps=6))
        assert handle.report.graph_forwards > 0
        for pipe in (enabled, plain):
            with torch.no_grad():
                pipe.transformer.proj_out.weight.mul_(1.5)
        expected = reference(tiny, plain, tiny.inputs(num_inference_steps=6))
        assert torch.equal(generate(enabled, tiny.inputs(num_inference_steps=6)), expected)


def test_auto_takes_peer_access() -> None:
    pipe = TINY["qwen_image"].build().to("cuda")
    with cfg_parallel.enable_cfg_parallel(pipe) as handle:
        generate(pipe, TINY["qwen_image"].inputs())
        assert handle.report.transport == "peer"
        assert handle.report.devices == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize("transport", ["peer", "nccl", "host"])
def test_follower_killed_during_a_generation_costs_no_image(transport: str) -> None:
    tiny = TINY["qwen_image"]
    plain, enabled = tiny.build().to("cuda"), tiny.build().to("cuda")
    expected = generate(plain, tiny.inputs())
    with cfg_parallel.enable_cfg_parallel(enabled, transport=transport, follower_timeout=20) as handle:
        generate(enabled, tiny.inputs())
        process = handle._leader.remotes[0].process
        assert process is not None

        def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                os.kill(process.pid, signal.SIGKILL)
                time.sleep(0.5)
            return {}

        start = time.monotonic()
        with pytest.warns(UserWarning, match="was lost"):
            got = generate(enabled, tiny.inputs(callback_on_step_end=on_step))
        assert torch.equal(got, expected)
        assert time.monotonic() - start < 30
        assert handle.wait_until_ready()
        assert torch.equal(generate(enabled, tiny.inputs()), expected)  # with a new follower
        assert handle.report.calls_shipped > 0


def test_leader_on_the_second_gpu() -> None:
    tiny = TINY["qwen_image"]
    plain, enabled = tiny.build().to("cuda:1"), tiny.build().to("cuda:1")
    with cfg_parallel.enable_cfg_parallel(enabled) as handle:
        assert torch.equal(generate(enabled, tiny.inputs()), generate(plain, tiny.inputs()))
        assert handle.report.devices == ["cuda:1", "cuda:0"]


def test_latents_overwritten_while_they_are_sent() -> None:
    """Arguments are sent on a stream of their own: what the pipeline writes into them afterwards must not travel."""
    tiny = TINY["instruct_pix2pix"]
    plain, enabled = tiny.build().to("cuda"), tiny.build().to("cuda")

    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs["latents"].mul_(0.5)
        return kwargs

    with cfg_parallel.enable_cfg_parallel(enabled):
        for _ in range(5):
            got = generate(enabled, tiny.inputs(callback_on_step_end=on_step))
            assert torch.equal(got, reference(tiny, plain, tiny.inputs(callback_on_step_end=on_step)))


def test_killed_leader_leaves_no_follower() -> None:
    kill_a_leader("cuda")


def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        PREAMBLE
        + f"""
rank = int(os.environ["RANK"])
pipe.to(f"cuda:{{rank}}")
expected = generate(pipe, tiny.inputs()).cpu()
with cfg_parallel.enable_cfg_parallel(pipe) as handle:
    for _ in range(2):
        assert torch.equal(generate(pipe, tiny.inputs()).cpu(), expected)
    if rank == 0:
        assert handle.report.transport == "peer" and handle.report.parallel_steps == 3, handle.report
open({str(tmp_path)!r} + f"/done{{rank}}", "w").close()
"""
    )
    result = torchrun(script)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


@pytest.mark.parametrize("name", ["qwen_image", "sd15"])
def test_compiled_with_graphs_on_both_sides(name: str) -> None:
    """The bits are those of the compiled denoiser on one GPU, one branch after the other."""
    tiny = TINY[name]
    pipe = tiny.build().to("cuda:0")
    inputs = partial(tiny.inputs, num_inference_steps=8)
    plain = reference(tiny, pipe, inputs())
    options: Any = {"dynamic": False}  # else one GPU takes two prompts for one of variable length
    with cfg_parallel.enable_cfg_parallel(pipe, compile=True, compile_options=options, cuda_graphs=True) as handle:
        got = [generate(pipe, inputs()) for _ in range(3)]
        report = handle.report
        assert report.graph_forwards == 2 * report.steps and not report.eager_forwards, report
        assert report.compile_seconds == report.follower_compile_seconds == 0, report
    assert all(torch.equal(got[0], each) for each in got)
    assert torch.allclose(got[0].float(), plain.float(), rtol=0.05, atol=0.05)
    compile_denoiser(tiny.denoiser, getattr(pipe, tiny.denoiser), True, options)
    assert torch.equal(got[0], reference(tiny, pipe, inputs()))
