"""Two processes give what one device gives, bit for bit: real pipelines, tiny models, CPU."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

import cfg_parallel
from forked import forked_followers
from reference import reference
from tiny import STOCHASTIC_SCHEDULERS, TINY, Tiny, generate, with_scheduler

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked")]


class Pair:
    """The same tiny pipeline twice: plain, and on two processes."""

    def __init__(self, name: str) -> None:
        self.tiny: Tiny = TINY[name]
        self.plain = self.tiny.build()
        self.enabled = self.tiny.build()
        self.handle = cfg_parallel.enable_cfg_parallel(self.enabled, follower_timeout=60)

    def check(self, seed: int = 0, **inputs: Any) -> cfg_parallel.Report:
        """Both give the same bits for these inputs. `on_step` makes a callback for a pipeline."""
        on_step = inputs.pop("on_step", None)

        def run(pipe: Any, how: Any) -> Any:
            kwargs = self.tiny.inputs(seed, **inputs)
            if on_step is not None:
                kwargs["callback_on_step_end"] = on_step
            return how(pipe, kwargs)

        expected = run(self.plain, lambda pipe, kwargs: reference(self.tiny, pipe, kwargs, seed=seed))
        got = run(self.enabled, lambda pipe, kwargs: generate(pipe, kwargs, seed))
        assert type(got) is torch.Tensor
        assert expected.abs().max() > 0
        assert torch.equal(got, expected)
        return self.handle.report


@pytest.fixture(scope="module", params=["qwen_image", "sd15", "instruct_pix2pix"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """One cheap pipeline of each pattern."""
    with forked_followers():
        pair = Pair(request.param)
    yield pair
    pair.handle.disable()


@pytest.mark.parametrize("name", TINY)
def test_equals_one_device(name: str) -> None:
    pair = Pair(name)
    with pair.handle:
        for seed in range(2):
            report = pair.check(seed)
            assert report.guided_steps == report.parallel_steps == report.steps >= 3
            # All but the last branch of each step; a generation that has yet to learn runs its first call here.
            shipped = report.steps * (pair.tiny.num_branches - 1)
            assert report.calls_shipped == shipped
            assert report.bytes_from_followers > 0
            assert f"in {report.steps} of {report.steps} steps the passes ran on 2 devices" in report.why
        report = pair.check(2, size=pair.tiny.other_size)
        assert report.parallel_steps == report.steps


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("images", [1, 2])
def test_batches(pair: Pair, batch: int, images: int) -> None:
    report = pair.check(batch=batch, num_images_per_prompt=images)
    assert report.parallel_steps == report.steps


def test_guidance_off_warns_and_runs_here(pair: Pair) -> None:
    with pytest.warns(UserWarning, match="guidance was off in"):
        report = pair.check(**{pair.tiny.scale_kwarg: 1.0})
    assert report.guided_steps == 0
    assert report.calls_shipped <= 1  # the first step cannot know
    assert "guidance was off in" in report.why


def test_guidance_on_and_off_with_equal_shapes(pair: Pair) -> None:
    """Two images without guidance look like one image with it: a wrong guess must not show in the bits."""
    off = {pair.tiny.scale_kwarg: 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # guidance is off on purpose
        for _ in range(2):
            pair.check(batch=2, **off)
            pair.check(batch=1)
            pair.check(batch=1, num_images_per_prompt=2, **off)


def test_negative_prompt_longer_than_prompt(pair: Pair) -> None:
    pair.check(prompt="cat", negative_prompt="a very long list of things that nobody wants to see in a picture")


def test_callback_that_edits_latents(pair: Pair) -> None:
    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"latents": kwargs["latents"] * 0.5 + 0.1}

    pair.check(on_step=on_step)


def test_callback_that_edits_latents_in_place(pair: Pair) -> None:
    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs["latents"][:, :1].mul_(0.5)
        return kwargs

    pair.check(on_step=on_step)


def test_callback_that_reads_latents(pair: Pair) -> None:
    seen: list[float] = []

    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(kwargs["latents"].float().abs().sum().item())
        return {}

    report = pair.check(on_step=on_step)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert report.parallel_steps == report.steps


def test_interrupt(pair: Pair) -> None:
    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return {}

    report = pair.check(on_step=on_step, num_inference_steps=5)
    if hasattr(pair.plain, "interrupt"):  # InstructPix2Pix cannot be interrupted, by anyone
        assert report.steps < 5
    pair.check()


def test_callback_that_raises_leaves_it_usable(pair: Pair) -> None:
    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("from the user's callback")

    with pytest.raises(KeyError, match="from the user's callback"):
        pair.enabled(**pair.tiny.inputs(callback_on_step_end=on_step))
    pair.check(3)


def test_scale_that_changes_under_way(pair: Pair) -> None:
    """Guidance on, then off for the last steps, as diffusers' cut-off callbacks do."""
    attribute = "_" + pair.tiny.scale_kwarg

    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1 and pair.tiny.pattern == "B":
            setattr(pipe, attribute, 2.0)
        return {}

    pair.check(on_step=on_step, num_inference_steps=4)


@pytest.mark.parametrize("pair", ["sd15", "instruct_pix2pix"], indirect=True)  # qwen_image is a flow-matching model
@pytest.mark.parametrize("scheduler", [*sorted(STOCHASTIC_SCHEDULERS - {"flow_euler_stochastic"}), "unipc", "dpm++2m"])
def test_noise_prediction_schedulers(pair: Pair, scheduler: str) -> None:
    original = pair.plain.scheduler
    try:
        extra = with_scheduler(pair.plain, scheduler)
        with_scheduler(pair.enabled, scheduler)
        pair.check(**extra)
    finally:
        pair.plain.scheduler = pair.enabled.scheduler = original


def test_stochastic_flow_matching() -> None:
    pair = Pair("qwen_image")
    with pair.handle:
        with_scheduler(pair.plain, "flow_euler_stochastic")
        with_scheduler(pair.enabled, "flow_euler_stochastic")
        pair.check()


def test_twenty_generations_grow_nothing(pair: Pair) -> None:
    leader = psutil.Process()
    follower = pair.handle._leader.remotes[0].process
    assert follower is not None
    processes = [leader, psutil.Process(follower.pid)]

    def measure() -> list[tuple[int, int, int]]:
        gc.collect()
        return [(p.memory_info().rss, p.num_fds(), len(p.children())) for p in processes]

    for seed in range(5):  # allocator pools and caches fill
        generate(pair.enabled, pair.tiny.inputs(seed))
    before = measure()
    for seed in range(20):
        generate(pair.enabled, pair.tiny.inputs(seed))
    for (rss, fds, children), (rss_then, fds_then, children_then) in zip(measure(), before, strict=True):
        assert rss - rss_then < 4 << 20
        assert (fds, children) == (fds_then, children_then)


def test_weights_mapped_from_a_file() -> None:
    """Their addresses are no multiple of 16, and MKL sums in another order there: the follower's must begin alike."""
    pair = Pair("qwen_image")
    pair.handle.disable()
    for pipe in (pair.plain, pair.enabled):
        for name, parameter in pipe.transformer.named_parameters():
            memory = torch.empty(parameter.numel() + 32)
            start = (8 - memory.data_ptr() % 64) % 64 // 4
            parameter.data = memory[start : start + parameter.numel()].view(parameter.shape).copy_(parameter.data)
            assert parameter.data_ptr() % 64 == 8, name
    with cfg_parallel.enable_cfg_parallel(pair.enabled) as pair.handle:
        for seed in range(2):
            pair.check(seed)
