"""Caches of a denoiser (`enable_cache`): the image of one device with the same cache, on two.

Each cache is one that skips: its image is not the image without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend

import cfg_parallel
import tiny_models
from cfg_parallel.caches import Cache
from cfg_parallel.calls import Call, Denoiser
from cfg_parallel.changes import fingerprint
from cfg_parallel.remote import RemoteCall, RemoteCallError
from forked import forked_followers
from tiny import TINY, generate, randomize

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked")]

STEPS = 6
CPUS = ["cpu", "cpu"]
SKIPS = 0.6  # a threshold at which the loop's first block cache skips some steps


def first_block(threshold: float = 0.9) -> FirstBlockCacheConfig:
    return FirstBlockCacheConfig(threshold=threshold)


def mag() -> MagCacheConfig:
    return MagCacheConfig(10.0, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS)


def taylor() -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32)


def broadcast(timestep: Callable[[], float]) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(2, None, None, (-1, 1001), current_timestep_callback=timestep)


# Whole pipelines.


def test_caches_of_a_live_pipeline() -> None:
    tiny = TINY["qwen_image"]
    plain, pipe = tiny.build(), tiny.build()

    def one_device(config: Any) -> torch.Tensor:
        if config is not None:
            plain.transformer.enable_cache(config)
        image = generate(plain, tiny.inputs(num_inference_steps=STEPS))
        if config is not None:
            plain.transformer.disable_cache()
        return image

    def check(config: Any) -> torch.Tensor:
        image = generate(pipe, tiny.inputs(num_inference_steps=STEPS))
        assert torch.equal(image, one_device(config)), config
        assert handle.report.parallel_steps == STEPS, handle.report
        return image

    with cfg_parallel.enable_cfg_parallel(pipe, devices=CPUS) as handle:
        pipe.transformer.enable_cache(mag())
        images = [check(mag())]
        pipe.transformer.disable_cache()
        images.append(check(None))
        for config in (taylor(), first_block(), first_block(1e9)):
            pipe.transformer.enable_cache(config)
            images.append(check(config))
            pipe.transformer.disable_cache()
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def ltx() -> Any:
    torch.manual_seed(0)
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=tiny_models.t5_text_encoder(),
        tokenizer=tiny_models.t5_tokenizer(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=3,
            caption_channels=32,
        ),
    )
    pipe.text_encoder.eval()
    randomize(pipe.transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_batch_is_not_split() -> None:
    inputs = {
        "prompt": tiny_models.PROMPTS[0],
        "negative_prompt": tiny_models.NEGATIVE_PROMPTS[0],
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": STEPS,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    plain, pipe = ltx(), ltx()
    without = generate(plain, inputs)
    plain.transformer.enable_cache(first_block())
    expected = generate(plain, inputs)
    assert not torch.equal(expected, without)
    with cfg_parallel.enable_cfg_parallel(pipe, devices=CPUS) as handle:
        generate(pipe, inputs)
        assert handle.report.parallel_steps == STEPS  # a split that was learned
        pipe.transformer.enable_cache(first_block())
        for _ in range(2):
            assert torch.equal(generate(pipe, inputs), expected)
            report = handle.report
            assert (report.calls_shipped, report.calls_local, report.guided_steps) == (0, STEPS, STEPS)
            assert "FirstBlockCache keeps one state for all passes" in report.why


# A pipeline in which anything can happen between two steps.


class Loop(diffusers.DiffusionPipeline):
    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(
        self,
        contexts: Sequence[str | None] = ("cond", "uncond"),
        guided: range = range(STEPS),
        callback: Callable[[Any, int], Any] | None = None,
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randn(1, 4, 32, generator=generator) for _ in contexts]
        x = torch.randn(1, 16, 1, 4, 4, generator=generator)
        for step in range(STEPS):
            timestep = torch.tensor([1000.0 - 150 * step])
            outputs = []
            for context, prompt in zip(contexts, prompts, strict=True):
                if context in ("uncond", None) and outputs and step not in guided:
                    continue
                with self.transformer.cache_context(context) if context else nullcontext():
                    outputs.append(self.transformer(x, timestep, prompt, return_dict=False)[0])
            x = x - 0.2 * (outputs[0] + sum(0.5 * (outputs[0] - other) for other in outputs[1:]))
            if callback is not None:
                callback(self, step)
        self.maybe_free_model_hooks()
        return x


def loop(config: Any = None) -> Loop:
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    randomize(transformer.eval())
    if config is not None:
        transformer.enable_cache(config)
    return Loop(transformer)


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[Loop, Any]]:
    """Enabled with its cache."""
    pipe = loop(first_block(SKIPS))
    with forked_followers(), cfg_parallel.enable_cfg_parallel(pipe, devices=CPUS) as handle:
        yield pipe, handle


@pytest.fixture(scope="module")
def plain() -> Loop:
    return loop(first_block(SKIPS))


@contextmanager
def other_cache(*pipes: Loop, make: Callable[[], Any]) -> Iterator[None]:
    for pipe in pipes:
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(make())
    yield
    for pipe in pipes:
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(first_block(SKIPS))


@pytest.mark.parametrize("guided", [range(STEPS), range(3), range(2, STEPS), range(0)])
def test_a_branch_stays_on_its_device(live: tuple[Loop, Any], plain: Loop, guided: range) -> None:
    """Guidance that is switched off or on under way; two branches are expected from the first step on."""
    pipe, handle = live
    expected = plain(guided=guided)
    assert not torch.equal(expected, loop()(guided=guided))
    assert torch.equal(pipe(guided=guided), expected)
    report = handle.report
    assert (report.calls_shipped, report.calls_local) == (STEPS, len(guided))
    assert report.parallel_steps == len(guided)


def test_more_branches_than_devices(live: tuple[Loop, Any], plain: Loop) -> None:
    pipe, handle = live
    for _ in range(2):
        assert torch.equal(pipe(contexts=("a", "b", "c")), plain(contexts=("a", "b", "c")))
        assert handle.report.parallel_steps == STEPS


def test_a_generation_that_failed_leaves_no_state(live: tuple[Loop, Any], plain: Loop) -> None:
    pipe, _ = live

    def fail(pipe: Any, step: int) -> None:
        if step == 3:
            raise RuntimeError("on purpose")

    with other_cache(pipe, plain, make=mag):
        with pytest.raises(RuntimeError, match="on purpose"):
            pipe(callback=fail)
        assert torch.equal(pipe(), plain())


def reset(pipe: Any, step: int) -> None:
    if step == 2:
        pipe.transformer._reset_stateful_cache()


@torch.no_grad()
def scale(pipe: Any, step: int) -> None:
    if step in (2, 3):
        pipe.transformer.proj_out.weight.mul_(1.5 if step == 2 else 1 / 1.5)


def disable(pipe: Any, step: int) -> None:
    if step == 2:
        pipe.transformer.disable_cache()
    if step == STEPS - 1:
        pipe.transformer.enable_cache(first_block(SKIPS))


def another(pipe: Any, step: int) -> None:
    if step in (2, STEPS - 1):
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(first_block(1e9 if step == 2 else SKIPS))


@pytest.mark.parametrize("callback", [reset, scale, disable, another])
def test_what_a_callback_does(live: tuple[Loop, Any], plain: Loop, callback: Any) -> None:
    pipe, handle = live
    expected = plain(callback=callback)
    assert not torch.equal(expected, plain())
    assert torch.equal(pipe(callback=callback), expected)
    assert handle.report.parallel_steps == STEPS
    assert torch.equal(pipe(), plain())


def test_a_callback_that_enables_a_cache(live: tuple[Loop, Any], plain: Loop) -> None:
    def enable(pipe: Any, step: int) -> None:
        if step == 2:
            pipe.transformer.enable_cache(first_block(SKIPS))

    pipe, handle = live
    images = []
    for each in (pipe, plain):
        each.transformer.disable_cache()
        images.append(each(callback=enable))
    assert torch.equal(*images)
    assert handle.report.parallel_steps == STEPS


def kill(pipe: Any) -> None:
    (remote,) = type(pipe)._cfg_parallel._leader.remotes
    remote.process.kill()
    remote.process.wait(5)


def test_a_follower_that_is_lost_with_its_state(live: tuple[Loop, Any], plain: Loop) -> None:
    pipe, handle = live
    with pytest.warns(UserWarning, match=r"cache of the branch 'cond' is there.*begins again on cpu") as told:
        got = pipe(callback=lambda pipe, step: kill(pipe) if step == 2 else None)
    assert len(told) == 1
    assert torch.equal(got, plain())
    assert handle.wait_until_ready()
    assert torch.equal(pipe(), plain())
    assert handle.report.parallel_steps == STEPS


def test_a_follower_that_is_lost_before_it_has_a_state(
    live: tuple[Loop, Any], plain: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, handle = live
    begin = handle._leader.begin
    monkeypatch.setattr(handle._leader, "begin", lambda alone: (begin(alone), kill(pipe)))
    with pytest.warns(UserWarning, match="are run on cpu"):
        assert torch.equal(pipe(), plain())
    assert handle.report.calls_local == 2 * STEPS
    monkeypatch.undo()
    assert handle.wait_until_ready()
    assert torch.equal(pipe(), plain())
    assert handle.report.parallel_steps == STEPS


def test_a_last_prediction_that_is_lost(live: tuple[Loop, Any], plain: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for when the pipeline has emptied its caches already."""
    pipe, _ = live

    def fail(call: RemoteCall) -> Any:
        raise RemoteCallError("out of memory")

    with pytest.warns(UserWarning, match=r"out of memory The cache of the branch 'cond' is there"):
        got = pipe(
            callback=lambda pipe, step: monkeypatch.setattr(RemoteCall, "wait", fail) if step == STEPS - 1 else None
        )
    assert torch.equal(got, plain())
    monkeypatch.undo()
    assert torch.equal(pipe(), plain())


def test_gradients_under_way(live: tuple[Loop, Any], plain: Loop) -> None:
    pipe, _ = live

    def with_gradients(pipe: Any, step: int) -> None:
        torch.set_grad_enabled(step == 2)

    with pytest.warns(UserWarning, match=r"Gradients are enabled.*'cond'.*begins again"):
        got = pipe(callback=with_gradients)
    assert torch.equal(got.detach(), plain(callback=with_gradients).detach())

    def begin_with_gradients(pipe: Any, step: int) -> None:
        pipe.transformer._reset_stateful_cache()
        torch.set_grad_enabled(step == 1)

    assert torch.equal(pipe(callback=begin_with_gradients).detach(), plain(callback=begin_with_gradients).detach())


def test_passes_without_a_context(live: tuple[Loop, Any], plain: Loop) -> None:
    """On one device they share a state (MagCache) or are refused (first block cache)."""
    pipe, handle = live
    with other_cache(pipe, plain, make=mag):
        expected = plain(contexts=(None, None))
        assert not torch.equal(expected, plain())
        assert torch.equal(pipe(contexts=(None, None)), expected)
        assert handle.report.calls_shipped == 0
        assert "MagCache keeps one state for all passes" in handle.report.why
        assert torch.equal(pipe(), plain())
        assert handle.report.parallel_steps == STEPS


def test_a_cache_without_contexts(live: tuple[Loop, Any], plain: Loop) -> None:
    """Pyramid attention broadcast: on one device a pass goes on with what the other has left. Its callback names the
    pipeline, which cannot travel."""
    pipe, handle = live
    with other_cache(pipe, plain, make=lambda: broadcast(lambda: 500 if pipe else 0)):
        expected = plain()
        assert not torch.equal(expected, loop()())
        assert torch.equal(pipe(), expected)
        assert handle.report.calls_shipped == 0
        assert "PyramidAttentionBroadcast keeps one state for all passes" in handle.report.why
        assert "disable_cache()" in handle.report.why


def test_a_call_that_is_run_again_in_another_context() -> None:
    transformer = loop(first_block()).transformer
    inputs = torch.ones(1, 16, 1, 4, 4), torch.ones(1), torch.ones(1, 4, 32)
    denoiser = Denoiser("transformer", transformer, ("uncond", {}))
    call = Call(denoiser, inputs, {}, ("cond", {}), None)
    with torch.no_grad(), transformer.cache_context("uncond"):
        expected = transformer(*inputs).sample
        assert torch.equal(call.run(torch.device("cpu")).sample, expected)
        torch.testing.assert_close(transformer(*inputs).sample, expected)  # from the cache, so rounded otherwise


# What has a cache, and which.


def test_kinds_of_caches() -> None:
    transformer = loop().transformer
    assert Cache.of(transformer) is None
    for config, name, by_context in (
        (first_block(), "FirstBlockCache", True),
        (mag(), "MagCache", True),
        (broadcast(lambda: 1), "PyramidAttentionBroadcast", False),
    ):
        transformer.enable_cache(config)
        cache = Cache.of(transformer)
        assert cache is not None and (cache.name, cache.by_context) == (name, by_context)
        assert cache == Cache.of(transformer)
        transformer.disable_cache()
        assert Cache.of(transformer) is None


def test_fingerprint_of_a_cache() -> None:
    transformer = loop().transformer
    seen = [fingerprint(transformer)]
    for config in (first_block(0.1), first_block(0.2), mag()):
        transformer.enable_cache(config)
        assert fingerprint(transformer) not in seen
        seen.append(fingerprint(transformer))
        transformer.disable_cache()
    transformer.enable_cache(first_block(0.1))
    before = fingerprint(transformer)
    with transformer.cache_context("cond"), torch.no_grad():
        for _ in range(2):
            transformer(torch.ones(1, 16, 1, 4, 4), torch.ones(1), torch.ones(1, 4, 32))
            assert fingerprint(transformer) == before  # its state is no setting


# The attention backend.


class Doubles:
    """Shows which attention backend is active where it runs."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._attention_backend = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        active = _AttentionBackendRegistry.get_active_backend()[0].value
        return self.inner(*args, **kwargs) * (2 if active == "_native_math" else 1)


def test_the_attention_backend_reaches_the_follower(live: tuple[Loop, Any], plain: Loop) -> None:
    pipe, handle = live
    for each in (plain, pipe):
        processor = each.transformer.blocks[0].attn1.processor
        each.transformer.blocks[0].attn1.set_processor(Doubles(processor))
    native = plain()
    before = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        assert torch.equal(pipe(), native)
        with attention_backend("_native_math"):
            expected = plain()
            assert not torch.equal(expected, native)
            assert torch.equal(pipe(), expected)
        assert torch.equal(pipe(), native)
        for each in (plain, pipe):
            each.transformer.set_attention_backend("_native_math")
        assert torch.equal(pipe(), plain())
        assert not torch.equal(pipe(), native)
        assert handle.report.parallel_steps == STEPS
    finally:
        _AttentionBackendRegistry.set_active_backend(before)
