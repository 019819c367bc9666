"""The server as a user starts it, and OpenAI's own client: every picture is the offline one of the same seed."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from serving import (
    DEVICES,
    FIELDS,
    Served,
    close_engines,
    file_of,
    image_of,
    models,
    offline,
    same,
    serving,
    serving_small,
    url_of,
)
from tiny import picture
from tiny_models import small_images

pytestmark = pytest.mark.timeout(240)

PHOTO = picture(0, 48, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("models")
    close_engines()


@pytest.fixture(scope="module")
def images(folder: Path) -> Iterator[Served]:
    with serving(models(folder)["image"], *DEVICES, "--max-queue", "4", "--omni") as served:
        yield served


@pytest.fixture(scope="module")
def plus(folder: Path) -> Iterator[Served]:
    with serving_small(models(folder)["plus"]) as served, small_images():
        yield served


def test_images_generate(images: Served, folder: Path) -> None:
    answer = images.client().images.generate(
        model="tiny", prompt="a cat", size="32x32", n=2, extra_body=FIELDS | {"seed": 3}
    )
    expected = offline(models(folder)["image"], 3, num_outputs_per_prompt=2)
    assert answer.data is not None and len(answer.data) == 2
    for got, wanted in zip(answer.data, expected, strict=True):
        assert same(image_of(got.b64_json or ""), wanted)
    extra: Any = answer.model_extra
    assert extra["seed"] == 3 and extra["metrics"]["parallel_steps"] == extra["metrics"]["steps"] == 3
    assert "3 of 3 steps" in extra["metrics"]["why"] and answer.size == "32x32"  # type: ignore[comparison-overlap]
    assert "libtorch" not in Path(f"/proc/{images.process.pid}/maps").read_text()  # it is for its replicas to load


def test_a_stream_has_every_step(images: Served, folder: Path) -> None:
    stream = images.client().images.generate(
        prompt="a cat", size="32x32", stream=True, partial_images=2, extra_body=FIELDS | {"seed": 4}
    )
    events: list[Any] = list(stream)
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["progress", "partial_image", "progress", "partial_image", "progress", "progress", "completed"]
    steps = [(e.step, e.steps) for e in events if e.type.endswith("progress")]
    assert steps == [(0, None), (1, 3), (2, 3), (3, 3)]
    partial = [image_of(event.b64_json) for event in events if event.type.endswith("partial_image")]
    final = image_of(events[-1].b64_json)
    assert same(final, offline(models(folder)["image"], 4)[0])
    distances = [np.abs(np.asarray(each, float) - np.asarray(final, float)).mean() for each in partial]
    assert 0 < distances[1] < distances[0]  # on the way to the result


@pytest.mark.parametrize("count", [1, 2])
def test_images_edit(plus: Served, folder: Path, count: int) -> None:
    photos = [picture(i, 48, 48) for i in range(count)]
    files = [file_of(photo) for photo in photos]
    expected = offline(models(folder)["plus"], 5, *photos, size=64)[0]
    client = plus.client()
    asked: dict[str, Any] = {"prompt": "a cat", "size": "64x64", "extra_body": FIELDS | {"seed": 5}}
    answer = client.images.edit(image=files if count > 1 else files[0], **asked)
    assert same(image_of(answer.data[0].b64_json or ""), expected)  # type: ignore[index]
    for file in files:
        file.seek(0)
    events: list[Any] = list(client.images.edit(image=files if count > 1 else files[0], stream=True, **asked))
    assert [event.type for event in events] == ["image_edit.progress"] * 4 + ["image_edit.completed"]
    assert same(image_of(events[-1].b64_json), expected)


def test_chat(plus: Served, folder: Path) -> None:
    content: Any = [
        {"type": "text", "text": "a cat"},
        {"type": "image_url", "image_url": {"url": url_of(PHOTO)}},
    ]
    answer = plus.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], extra_body=FIELDS | {"seed": 6, "size": "64x64"}
    )
    (part,) = answer.choices[0].message.content  # type: ignore[misc]
    got: Any = part
    assert same(
        image_of(got["image_url"]["url"].partition(",")[2]), offline(models(folder)["plus"], 6, PHOTO, size=64)[0]
    )
    assert [model.id for model in plus.client().models.list()] == ["tiny"]


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of OpenAI's client: content that is no text
def test_a_chat_streams(plus: Served, folder: Path) -> None:
    expected = offline(models(folder)["plus"], 7, PHOTO, size=64)[0]
    content: Any = [
        {"type": "text", "text": "a cat"},
        {"type": "image_url", "image_url": {"url": url_of(PHOTO)}},
    ]
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    fields = FIELDS | {"seed": 7, "size": "64x64", "partial_images": 1}
    chunks: list[Any] = list(
        plus.client().chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body=fields
        )
    )
    progress = [chunk.progress for chunk in chunks if "progress" in chunk.model_extra]
    assert [(each["step"], each["steps"]) for each in progress] == [(0, None), (1, 3), (2, 3), (3, 3)]
    (partial,) = [chunk.partial_image for chunk in chunks if "partial_image" in chunk.model_extra]
    assert image_of(partial["b64_json"]).size == (64, 64)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.total_tokens == 0
    choice = chunks[-2].choices[0]
    (part,) = choice.delta.content
    assert choice.finish_reason == "stop" and chunks[-2].metrics["parallel_steps"] == 3
    assert same(image_of(part["image_url"]["url"].partition(",")[2]), expected)
    with plus.client().chat.completions.stream(**asked, extra_body=fields) as stream:  # which puts it together
        message: Any = stream.get_final_completion().choices[0].message
    assert message.role == "assistant"
    assert same(image_of(message.content[0]["image_url"]["url"].partition(",")[2]), expected)


def test_compared_with_one_device(images: Served) -> None:
    fields = FIELDS | {"prompt": "a cat", "size": "32x32", "seed": 1, "compare": True}
    status, answer, _ = images.post("/v1/images/generations", fields)
    assert status == 200 and answer["metrics"]["one_device"]["equal"] is True
    assert 0 < answer["metrics"]["one_device"]["seconds"] < 60


def test_errors_are_openais(images: Served, plus: Served) -> None:
    client = images.client()
    with pytest.raises(openai.BadRequestError, match="Unknown parameter: 'colour'") as bad:
        client.images.generate(prompt="a cat", extra_body={"colour": "red"})
    assert bad.value.code == "unknown_parameter" and bad.value.param == "colour"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.images.generate(prompt="a cat", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="takes no picture"):
        client.images.edit(prompt="a cat", image=file_of(PHOTO))
    with pytest.raises(openai.BadRequestError, match="needs a picture"):
        plus.client().images.generate(prompt="a cat")
    with pytest.raises(openai.BadRequestError, match="takes no mask"):
        plus.client().images.edit(prompt="a cat", image=file_of(PHOTO), mask=file_of(PHOTO))
    assert images.health()["status"] == "ok"


def test_what_only_the_pipeline_knows_is_the_requests_fault(images: Served) -> None:
    status, answer, _ = images.post("/v1/images/generations", {"prompt": "a cat", "strength": 0.5})
    assert status == 400 and "takes no strength" in answer["error"]["message"]


def test_many_clients(images: Served, folder: Path) -> None:
    """With a queue of four: a picture, which is the offline one, or 429."""
    expected = {seed: offline(models(folder)["image"], seed)[0] for seed in range(4)}
    fields = FIELDS | {"prompt": "a cat", "size": "32x32"}

    def ask(i: int) -> int:
        status, answer, headers = images.post("/v1/images/generations", fields | {"seed": i % 4})
        if status == 429:
            assert int(headers["retry-after"]) >= 1 and answer["error"]["code"] == "queue_full"
        else:
            assert status == 200, answer
            assert same(image_of(answer["data"][0]["b64_json"]), expected[i % 4])
        return status

    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(ask, range(48)))
    assert set(statuses) == {200, 429}
    metrics = images.ask("/metrics")[1]
    assert f'status="429"}} {float(statuses.count(429))}' in metrics


def test_a_lost_follower_is_told_and_no_picture_is_lost(images: Served, folder: Path) -> None:
    fields = FIELDS | {"prompt": "a cat", "size": "32x32"}
    restarts = images.health()["replicas"][0]["follower_restarts"]
    seen = set()
    for seed in range(3):
        for follower in images.followers():
            follower.kill()
        expected = offline(models(folder)["image"], seed)[0]
        status, answer, _ = images.post("/v1/images/generations", fields | {"seed": seed})
        assert status == 200 and same(image_of(answer["data"][0]["b64_json"]), expected)
        seen.add(images.health()["status"])
    assert "degraded" in seen, images.events[-5:]
    assert any(event["event"] == "follower lost" for event in images.events)
    deadline = time.monotonic() + 60
    while images.health()["status"] != "ok":
        assert time.monotonic() < deadline, images.health()
        time.sleep(0.2)
    assert images.health()["replicas"][0]["follower_restarts"] > restarts
    assert "cfg_parallel_follower_restarts_total 0" not in images.ask("/metrics")[1]


def test_a_follower_that_dies_while_nobody_asks_is_replaced(images: Served) -> None:
    (follower,) = images.followers()
    follower.kill()
    deadline = time.monotonic() + 60
    while images.health()["status"] == "ok":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while images.health()["status"] != "ok":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert images.followers()[0].pid != follower.pid


def test_an_engine_that_dies_is_replaced_and_its_request_run_again(images: Served, folder: Path) -> None:
    expected = offline(models(folder)["image"], 8, num_inference_steps=60)[0]
    answers: list[Any] = []
    fields = FIELDS | {"prompt": "a cat", "size": "32x32", "seed": 8, "num_inference_steps": 60}
    thread = threading.Thread(target=lambda: answers.append(images.post("/v1/images/generations", fields)))
    thread.start()
    while images.health()["running"] == 0:
        time.sleep(0.01)
    images.workers()[0].kill()
    thread.join(120)
    status, answer, _ = answers[0]
    assert status == 200, answer
    assert same(image_of(answer["data"][0]["b64_json"]), expected)


def test_a_client_that_goes_away_ends_its_generation(images: Served) -> None:
    fields = FIELDS | {"prompt": "a cat", "size": "32x32", "num_inference_steps": 200}
    body = json.dumps(fields).encode()
    host, _, port = images.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while images.health()["running"] == 0:
            time.sleep(0.01)
    began = time.monotonic()
    while images.health()["running"] > 0:
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    health = images.health()  # the follower is none the worse for it
    assert health["status"] == "ok"


@pytest.mark.parametrize("kind", ["images", "chat"])
def test_a_client_that_leaves_a_stream_ends_its_generation(images: Served, kind: str) -> None:
    fields = FIELDS | {"size": "32x32", "num_inference_steps": 200}
    client = images.client()
    stream: Any
    if kind == "chat":
        messages: Any = [{"role": "user", "content": "a cat"}]
        stream = client.chat.completions.create(model="tiny", messages=messages, stream=True, extra_body=fields)
        step = next(chunk.progress["step"] for chunk in stream if "progress" in chunk.model_extra)
    else:
        stream = client.images.generate(prompt="a cat", stream=True, extra_body=fields)
        step = next(stream).step
    assert step == 0 and images.health()["running"] == 1
    made = sum(event["event"] == "made" for event in images.events)
    stream.close()
    began = time.monotonic()
    while images.health()["running"] > 0:
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    assert sum(event["event"] == "made" for event in images.events) == made
    assert images.health()["status"] == "ok"


def test_no_prompt_is_in_the_log(images: Served) -> None:
    secret = "a purple elephant"
    images.post("/v1/images/generations", FIELDS | {"prompt": secret, "size": "32x32"})
    assert not any(secret in line for line in images.log)
    made = [event for event in images.events if event["event"] == "made"]
    assert made and all(event["request_id"].startswith("req-") and event["seconds"] > 0 for event in made)
