"""What enabling changes, what it refuses, and that disabling leaves nothing behind."""

from __future__ import annotations

import copy
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import psutil
import pytest
import torch

import cfg_parallel
from cfg_parallel import ConfigurationError, disable_cfg_parallel, enable_cfg_parallel
from cfg_parallel.remote import RemoteFollower
from tiny import TINY, generate

QWEN = TINY["qwen_image"]
START = RemoteFollower.start
pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked")]


@pytest.fixture(scope="module")
def plain() -> Any:
    return QWEN.build()


@pytest.fixture
def pipe() -> Iterator[Any]:
    pipe = QWEN.build()
    yield pipe
    disable_cfg_parallel(pipe)


@pytest.fixture
def started(forked: None) -> Iterator[None]:
    """Followers as users have them."""
    with mock.patch.object(RemoteFollower, "start", staticmethod(START)):
        yield


def followers(handle: cfg_parallel.CfgParallel) -> list[psutil.Process]:
    return [psutil.Process(r.process.pid) for r in handle._leader.remotes if r.process is not None]


@pytest.mark.usefixtures("started")
def test_disable_leaves_nothing_behind(pipe: Any, plain: Any) -> None:
    generate(pipe, QWEN.inputs())  # sets attributes of its own
    before = (type(pipe), pipe.transformer, type(pipe.transformer), set(pipe.__dict__), set(pipe.transformer.__dict__))
    fds = psutil.Process().num_fds()
    handle = enable_cfg_parallel(pipe)
    (process,) = followers(handle)
    assert process.is_running()
    generate(pipe, QWEN.inputs())
    disable_cfg_parallel(pipe)
    assert not process.is_running()
    assert psutil.Process().num_fds() == fds
    after = (type(pipe), pipe.transformer, type(pipe.transformer), set(pipe.__dict__), set(pipe.transformer.__dict__))
    assert after[0] is before[0] and after[1] is before[1] and after[2] is before[2]
    assert after[3:] == before[3:]
    assert handle.report.steps == 3  # the report outlives the followers
    disable_cfg_parallel(pipe)
    assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))


def test_context_manager_and_shared_denoiser(pipe: Any, plain: Any) -> None:
    """Another pipeline object that holds the same denoiser is not touched."""
    other = diffusers.QwenImagePipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    expected = generate(plain, QWEN.inputs())
    with enable_cfg_parallel(pipe) as handle:
        assert type(other.transformer) is type(plain.transformer)
        assert torch.equal(generate(other, QWEN.inputs()), expected)
        with pytest.raises(ConfigurationError, match="no report"):
            _ = handle.report
        assert torch.equal(generate(pipe, QWEN.inputs()), expected)
        (process,) = followers(handle)
        assert isinstance(pipe, diffusers.QwenImagePipeline)
        assert isinstance(pipe.transformer, diffusers.QwenImageTransformer2DModel)
        assert type(pipe).__name__ == "QwenImagePipeline"
    assert not process.is_running()
    assert type(pipe) is diffusers.QwenImagePipeline


def test_what_users_do_with_an_enabled_pipeline(pipe: Any, tmp_path: Path) -> None:
    with enable_cfg_parallel(pipe):
        pipe.transformer.a_user_attribute = 1
        assert type(copy.deepcopy(pipe.transformer)) is diffusers.QwenImageTransformer2DModel
        pipe.transformer.save_pretrained(tmp_path)
        again = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path)
        assert torch.equal(next(again.parameters()), next(pipe.transformer.parameters()))
        # Calling the denoiser by hand, outside pipe(...), gives plain tensors.
        hidden = torch.randn(1, 4, pipe.transformer.config.in_channels)
        text = torch.randn(1, 5, pipe.transformer.config.joint_attention_dim)
        with torch.no_grad():
            out = pipe.transformer(
                hidden_states=hidden,
                timestep=torch.ones(1),
                encoder_hidden_states=text,
                encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.long),
                img_shapes=[[(1, 2, 2)]],
                return_dict=False,
            )[0]
        assert type(out) is torch.Tensor
    assert pipe.transformer.a_user_attribute == 1


def test_changed_weights_reach_the_follower(pipe: Any, plain: Any) -> None:
    changed = QWEN.build()
    with enable_cfg_parallel(pipe):
        first = generate(pipe, QWEN.inputs())
        for each in (pipe, changed):
            with torch.no_grad():
                each.transformer.img_in.weight.mul_(1.5)
        second = generate(pipe, QWEN.inputs())
        assert torch.equal(second, generate(changed, QWEN.inputs()))
        assert not torch.equal(first, second)
        pipe.transformer = plain.transformer  # another denoiser altogether
        assert torch.equal(generate(pipe, QWEN.inputs()), first)


def test_a_denoiser_whose_shipping_failed_is_shipped_again(pipe: Any, plain: Any) -> None:
    changed = QWEN.build()
    with torch.no_grad():
        changed.transformer.img_in.weight.mul_(1.5)
    expected = generate(changed, QWEN.inputs())
    with enable_cfg_parallel(pipe) as handle:
        assert not torch.equal(generate(pipe, QWEN.inputs()), expected)
        pipe.transformer = changed.transformer
        failing = mock.patch.object(RemoteFollower, "ship_denoiser", side_effect=ConfigurationError("on purpose"))
        with failing, pytest.raises(ConfigurationError, match="on purpose"):
            generate(pipe, QWEN.inputs())
        for _ in range(2):
            assert torch.equal(generate(pipe, QWEN.inputs()), expected)
        assert handle.report.parallel_steps == 3


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("when", ["before", "during"])
def test_killed_follower(pipe: Any, plain: Any, when: str) -> None:
    expected = generate(plain, QWEN.inputs())
    handle = enable_cfg_parallel(pipe)
    (process,) = followers(handle)

    def kill(*args: Any) -> dict[str, Any]:
        if process.is_running():
            os.kill(process.pid, signal.SIGKILL)
            process.wait(5)
        return {}

    if when == "before":
        generate(pipe, QWEN.inputs())
        kill()
    with pytest.warns(UserWarning, match=r"was lost.*A new one is started" if when == "before" else "was lost") as told:
        got = generate(pipe, QWEN.inputs(callback_on_step_end=kill) if when == "during" else QWEN.inputs())
    assert len(told) == 1
    assert torch.equal(got, expected)
    assert handle.wait_until_ready()
    assert torch.equal(generate(pipe, QWEN.inputs()), expected)
    assert handle.report.parallel_steps == 3  # a new follower took over
    assert followers(handle)[0].pid != process.pid


def test_error_on_the_follower_is_recomputed_here(pipe: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with enable_cfg_parallel(pipe) as handle:
        handle._leader.remotes[0].ship_denoiser("transformer", torch.nn.Linear(1, 1))  # a replica that cannot work
        with pytest.warns(UserWarning, match="are run on cpu"):
            got = generate(pipe, QWEN.inputs())
        assert torch.equal(got, generate(plain, QWEN.inputs()))


def test_threads_are_serialized(pipe: Any, plain: Any) -> None:
    results: dict[int, torch.Tensor] = {}
    with enable_cfg_parallel(pipe):

        def work(seed: int) -> None:
            results[seed] = pipe(**QWEN.inputs(seed), return_dict=False)[0]

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for seed in range(3):
        assert torch.equal(results[seed], generate(plain, QWEN.inputs(seed), seed))


def test_garbage_collected_pipeline_ends_its_follower() -> None:
    pipe = QWEN.build()
    process = followers(enable_cfg_parallel(pipe))[0]
    generate(pipe, QWEN.inputs())
    del pipe
    import gc

    gc.collect()
    assert not process.is_running()


def test_more_devices_than_branches(plain: Any) -> None:
    """Three processes for two branches, and three for InstructPix2Pix's three."""
    for name in ("qwen_image", "instruct_pix2pix"):
        from reference import reference

        tiny = TINY[name]
        pipe, one = tiny.build(), tiny.build()
        with enable_cfg_parallel(pipe, cfg_parallel_size=3, devices=["cpu"] * 3) as handle:
            assert torch.equal(generate(pipe, tiny.inputs()), reference(tiny, one, tiny.inputs()))
            assert handle.report.parallel_steps == handle.report.steps


def test_size_one_changes_nothing(pipe: Any, plain: Any) -> None:
    with enable_cfg_parallel(pipe, cfg_parallel_size=1) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))
        assert handle.report.calls_local == 6
        assert handle.report.calls_shipped == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cfg_parallel_size": 0}, "at least 1"),
        ({"cfg_parallel_size": 2.0}, "integer"),
        ({"cfg_parallel_size": True}, "integer"),
        ({"devices": ["cpu"]}, "needs 2 devices, but 1 were given"),
        ({"cfg_parallel_size": 3, "devices": ["cpu", "cpu"]}, "needs 3 devices"),
        ({"devices": ["cpu", "gpu7"]}, "Unknown device 'gpu7'"),
        ({"devices": ["cpu", "mps"]}, "Unsupported device 'mps'"),
        ({"devices": ["cpu", "cuda:9"]}, "no device cuda:9"),
        ({"transport": "carrier-pigeon"}, "Expected transport to be one of"),
        ({"transport": "peer"}, "needs GPUs"),
        ({"transport": "nccl"}, "needs GPUs"),
    ],
)
def test_misuse_names_the_fix(pipe: Any, kwargs: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteFollower, "start", _no_process)
    with pytest.raises(ConfigurationError, match=message) as caught:
        enable_cfg_parallel(pipe, **kwargs)
    assert "\n" not in str(caught.value)
    assert type(pipe) is diffusers.QwenImagePipeline


def _no_process(*args: Any) -> RemoteFollower:
    raise AssertionError("bad arguments must be refused before a process is started")


def test_one_gpu_visible(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cfg_parallel import discovery

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigurationError, match="needs 2 GPUs, but 1 is visible; check CUDA_VISIBLE_DEVICES"):
        discovery.choose_devices(torch.device("cuda", 0), 2, None, None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match="same GPU is named twice"):
        discovery.choose_devices(torch.device("cuda", 0), 2, ["cuda:0", "cuda:0"], None)
    with pytest.raises(ConfigurationError, match="first device to be the pipeline's own"):
        discovery.choose_devices(torch.device("cuda", 0), 2, ["cuda:1", "cuda:0"], None)
    with pytest.raises(ConfigurationError, match="GPUs only or CPUs only"):
        discovery.choose_devices(torch.device("cuda", 0), 2, ["cuda:0", "cpu"], None)
    assert discovery.choose_devices(torch.device("cuda", 1), 2, None, None) == [
        torch.device("cuda", 1),
        torch.device("cuda", 0),
    ]


def test_enabling_twice(pipe: Any) -> None:
    with enable_cfg_parallel(pipe), pytest.raises(ConfigurationError, match="enabled already"):
        enable_cfg_parallel(pipe)


def test_not_a_pipeline_and_no_denoiser(pipe: Any) -> None:
    with pytest.raises(ConfigurationError, match="Expected a diffusers pipeline, but got str"):
        enable_cfg_parallel("Qwen/Qwen-Image")

    class NoDenoiser:
        def __init__(self) -> None:
            self.components = {"vae": pipe.vae, "text_encoder": None}

    with pytest.raises(ConfigurationError, match="has no denoiser"):
        enable_cfg_parallel(NoDenoiser())


def test_offloaded_denoiser(pipe: Any) -> None:
    pipe.transformer.to("meta")
    with pytest.raises(ConfigurationError, match="enable_sequential_cpu_offload"):
        enable_cfg_parallel(pipe)


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("seconds", [0.0, 1.0], ids=["ended before the first message", "ended after it"])
def test_a_follower_that_cannot_start(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float
) -> None:
    executable = tmp_path / "python"
    executable.write_text(f"#!/bin/sh\nsleep {seconds}\necho no torch here >&2\nexit 1\n")
    executable.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(executable))
    if not seconds:
        invite = RemoteFollower.invite
        monkeypatch.setattr(RemoteFollower, "invite", lambda self, names: (self.process.wait(), invite(self, names)))
    children = len(psutil.Process().children())
    with pytest.raises(cfg_parallel.FollowerLostError, match=r"did not start.* no torch here"):
        enable_cfg_parallel(pipe)
    assert type(pipe) is diffusers.QwenImagePipeline
    assert len(psutil.Process().children()) == children


def test_disabled_pipeline_has_no_report(pipe: Any) -> None:
    with pytest.raises(ConfigurationError, match="not enabled"):
        cfg_parallel.last_report(pipe)


def test_pipeline_that_is_cast_or_moved(pipe: Any) -> None:
    with enable_cfg_parallel(pipe):
        generate(pipe, QWEN.inputs())
        pipe.to(torch.bfloat16)
        expected = generate(QWEN.build().to(torch.bfloat16), QWEN.inputs())
        assert torch.equal(generate(pipe, QWEN.inputs()), expected)
        pipe.transformer.to("meta")
        with pytest.raises(ConfigurationError, match="offloaded one by one"):
            generate(pipe, QWEN.inputs())


def test_two_pipelines_at_once_in_two_threads() -> None:
    pipes = [QWEN.build(), TINY["sd15"].build()]
    tinies = [QWEN, TINY["sd15"]]
    results: list[list[torch.Tensor]] = [[], []]
    with enable_cfg_parallel(pipes[0]), enable_cfg_parallel(pipes[1]):
        first = [pipe(**tiny.inputs(), return_dict=False)[0] for pipe, tiny in zip(pipes, tinies, strict=True)]

        def work(i: int) -> None:
            for _ in range(4):
                results[i].append(pipes[i](**tinies[i].inputs(), return_dict=False)[0])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for i in range(2):
        assert len(results[i]) == 4
        assert all(torch.equal(result, first[i]) for result in results[i])


def test_interrupted_while_waiting_for_the_follower(pipe: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C half-way through a message must not let the next generation read the other half."""
    from cfg_parallel.link import Link

    with enable_cfg_parallel(pipe):
        generate(pipe, QWEN.inputs())

        def interrupt(*args: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Link, "pull", interrupt)
            generate(pipe, QWEN.inputs())
        with pytest.warns(UserWarning, match="A new one is started"):
            got = generate(pipe, QWEN.inputs())
        assert torch.equal(got, generate(plain, QWEN.inputs()))


class MixRows:
    """An attention processor in which the rows of a batch see each other, as StyleAligned's do."""

    def __init__(self, inner: Any, scale: float = 0.0) -> None:
        self.inner, self.scale = inner, scale

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(attn, hidden_states, *args, **kwargs)
        return out + self.scale * out.mean(0, keepdim=True)


def mix_rows(unet: Any, scale: float) -> None:
    unet.set_attn_processor({name: MixRows(inner, scale) for name, inner in unet.attn_processors.items()})


def test_a_split_that_was_learned_is_checked_again_when_the_model_changes() -> None:
    tiny = TINY["sd15"]
    pipe, plain = tiny.build(), tiny.build()
    with enable_cfg_parallel(pipe) as handle:
        generate(pipe, tiny.inputs())
        assert handle.report.parallel_steps == handle.report.steps
        for each in (pipe, plain):
            mix_rows(each.unet, 1.0)
        got = generate(pipe, tiny.inputs())
        assert torch.equal(got, generate(plain, tiny.inputs()))  # as one batch: its rows are not independent
        report = handle.report
        assert report.parallel_steps == 0 and report.guided_steps == report.steps
        assert "cannot be computed apart" in report.why


def test_a_callback_that_changes_an_attention_processor(pipe: Any, plain: Any) -> None:
    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            for processor in pipe.transformer.attn_processors.values():
                processor.scale = 0.5
        return {}

    class Scaled:
        def __init__(self, inner: Any) -> None:
            self.inner, self.scale = inner, 1.0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(out * self.scale for out in self.inner(*args, **kwargs))

    one = QWEN.build()
    for each in (pipe, one):
        for block in each.transformer.transformer_blocks:
            block.attn.processor = Scaled(block.attn.processor)
    inputs = {"num_inference_steps": 4, "callback_on_step_end": on_step}
    expected = generate(one, QWEN.inputs(**inputs))
    with enable_cfg_parallel(pipe):
        assert torch.equal(generate(pipe, QWEN.inputs(**inputs)), expected)


def test_report_inside_a_generation(pipe: Any) -> None:
    with enable_cfg_parallel(pipe) as handle:

        def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            with pytest.raises(ConfigurationError, match="during a generation"):
                _ = handle.report
            return {}

        generate(pipe, QWEN.inputs(callback_on_step_end=on_step))
        assert handle.report.steps == 3


@pytest.mark.usefixtures("started")
def test_replacement_that_does_not_come_up(pipe: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a new follower starts: the next one is tried at once."""
    with enable_cfg_parallel(pipe) as handle:
        (process,) = followers(handle)
        process.kill()
        process.wait(5)

        def interrupt(*args: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt):
            patch.setattr(RemoteFollower, "greet", interrupt)
            handle.wait_until_ready()
        assert handle.wait_until_ready()
        assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))
        assert handle.report.parallel_steps == 3


class Store:
    """As LEdits++ has it: maps of every forward, which the pipeline looks into between the steps."""

    def __init__(self) -> None:
        self.maps: dict[str, list[torch.Tensor]] = {"down": []}

    def __call__(self, value: torch.Tensor) -> None:
        self.maps["down"].append(value.detach().clone())


class StoringProcessor:
    def __init__(self, plain: Any, store: Store) -> None:
        self.plain, self.store = plain, store

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.store(hidden_states)
        return self.plain(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize("name", ["sd15", "qwen_image"])
def test_what_forwards_leave_in_a_store_is_complete(name: str) -> None:
    tiny = TINY[name]
    plain, enabled = tiny.build(), tiny.build()
    stores = []
    for each in (plain, enabled):
        denoiser = getattr(each, tiny.denoiser)
        stores.append(Store())
        attention = next(sub for sub in denoiser.modules() if hasattr(sub, "set_processor"))
        attention.set_processor(StoringProcessor(attention.processor, stores[-1]))
    expected = generate(plain, tiny.inputs())
    with warnings.catch_warnings(record=True) as caught, enable_cfg_parallel(enabled) as handle:
        warnings.simplefilter("always")
        assert torch.equal(generate(enabled, tiny.inputs()), expected)
        assert handle.report.calls_shipped == 0 and "leaves something behind" in handle.report.why
    assert "leaves something behind" in "".join(str(each.message) for each in caught)
    a, b = (store.maps["down"] for store in stores)
    assert len(a) == len(b) > 0 and all(map(torch.equal, a, b))
