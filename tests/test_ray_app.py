"""A Ray Serve application: each replica is a group with the server's API, and its pictures are the offline engine's."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from cfg_parallel import ConfigurationError, DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from cfg_parallel.serving.settings import Settings
from helpers_demo import demo_model, save_photo

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
httpx = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")

from cfg_parallel.ray_app import _Arguments, build  # noqa: E402

pytestmark = pytest.mark.timeout(300)

SEEDS = range(8)
EDIT: dict[str, Any] = {
    "negative_prompt": "low quality",
    "true_cfg_scale": 4.0,
    "num_inference_steps": 3,
    "height": 32,
    "width": 32,
}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, r"model: Field required\. build takes model, cfg_parallel_size, replicas, devices, .*log_prompts\."),
        ({"model": "m", "port": "80"}, r"Unknown parameter: 'port'\. build takes model, .*log_prompts\."),
        ({"model": "m", "replicas": "0"}, "replicas: .*greater than or equal to 1, but got '0'"),
        ({"model": "m", "max_queue": "many"}, "max_queue: .*valid integer.*'many'"),
        ({"model": "m", "num_cpus": "nan"}, "num_cpus: .*finite number.*'nan'"),
        ({"model": "m", "dtype": "int8"}, "dtype: .*'auto', 'bfloat16', 'float16' or 'float32', but got 'int8'"),
        ({"model": "m", "log_prompts": "maybe"}, "log_prompts: .*valid boolean.*'maybe'"),
        (
            {"model": "m", "devices": "cpu,cpu", "cfg_parallel_size": 3},
            "devices: expected cpu,cpu,cpu or .*cpu,cpu",
        ),
        ({"model": "m", "devices": "cpu,tpu"}, "devices: expected cpu,cpu or cuda:0,cuda:1, .*cpu,tpu"),
        ({"model": "m", "devices": "cuda:2,cuda:3"}, "devices: expected cpu,cpu or cuda:0,cuda:1, .*cuda:2,cuda:3"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        build(args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "gpus"),
    [({}, 2), ({"cfg_parallel_size": "3"}, 3), ({"devices": "cpu, cpu"}, 0), ({"devices": ["cuda:1", "cuda:0"]}, 2)],
)
def test_ray_is_asked_for_the_gpus_of_one_group(args: dict[str, Any], gpus: int) -> None:
    app = build({"model": "m", "replicas": "4", "num_cpus": "0.5", "max_queue": "7"} | args)
    deployment = app._bound_deployment
    assert deployment.num_replicas == 4
    assert deployment.ray_actor_options == {"num_cpus": 0.5, "num_gpus": gpus}
    assert deployment.max_ongoing_requests > 8


def test_settings_are_those_of_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFG_PARALLEL_API_KEY", "of the environment")
    given = {"model": "m", "replicas": "3", "dtype": "float32", "served_model_name": "n", "max_queue": "0"}
    given |= {"max_request_mb": "0.5", "log_prompts": "true", "compile": "auto", "cuda_graphs": "on"}
    settings = _Arguments.model_validate(given).settings()
    enable = {"transport": "auto", "cuda_graphs": True, "compile": True}
    assert settings == Settings(
        "m",
        ("cuda:0", "cuda:1"),
        dtype="float32",
        enable=tuple(enable.items()),
        served_model_name="n",
        api_key="of the environment",
        max_queue=0,
        max_request_mb=0.5,
        log_prompts=True,
    )


def test_pictures_of_two_groups_are_those_of_the_offline_engine(tmp_path: Path) -> None:
    photo, model = save_photo(tmp_path / "photo.png"), str(demo_model())
    arguments = {"model": model, "devices": "cpu,cpu", "replicas": "2", "served_model_name": "tiny"}
    with _cluster() as (url, processes):
        serve.run(build(arguments))  # returns when both have loaded the model
        assert len(_running(processes(), "cfg_parallel.serving.worker")) == 2

        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=120)

        def edited(seed: int) -> np.ndarray:
            with photo.open("rb") as file:
                answer = client.images.edit(image=file, prompt="a cat", model="tiny", extra_body=EDIT | {"seed": seed})
            return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))

        with ThreadPoolExecutor(4) as pool:
            served = list(pool.map(edited, SEEDS))

        # Of the one that answers: had it made all or none, the other would have made none or all.
        made = re.search(r"^cfg_parallel_images_total (\d+)", httpx.get(f"{url}/metrics").text, re.MULTILINE)
        assert made is not None and 0 < int(made[1]) < len(SEEDS)

        health = httpx.get(f"{url}/health")
        assert health.status_code == 200 and health.json()["status"] == "ok"
        assert health.json()["replicas"][0]["devices"] == ["cpu", "cpu"]
        assert len(health.headers.get_list("x-request-id")) == 1

        with photo.open("rb") as file, pytest.raises(openai.BadRequestError) as refused:
            client.images.edit(image=file, prompt="a cat", model="tiny", extra_body={"steps": 3})
        assert refused.value.status_code == 400
        assert refused.value.body["type"] == "invalid_request_error"
        assert (refused.value.body["param"], refused.value.body["code"]) == ("steps", "unknown_parameter")

        serve.shutdown()
        ray.shutdown()
        _, left = psutil.wait_procs(_running(processes(), "cfg_parallel"), timeout=15)
        assert not left

    negative, numbers = EDIT["negative_prompt"], {name: EDIT[name] for name in EDIT if name != "negative_prompt"}
    prompt = {"prompt": "a cat", "negative_prompt": negative, "multi_modal_data": {"image": Image.open(photo)}}
    one = DiffusionParallelConfig(cfg_parallel_size=1)
    with Omni(model, parallel_config=one, devices=["cpu"]) as engine:
        engine.pipe.set_progress_bar_config(disable=True)
        for seed, picture in zip(SEEDS, served, strict=True):
            (output,) = engine.generate(prompt, OmniDiffusionSamplingParams(**numbers, seed=seed))
            assert np.array_equal(np.asarray(output.images[0]), picture), seed
    assert len({picture.tobytes() for picture in served}) == len(SEEDS)


@contextlib.contextmanager
def _cluster() -> Iterator[tuple[str, Any]]:
    """A Ray of its own with an HTTP server; its address, and what finds its processes. All of them end with it."""
    mark = f"CFG_PARALLEL_TEST_{uuid.uuid4().hex}"
    folder = tempfile.mkdtemp(prefix="ray-")  # short: it holds Unix sockets
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def processes() -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if mark in _environment(process)]

    with pytest.MonkeyPatch.context() as patch:
        # Ray's processes inherit them. Without a token of its own Ray would leave one in the home folder.
        ours = {"RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_USAGE_STATS_ENABLED": "0"}
        for name, value in {mark: "1", "OMP_NUM_THREADS": "1", **ours}.items():
            patch.setenv(name, value)
        try:
            ray.init(
                address="local",
                num_cpus=4,
                num_gpus=0,
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=100 * 2**20,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}", processes
        finally:
            if ray.is_initialized():
                with contextlib.suppress(Exception):
                    serve.shutdown()
                ray.shutdown()
            for process in processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            shutil.rmtree(folder, ignore_errors=True)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.pid != os.getpid() else {}
    except psutil.Error:  # it ended, or is not ours
        return {}


def _running(processes: list[psutil.Process], name: str) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found
