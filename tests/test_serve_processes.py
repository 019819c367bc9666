"""How a server of `cfg-parallel serve` begins, hangs and ends; each test starts its own."""

from __future__ import annotations

import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from serving import DEVICES, FIELDS, close_engines, image_of, models, offline, same, serving

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("models")
    close_engines()


HANGS = """
import time, diffusers

def build(device):
    pipe = diffusers.DiffusionPipeline.from_pretrained({folder!r})
    step = pipe.scheduler.step

    def hanging(*args, **kwargs):
        if pipe.num_timesteps == 7 and pipe.scheduler.step_index == 2:
            time.sleep(600)
        return step(*args, **kwargs)

    pipe.scheduler.step = hanging
    return pipe
"""


def test_an_engine_that_hangs_and_a_client_that_does(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS.format(folder=models(folder)["image"]))
    options = (*DEVICES, "--max-step-seconds", "10", "--max-upload-seconds", "2")
    with serving("hangs:build", *options, PYTHONPATH=str(tmp_path)) as served:
        (worker,) = served.workers()
        family = [worker, *served.followers()]
        fields = FIELDS | {"size": "32x32", "seed": 8, "num_inference_steps": 7}
        messages: Any = [{"role": "user", "content": "a cat"}]
        steps: list[int] = []
        stream: Any = served.client().chat.completions.create(
            model="tiny", messages=messages, stream=True, extra_body=fields
        )
        with pytest.raises(openai.APIError, match="no step within 10 s") as hung:
            for chunk in stream:
                steps += [chunk.progress["step"]] if "progress" in chunk.model_extra else []
        assert steps == [0, 1, 2] and hung.value.code == "engine_hangs" and hung.value.type == "server_error"
        status, answer, _ = served.post("/v1/images/generations", {"prompt": "a cat"})
        assert status == 503 and answer["error"]["code"] == "not_ready"
        assert not psutil.wait_procs(family, 10)[1]
        deadline = time.monotonic() + 120
        while served.health()["status"] != "ok":
            assert time.monotonic() < deadline, served.health()
            time.sleep(0.1)
        fields |= {"prompt": "a cat", "num_inference_steps": 3}
        status, answer, _ = served.post("/v1/images/generations", fields)
        assert status == 200
        assert same(image_of(answer["data"][0]["b64_json"]), offline(models(folder)["image"], 8)[0])
        assert sum(event["event"] == "engine hangs" for event in served.events) == 1  # it was not run again
        host, _, port = served.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=30) as stalled:
            head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            stalled.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt'.encode())
            answered = b"".join(iter(functools.partial(stalled.recv, 4096), b""))  # until the server closes it
        assert answered.startswith(b"HTTP/1.1 408 ") and b'"code":"request_timeout"' in answered


def test_sigterm_finishes_what_runs(folder: Path) -> None:
    with serving(models(folder)["image"], *DEVICES) as served:
        fields = FIELDS | {"prompt": "a cat", "size": "32x32", "seed": 2, "num_inference_steps": 40}
        answers: list[Any] = [None, None]

        def ask(i: int) -> None:
            answers[i] = served.post("/v1/images/generations", fields)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
        threads[0].start()
        while served.health()["running"] == 0:
            time.sleep(0.01)
        threads[1].start()
        while served.health()["waiting"] == 0:
            time.sleep(0.01)
        host, _, port = served.url.removeprefix("http://").partition(":")
        stalled = socket.create_connection((host, int(port)))  # a client that never sends what it has announced
        stalled.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        os.kill(served.process.pid, signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert answers[0][0] == 200
        assert same(
            image_of(answers[0][1]["data"][0]["b64_json"]),
            offline(models(folder)["image"], 2, num_inference_steps=40)[0],
        )
        assert answers[1][0] == 503 and answers[1][1]["error"]["code"] == "shutting_down"
        assert served.process.wait(30) == 0  # some seconds after the last picture
        stalled.close()


def test_two_replicas_of_a_pipeline_made_in_python(folder: Path, tmp_path: Path) -> None:
    load = f"return diffusers.DiffusionPipeline.from_pretrained({models(folder)['image']!r})"
    (tmp_path / "mine.py").write_text(f"import diffusers\n\ndef build(device):\n    {load}\n")
    options = ("--devices", "cpu,cpu", "--cfg-parallel-size", "1", "--replicas", "2", "--api-key", "k")
    with serving("mine:build", *options, PYTHONPATH=str(tmp_path)) as served:
        assert len(served.workers()) == 2
        client = served.client("k")
        with ThreadPoolExecutor(4) as pool:
            answers = list(
                pool.map(
                    lambda seed: client.images.generate(
                        prompt="a cat", size="32x32", extra_body=FIELDS | {"seed": seed}
                    ),
                    range(4),
                )
            )
        for seed, answer in enumerate(answers):
            assert same(image_of(answer.data[0].b64_json or ""), offline(models(folder)["image"], seed)[0])  # type: ignore[index]
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        assert {event["replica"] for event in served.events if event["event"] == "replica ready"} == {0, 1}
        family = psutil.Process(served.process.pid).children(recursive=True)
        assert len(family) >= 2
        served.process.kill()  # not even then is a process left
        assert not psutil.wait_procs(family, 10)[1]


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("/no/such/folder", (), "there is no folder /no/such/folder"),
        ("no_such_module:build", (), "there is no module no_such_module"),
        ("IMAGE", ("--devices", "cpu,cpu", "--replicas", "3"), "make them agree"),
        ("IMAGE", ("--devices", "cuda:7,cuda:8"), "there is no cuda:7"),
        ("IMAGE", ("--port", "99999"), "at most 65535"),
        ("IMAGE", ("--max-request-mb", "0"), "above 0"),
    ],
)
def test_what_cannot_be_served(folder: Path, model: str, options: tuple[str, ...], says: str) -> None:
    model = models(folder)["image"] if model == "IMAGE" else model
    with serving(model, *(options or DEVICES), wait=False) as served:
        assert served.process.wait(60) == 2
        time.sleep(0.2)
        assert any(line.startswith("cfg-parallel: error: ") and says in line for line in served.log), served.log
        assert not any("Traceback" in line for line in served.log)


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with serving(models(folder)["image"], *DEVICES, "--port", port, wait=False) as served:
            assert served.process.wait(60) == 2
            time.sleep(0.2)
            assert any("choose another --host or --port" in line for line in served.log)
