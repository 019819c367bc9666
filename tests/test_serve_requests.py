"""What a request may hold, who waits and who is sent away: the application with a replica that needs no model."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from cfg_parallel.serving.app import Server
from cfg_parallel.serving.dispatcher import Done, Job, Partial, Step
from cfg_parallel.serving.pictures import fetch, read, read_mask
from cfg_parallel.serving.schemas import ApiError
from cfg_parallel.serving.settings import Settings, is_factory
from cfg_parallel.serving.work import Facts, Picture
from serving import file_of, image_of, url_of
from tiny import picture

FACTS = Facts("QwenImageEditPlusPipeline", True, False, True, True, True, ("true_cfg_scale",), True)
METRICS = {"seconds": 0.5, "steps": 2, "parallel_steps": 2}


def made(job: Job) -> Done:
    """A picture that tells which seed it is of."""
    size = job.work.params.get("width", 16), job.work.params.get("height", 16)
    count = job.work.params.get("num_outputs_per_prompt", 1)
    pictures = [Picture.of(Image.new("RGB", size, (job.work.params["seed"] % 256, i, 0))) for i in range(count)]
    return Done(pictures, dict(METRICS))


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: Any


class Client:
    """Calls the application without a network."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.jobs: list[Job] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled: list[str] = []
        self.failures: list[Exception | ApiError] = []
        self.heard: list[Any] = []  # what was sent to clients
        for replica in server.replicas:
            replica.start = lambda replica=replica: self._start(replica)  # type: ignore[method-assign]
            replica.run = lambda job, replica=replica: self._run(replica, job)  # type: ignore[method-assign]
            replica.cancel = self.cancelled.append  # type: ignore[method-assign]

    def _start(self, replica: Any) -> None:
        replica._hear("ready", FACTS)

    async def _run(self, replica: Any, job: Job) -> Any:
        replica.job, job.replica = job, replica
        self.jobs.append(job)
        try:
            job.events.put_nowait(Step(1, 2))
            for index in range(job.work.partial_images):
                job.events.put_nowait(Partial(index, made(job).pictures))
            await self.gate.wait()
            if self.failures:
                failure = self.failures.pop(0)
                if isinstance(failure, ApiError):
                    return failure
                raise failure
            return made(job)
        finally:
            replica.job = job.replica = None

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        leave: asyncio.Event | None = None,
        root_path: str = "",
        stalls: bool = False,
        **headers: str,
    ) -> Answer:
        """`leave`: the client goes away when that is set. `stalls`: there is more of the body, which never comes."""
        sent: list[Any] = []
        parts = [body[i : i + 65536] for i in range(0, len(body), 65536)] or [b""]

        async def receive() -> Any:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts) or stalls}
            await (leave or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            self.heard.append(message)

        given = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {
            "headers": given,
            "http_version": "1.1",
            "scheme": "http",
            "root_path": root_path,
            "asgi": {"version": "3.0"},
        }
        scope |= {"server": ("test", 80), "client": ("test", 1)}
        await self.server.app(scope, receive, send)
        start = next(message for message in sent if message["type"] == "http.response.start")
        content = b"".join(message.get("body", b"") for message in sent)
        answered = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        is_json = answered.get("content-type") == "application/json"
        return Answer(start["status"], answered, json.loads(content) if is_json else content.decode())

    async def post(self, path: str, fields: Any, **headers: str) -> Answer:
        return await self.ask("POST", path, json.dumps(fields).encode(), content_type="application/json", **headers)

    async def make(self, **fields: Any) -> Answer:
        return await self.post("/v1/images/generations", {"prompt": "a cat"} | fields)

    async def edit(self, fields: dict[str, str], files: list[tuple[str, bytes]]) -> Answer:
        parts = [(f'name="{name}"', value.encode()) for name, value in fields.items()]
        parts += [(f'name="{name}"; filename="a.png"', data) for name, data in files]
        body = b"".join(b"--xx\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (h.encode(), d) for h, d in parts)
        kind = "multipart/form-data; boundary=xx"
        return await self.ask("POST", "/v1/images/edits", body + b"--xx--\r\n", content_type=kind)


@asynccontextmanager
async def client(**settings: Any) -> AsyncIterator[Client]:
    given = {"model": "m", "devices": ("cpu", "cpu")} | settings
    server = Server(Settings(**given))
    asked = Client(server)
    async with server._lifespan(server.app):
        yield asked


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def png(width: int, height: int) -> bytes:
    """A PNG of one colour and of any size: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes((width // 8 + 1) * min(height, 64)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


PNG = file_of(picture(0, 16, 16)).getvalue()

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": None}, "prompt", "required"),
    ({"prompt": 5}, "prompt", "valid string"),
    ({"prompt": "x" * 40_000}, "prompt", "at most 32000"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 5}, "n", "at most 4 pictures"),
    ({"n": "many"}, "n", "valid integer"),
    ({"size": "big"}, "size", "WIDTHxHEIGHT"),
    ({"size": "0x64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "4x8"}, "size", "multiples of 8"),
    ({"size": "99999x99999"}, "size", "at most 4194304 pixels"),
    ({"size": "100x100"}, "size", "multiples of 8"),
    ({"size": "64x64", "height": 64, "width": 64}, "size", "not both"),
    ({"height": 64}, "size", "both height and width"),
    ({"num_inference_steps": 0}, "num_inference_steps", "greater than"),
    ({"num_inference_steps": 10**9}, "num_inference_steps", "at most 200 steps"),
    ({"num_inference_steps": 2.5}, "num_inference_steps", "valid integer"),
    ({"true_cfg_scale": "high"}, "true_cfg_scale", "valid number"),
    ({"true_cfg_scale": -1}, "true_cfg_scale", "greater than"),
    ({"true_cfg_scale": 1e9}, "true_cfg_scale", "less than"),
    ({"guidance_scale": 3}, "guidance_scale", "takes true_cfg_scale"),
    ({"seed": -1}, "seed", "greater than"),
    ({"seed": 2**70}, "seed", "less than"),
    ({"strength": 2}, "strength", "less than"),
    ({"response_format": "url"}, "response_format", "b64_json"),
    ({"output_format": "gif"}, "output_format", "png"),
    ({"partial_images": 2}, "partial_images", "stream=true"),
    ({"partial_images": 1, "stream": True, "compare": True}, "partial_images", "leave them out"),
    ({"partial_images": 9, "stream": True}, "partial_images", "less than"),
    ({"no_such_field": 1}, "no_such_field", "Unknown parameter"),
    ({"model": "another"}, "model", "is not served here"),
    ({"background": "transparent"}, "background", "auto"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str, says: str) -> None:
    async def test() -> None:
        async with client() as asked:
            answer = await asked.make(**fields)
            assert answer.status == (404 if param == "model" else 400), answer
            error = answer.body["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
            assert error["param"] == param and says in error["message"] and "\n" not in error["message"]
            assert not asked.jobs

    run(test)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[1]", "application/json"),
        (b"\xff", "application/json"),
    ],
)
def test_a_body_that_is_no_request(body: bytes, kind: str) -> None:
    async def test() -> None:
        async with client() as asked:
            for path in ("/v1/images/generations", "/v1/chat/completions", "/v1/images/edits"):
                answer = await asked.ask("POST", path, body, content_type=kind)
                assert answer.status == 400 and answer.body["error"]["message"]

    run(test)


BAD_PICTURES = {
    "nothing": (b"", "empty"),
    "text": (b"I am no picture", "expected a picture"),
    "a cut file": (PNG[:60], "damaged"),
    "a broken file": (PNG[:100] + b"\0" * 60 + PNG[160:], "damaged"),
    "a bomb": (png(60_000, 60_000), "at most 50000000"),
    "a format that is not read": (file_of(picture(0, 16, 16), "PPM").getvalue(), "expected a picture"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture(name: str) -> None:
    data, says = BAD_PICTURES[name]

    async def test() -> None:
        async with client() as asked:
            answer = await asked.edit({"prompt": "a cat"}, [("image", data)])
            assert answer.status == 400 and says in answer.body["error"]["message"], answer
            assert answer.body["error"]["param"] == "image"
            url = "data:image/png;base64," + base64.b64encode(data).decode()
            answer = await asked.post("/v1/chat/completions", chat(url))
            assert answer.status == 400 and says in answer.body["error"]["message"], answer

    run(test)


def chat(*urls: str, **fields: Any) -> dict[str, Any]:
    parts: list[Any] = [{"type": "text", "text": "a cat"}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "system", "content": "hi"}, {"role": "user", "content": parts}]} | fields


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1:1/a.png", "remote_images_not_allowed"),
        ("https://example.com/a.png", "remote_images_not_allowed"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("ftp://example.com/a.png", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        ("data:image/png;base64,***", "invalid_base64"),
        ("data:image/png,abc", "invalid_image_url"),
    ],
)
def test_only_data_urls_are_read(url: str, code: str) -> None:
    async def test() -> None:
        async with client() as asked:
            answer = await asked.post("/v1/chat/completions", chat(url))
            assert (answer.status, answer.body["error"]["code"]) == (400, code)

    run(test)


def test_remote_pictures_where_they_are_allowed(tmp_path: Any) -> None:
    import functools
    import http.server
    import threading

    (tmp_path / "a.png").write_bytes(PNG)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        assert fetch(f"{at}/a.png", True, 1 << 20, "image_url") == PNG
        with pytest.raises(ApiError, match="more than 10 bytes"):
            fetch(f"{at}/a.png", True, 10, "image_url")
        with pytest.raises(ApiError, match="cannot be fetched"):
            fetch(f"{at}/b.png", True, 1 << 20, "image_url")
        server.shutdown()


def test_masks_of_openai_and_of_diffusers() -> None:
    transparent = Image.new("RGBA", (8, 8), (9, 9, 9, 255))
    transparent.putpixel((1, 2), (9, 9, 9, 0))
    grey = Image.new("L", (8, 8), 0)
    grey.putpixel((1, 2), 255)
    for mask in (transparent, grey):
        assert read_mask(file_of(mask).getvalue(), 100).tobytes() == grey.tobytes()
    assert read(file_of(transparent).getvalue(), 100, "image").getpixel((1, 2)) == (255, 255, 255)


def test_what_reaches_the_pipeline() -> None:
    async def test() -> None:
        async with client() as asked:
            answer = await asked.edit(
                {
                    "prompt": "a cat\r\non a sofa",
                    "negative_prompt": "bad",
                    "seed": "7",
                    "n": "2",
                    "size": "32x16",
                    "user": "u",
                },
                [("image[]", PNG), ("image[]", PNG), ("mask", PNG)],
            )
            assert answer.status == 200, answer.body
            work = asked.jobs[0].work
            assert work.params == {"seed": 7, "height": 16, "width": 32, "num_outputs_per_prompt": 2}
            data = work.prompt["multi_modal_data"]
            assert [image.size for image in data["image"]] == [(16, 16)] * 2 and data["mask_image"].mode == "L"
            assert work.prompt["prompt"] == "a cat\non a sofa" and work.prompt["negative_prompt"] == "bad"
            assert [image_of(each["b64_json"]).getpixel((0, 0)) for each in answer.body["data"]] == [
                (7, 0, 0),
                (7, 1, 0),
            ]
            assert answer.body["size"] == "32x16" and answer.body["seed"] == 7
            assert answer.body["metrics"]["parallel_steps"] == 2
            one = await asked.edit({"prompt": "a cat"}, [("image", PNG)])
            assert asked.jobs[1].work.prompt["multi_modal_data"]["image"].size == (16, 16)
            assert one.body["seed"] == asked.jobs[1].work.params["seed"] < 2**32

    run(test)


def test_chat() -> None:
    async def test() -> None:
        async with client() as asked:
            nested = chat(url_of(picture(0, 16, 16)), temperature=1, extra_body={"seed": 5, "size": "16x16"})
            for body in (
                nested,
                chat(seed=5, size="16x16"),
                {"messages": [{"role": "user", "content": "a cat"}], "seed": 5},
            ):
                answer = await asked.post("/v1/chat/completions", body)
                assert answer.status == 200, answer.body
                (part,) = answer.body["choices"][0]["message"]["content"]
                head, _, data = part["image_url"]["url"].partition(",")
                assert head == "data:image/png;base64" and image_of(data).getpixel((0, 0)) == (5, 0, 0)
            for body, says in [
                ({"messages": []}, "messages"),
                ({"messages": [{"role": "assistant", "content": "hi"}]}, "no user message"),
                (chat(stream=True, stream_options={"include_usage": "what"}), "valid boolean"),
                (chat(partial_images=1), "stream=true"),
                (chat(no_such=1), "Unknown parameter"),
                ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "text or image_url"),
            ]:
                answer = await asked.post("/v1/chat/completions", body)
                assert answer.status == 400 and says in answer.body["error"]["message"]

    run(test)


def chunks_of(text: str) -> list[Any]:
    """What the `data:` lines of a chat's stream hold, which ends as OpenAI's does."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_chat_in_chunks() -> None:
    async def test() -> None:
        async with client() as asked:
            fields: dict[str, Any] = {"seed": 5, "size": "16x16", "n": 2}
            whole = (await asked.post("/v1/chat/completions", chat(**fields))).body
            options = {"partial_images": 1, "stream_options": {"include_usage": True, "include_obfuscation": False}}
            answer = await asked.post("/v1/chat/completions", chat(stream=True, **options, **fields))
            assert answer.headers["content-type"].startswith("text/event-stream") and "event:" not in answer.body
            chunks = chunks_of(answer.body)
            usage = chunks.pop()
            assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
            for chunk in [*chunks, usage]:
                assert chunk["object"] == "chat.completion.chunk" and chunk["model"] == "m"
                assert (chunk["id"], chunk["created"]) == (usage["id"], usage["created"])
            choices = [choice for chunk in chunks for choice in chunk["choices"] if chunk["usage"] is None]
            assert [choice["index"] for choice in choices] == [0] * len(chunks)
            assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["stop"]
            deltas = [choice["delta"] for choice in choices]
            assert deltas == [{"role": "assistant"}, *[{}] * 4, {"content": whole["choices"][0]["message"]["content"]}]
            assert chunks[1]["progress"] == {"step": 0, "steps": None, "one_device": False}
            assert chunks[2]["progress"] == {"step": 1, "steps": 2, "one_device": False}
            shown = [chunk["partial_image"] for chunk in chunks[3:5]]  # one of each of the two
            assert [image_of(each["b64_json"]).getpixel((0, 0)) for each in shown] == [(5, 0, 0), (5, 1, 0)]
            assert shown[1]["partial_image_index"] == 0 and shown[1]["size"] == "16x16"
            assert chunks[-1]["seed"] == 5 and chunks[-1]["metrics"].keys() == whole["metrics"].keys()
            for fields in ({"stream": True}, {"stream_options": {}, "extra_body": {"stream": True}}):
                without = chunks_of((await asked.post("/v1/chat/completions", chat(**fields))).body)
                assert not any("usage" in chunk for chunk in without) and without[-1]["choices"][0]["delta"]["content"]

    run(test)


def test_an_error_in_a_stream_has_one_form() -> None:
    async def test() -> None:
        async with client() as asked:
            for failure in (ApiError(500, "it failed", "server_error", code="generation_failed"), MemoryError()):
                ends = []
                for path, body in [("images/generations", {"prompt": "a cat"}), ("chat/completions", chat())]:
                    asked.failures = [failure]
                    answer = await asked.post(f"/v1/{path}", body | {"stream": True})
                    assert answer.status == 200
                    ends.append(answer.body.split("\n\n")[-3:])
                assert ends[0] == ends[1] and ends[0][0].startswith('event: error\ndata: {"type": "error", "error": {')
                assert ends[0][1:] == ["data: [DONE]", ""]
            asked.server.dispatcher.stop()
            refused = await asked.post("/v1/chat/completions", chat(stream=True))  # before the stream has begun
            assert refused.status == 503 and refused.body["error"]["code"] == "shutting_down"

    run(test)


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(name: str, kind: str) -> None:
    async def test() -> None:
        async with client() as asked:
            answer = await asked.make(output_format=name, output_compression=90, seed=200)
            image = Image.open(io.BytesIO(base64.b64decode(answer.body["data"][0]["b64_json"])))
            assert image.format == kind and abs(image.convert("RGB").getpixel((3, 3))[0] - 200) < 4  # type: ignore[index]
            assert answer.body["output_format"] == name

    run(test)


def test_beyond_the_queue_is_429() -> None:
    async def test() -> None:
        async with client(max_queue=2) as asked:
            asked.gate.clear()
            running = asyncio.create_task(asked.make(seed=0))
            await until(lambda: len(asked.jobs) == 1)
            waiting = [asyncio.create_task(asked.make(seed=i)) for i in (1, 2)]
            await until(lambda: asked.server.dispatcher.waiting == 2)
            refused = await asked.make(seed=3)
            assert refused.status == 429 and refused.body["error"]["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
            health = await asked.ask("GET", "/health")
            assert health.body["waiting"] == 2 and health.body["running"] == 1
            asked.gate.set()
            answers = await asyncio.gather(running, *waiting)
            assert [answer.body["seed"] for answer in answers] == [0, 1, 2]
            assert [job.work.params["seed"] for job in asked.jobs] == [0, 1, 2]
            assert (await asked.make(seed=4)).status == 200
            metrics = (await asked.ask("GET", "/metrics")).body
            assert 'cfg_parallel_requests_total{endpoint="/v1/images/generations",status="429"} 1.0' in metrics
            assert 'cfg_parallel_requests_total{endpoint="/v1/images/generations",status="200"} 4.0' in metrics
            assert "cfg_parallel_images_total 4.0" in metrics
            assert 'cfg_parallel_steps_total{on="all devices"} 8.0' in metrics
            assert "cfg_parallel_generation_seconds_count 4.0" in metrics

    run(test)


def test_an_idle_replica_takes_one_without_a_queue() -> None:
    async def test() -> None:
        async with client(max_queue=0) as asked:
            asked.gate.clear()
            running = asyncio.create_task(asked.make())
            await until(lambda: len(asked.jobs) == 1)
            assert (await asked.make()).status == 429
            asked.gate.set()
            assert (await running).status == 200

    run(test)


def test_replicas_work_side_by_side() -> None:
    async def test() -> None:
        async with client(devices=("cpu",) * 4, replicas=2) as asked:
            asked.gate.clear()
            tasks = [asyncio.create_task(asked.make()) for _ in range(3)]
            await until(lambda: len(asked.jobs) == 2)
            assert {job.replica.number for job in asked.jobs if job.replica} == {0, 1}
            asked.gate.set()
            assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 3

    run(test)


def test_a_client_that_goes_away() -> None:
    async def test() -> None:
        async with client() as asked:
            asked.gate.clear()
            leave = asyncio.Event()
            body = json.dumps({"prompt": "a cat"}).encode()
            path = "/v1/images/generations"
            tasks = [
                asyncio.create_task(asked.ask("POST", path, body, leave, content_type="application/json"))
                for _ in range(2)
            ]
            await until(lambda: len(asked.jobs) == 1 and asked.server.dispatcher.waiting == 1)
            leave.set()
            await asyncio.gather(*tasks)
            assert asked.cancelled == [asked.jobs[0].work.id]  # the one that runs ends at its next step
            assert asked.server.dispatcher.waiting == 0  # the other is not begun
            asked.gate.set()
            assert (await asked.make()).status == 200 and len(asked.jobs) == 2

    run(test)


@pytest.mark.parametrize("path", ["images/generations", "chat/completions"])
def test_a_client_that_leaves_a_stream(path: str) -> None:
    async def test() -> None:
        async with client() as asked:
            asked.gate.clear()
            leave = asyncio.Event()
            body = json.dumps((chat() if "chat" in path else {"prompt": "a cat"}) | {"stream": True}).encode()
            tasks = [
                asyncio.create_task(asked.ask("POST", f"/v1/{path}", body, leave, content_type="application/json"))
                for _ in range(2)
            ]
            await until(lambda: len(asked.jobs) == 1 and asked.server.dispatcher.waiting == 1)
            await until(lambda: b'"step": 1' in b"".join(message.get("body", b"") for message in asked.heard))
            leave.set()
            await asyncio.gather(*tasks)
            assert asked.cancelled == [asked.jobs[0].work.id] and asked.server.dispatcher.waiting == 0
            asked.gate.set()

    run(test)


def test_a_replica_that_ends() -> None:
    async def test() -> None:
        async with client() as asked:
            asked.failures = [ConnectionError("exit status -9")]
            assert (await asked.make(seed=3)).body["seed"] == 3  # from another process
            assert len(asked.jobs) == 2
            asked.failures = [ConnectionError("exit status -9")] * 2
            answer = await asked.make()
            assert answer.status == 500 and answer.body["error"]["code"] == "engine_lost"
            asked.failures = [ApiError(400, "no such size", code="invalid_value")]
            assert (await asked.make()).status == 400

    run(test)


def test_no_replica() -> None:
    async def test() -> None:
        async with client() as asked:
            (replica,) = asked.server.replicas
            asked.gate.clear()
            running = asyncio.create_task(asked.make())
            await until(lambda: len(asked.jobs) == 1)
            waiting = asyncio.create_task(asked.make())
            await until(lambda: asked.server.dispatcher.waiting == 1)
            replica.state, replica.failure = "failed", "no memory"
            replica.failed()
            assert (await waiting).status == 503
            asked.gate.set()
            await running
            answer = await asked.make()
            assert answer.status == 503 and answer.headers["retry-after"]
            health = await asked.ask("GET", "/health")
            assert health.status == 503 and health.body["status"] == "failed"
            assert health.body["replicas"][0]["failure"] == "no memory"

    run(test)


def test_shutting_down_finishes_what_runs() -> None:
    async def test() -> None:
        async with client() as asked:
            asked.gate.clear()
            running = asyncio.create_task(asked.make())
            await until(lambda: len(asked.jobs) == 1)
            waiting = asyncio.create_task(asked.make())
            await until(lambda: asked.server.dispatcher.waiting == 1)
            asked.server.dispatcher.stop()
            assert (await waiting).status == (await asked.make()).status == 503
            assert (await asked.ask("GET", "/health")).body["status"] == "stopping"
            asked.gate.set()
            assert (await running).status == 200

    run(test)


def test_a_replica_that_never_loads_leaves_the_others_alone() -> None:
    """The loop goes on, although somebody waits."""

    async def test() -> None:
        async with client(devices=("cpu",) * 4, replicas=2) as asked:
            _, bad = asked.server.replicas
            asked.gate.clear()
            bad.state, bad.facts = "starting", None
            tasks = [asyncio.create_task(asked.make(seed=i)) for i in range(3)]
            await until(lambda: len(asked.jobs) == 1 and asked.server.dispatcher.waiting == 2)
            bad.failure = "no memory"
            bad._end("it ended")
            assert bad.state == "failed"
            await asyncio.sleep(0.1)
            asked.gate.set()
            assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 3

    run(test)


def test_the_last_replica_fails_under_a_request() -> None:
    async def test() -> None:
        async with client() as asked:
            (replica,) = asked.server.replicas

            async def fail(job: Job) -> Any:
                replica.state = "failed"
                replica.failed()
                raise ConnectionError("exit status 1")

            replica.run = fail  # type: ignore[method-assign]
            assert (await asked.make()).status == 503
            assert asked.server.dispatcher.waiting == 0

    run(test)


def test_nobody_is_made_a_picture_for_twice_who_has_gone() -> None:
    async def test() -> None:
        async with client() as asked:
            asked.gate.clear()
            leave = asyncio.Event()
            body = json.dumps({"prompt": "a cat"}).encode()
            ask = asked.ask("POST", "/v1/images/generations", body, leave, content_type="application/json")
            task = asyncio.create_task(ask)
            await until(lambda: len(asked.jobs) == 1)
            leave.set()
            await task
            asked.failures = [ConnectionError("exit status -9")]
            asked.gate.set()
            assert (await asked.make()).status == 200
            assert len(asked.jobs) == 2

    run(test)


def test_an_error_of_the_servers_own_ends_one_request() -> None:
    async def test() -> None:
        async with client() as asked:
            asked.failures = [MemoryError("no memory to send it")]
            answer = await asked.make()
            assert answer.status == 500 and "see its log" in answer.body["error"]["message"]
            assert (await asked.make()).status == 200

    run(test)


def test_what_is_refused_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    from cfg_parallel.serving import app

    decoded: list[int] = []

    def counting(data: bytes, most: int, param: str) -> Any:
        decoded.append(most)
        return read(data, most, param)

    monkeypatch.setattr(app.pictures, "read", counting)

    async def test() -> None:
        async with client(max_queue=0, max_input_pixels=600) as asked:
            url = url_of(picture(0, 16, 16))
            assert (await asked.post("/v1/chat/completions", chat(*[url] * 17))).status == 400
            assert (await asked.edit({"prompt": "a cat", "model": "no"}, [("image", PNG)])).status == 404
            asked.gate.clear()
            task = asyncio.create_task(asked.make())
            await until(lambda: len(asked.jobs) == 1)
            assert (await asked.edit({"prompt": "a cat"}, [("image", PNG)])).status == 429
            assert not decoded
            asked.gate.set()
            await task
            answer = await asked.edit({"prompt": "a cat"}, [("image", PNG)] * 3)  # of 256 pixels each
            assert answer.status == 400 and answer.body["error"]["code"] == "image_too_large"
            assert decoded == [600, 344, 88]

    run(test)


def test_limits_hold_for_what_the_pipeline_chooses() -> None:
    async def test() -> None:
        async with client(max_pixels=200, max_steps=20) as asked:
            asked.server.replicas[0].facts = dataclasses.replace(FACTS, takes_size=False, default_steps=50)
            answer = await asked.edit({"prompt": "a cat"}, [("image", PNG)])
            assert answer.status == 400 and "at most 200" in answer.body["error"]["message"]
            small = file_of(picture(0, 8, 8)).getvalue()
            assert (await asked.edit({"prompt": "a cat"}, [("image", small)])).status == 200
            assert asked.jobs[0].work.params["num_inference_steps"] == 20

    run(test)


def test_clients_may_choose_the_same_request_id() -> None:
    async def test() -> None:
        async with client() as asked:
            body = json.dumps({"prompt": "a cat"}).encode()
            path, kind = "/v1/images/generations", "application/json"
            answers = [await asked.ask("POST", path, body, content_type=kind, x_request_id="same") for _ in range(2)]
            assert [answer.body["request_id"] for answer in answers] == ["same", "same"]
            assert asked.jobs[0].work.id != asked.jobs[1].work.id

    run(test)


def test_null_and_the_names_of_others() -> None:
    async def test() -> None:
        async with client() as asked:
            nothing = dict.fromkeys(["n", "stream", "partial_images", "output_format", "response_format", "seed"])
            assert (await asked.make(**nothing)).status == 200
            answer = await asked.make(num_outputs_per_prompt=2)
            assert len(answer.body["data"]) == 2
            image = base64.b64encode(PNG).decode()
            simple = {"messages": [{"role": "user", "content": [{"text": "a cat"}, {"image": image}]}]}
            extra = {"tools": [], "response_format": {"type": "text"}, "stream": None, "extra_body": None}
            assert (await asked.post("/v1/chat/completions", simple | extra)).status == 200
            assert asked.jobs[-1].work.prompt["multi_modal_data"]["image"].size == (16, 16)
            await asked.edit({"prompt": "a cat", "negative_prompt": ""}, [("image", PNG)])
            assert asked.jobs[-1].work.prompt["negative_prompt"] == ""  # guidance is on with an empty one

    run(test)


def test_the_key() -> None:
    async def test() -> None:
        async with client(api_key="s3cret") as asked:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cre"}):
                answer = await asked.ask("GET", "/v1/models", **headers)
                assert answer.status == 401 and answer.body["error"]["code"] == "invalid_api_key"
            assert (await asked.ask("GET", "/v1/models", authorization="Bearer s3cret")).status == 200
            assert (await asked.ask("GET", "/health")).status == 200
            assert (await asked.make()).status == 401 and not asked.jobs
            assert (await asked.ask("GET", "/v1/models", authorization="bearer s3cret")).status == 200
            assert (await asked.ask("GET", "/api/v1/models", root_path="/api")).status == 401

    run(test)


def test_large_bodies() -> None:
    async def test() -> None:
        async with client(max_request_mb=0.1) as asked:
            text = b"x" * 200_000
            json_body = b'{"prompt": "' + text + b'"}'
            form = (
                b'--xx\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + text + b"\r\n--xx--\r\n"
            )
            for with_length in (False, True):
                for path, kind, large in [
                    ("/v1/images/generations", "application/json", json_body),
                    ("/v1/images/edits", "multipart/form-data; boundary=xx", form),
                ]:
                    headers = {"content_length": str(len(large))} if with_length else {}
                    answer = await asked.ask("POST", path, large, content_type=kind, **headers)
                    assert answer.status == 413 and answer.body["error"]["code"] == "request_too_large", (path, answer)

    run(test)


def test_a_body_that_comes_too_slowly() -> None:
    async def test() -> None:
        async with client(max_upload_seconds=0.3, max_queue=0) as asked:
            form = b'--xx\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nxx'
            for path, kind, part in [
                ("/v1/images/generations", "application/json", b'{"prompt": "a'),
                ("/v1/chat/completions", "application/json", b""),
                ("/v1/images/edits", "multipart/form-data; boundary=xx", form),
            ]:
                answer = await asked.ask("POST", path, part, stalls=True, content_type=kind)
                assert answer.status == 408 and answer.headers["connection"] == "close", (path, answer)
                assert answer.body["error"]["code"] == "request_timeout" and "0.3 s" in answer.body["error"]["message"]
            asked.gate.clear()
            running = asyncio.create_task(asked.make())  # the time of a generation is none of the upload
            await asyncio.sleep(0.5)
            asked.gate.set()
            answer = await running
            assert answer.status == 200 and "connection" not in answer.headers

    run(test)


def test_other_paths() -> None:
    async def test() -> None:
        async with client() as asked:
            assert (await asked.ask("GET", "/v1/nothing")).body["error"]["code"] == "not_found"
            assert (await asked.ask("GET", "/v1/images/generations")).body["error"]["code"] == "method_not_allowed"
            assert (await asked.ask("GET", "/page/..")).status == 404
            assert (await asked.ask("GET", "/v1/models/m")).body["id"] == "m"
            assert (await asked.ask("GET", "/v1/models/other")).status == 404
            model = (await asked.ask("GET", "/v1/models")).body["data"][0]
            assert model["pipeline"]["pipeline"] == FACTS.pipeline
            answer = await asked.ask("GET", "/health", x_request_id="mine-1")
            assert answer.headers["x-request-id"] == "mine-1"
            assert (
                (await asked.ask("GET", "/health", x_request_id="no good\r\n"))
                .headers["x-request-id"]
                .startswith("req-")
            )

    run(test)


def test_a_stream() -> None:
    async def test() -> None:
        async with client() as asked:
            answer = await asked.make(stream=True, seed=9, n=2)
            assert answer.headers["content-type"].startswith("text/event-stream")
            names = [line.removeprefix("event: ") for line in answer.body.splitlines() if line.startswith("event: ")]
            assert names == ["image_generation.progress"] * 2 + ["image_generation.completed"] * 2
            assert answer.body.endswith("data: [DONE]\n\n")
            asked.failures = [ApiError(400, "no such size", code="invalid_value")]
            answer = await asked.make(stream=True)
            assert "event: error" in answer.body and "no such size" in answer.body

    run(test)


def test_what_is_a_factory() -> None:
    assert is_factory("my.module:build") and not is_factory("Qwen/Qwen-Image") and not is_factory("/models/a:b")


def test_a_late_cancel_is_forgotten() -> None:
    """Of the process of a replica, with an engine that needs no model."""
    import multiprocessing
    import threading
    import time

    from cfg_parallel.serving.work import Work
    from cfg_parallel.serving.worker import Worker

    class Handle:
        followers: tuple[Any, ...] = ()

        def wait_until_ready(self, timeout: float) -> bool:
            return True

    class Engine:
        handle = Handle()

        def generate(self, prompt: Any, params: Any, on_step: Any) -> Any:
            for step in range(params.num_inference_steps):
                on_step(step + 1, params.num_inference_steps)
                time.sleep(0.01)
            return [type("Output", (), {"images": [Image.new("RGB", (8, 8))], "metrics": {"seconds": 1.0}})]

    ours, theirs = multiprocessing.Pipe()
    worker = Worker(theirs, Engine(), leave=lambda status: None)  # type: ignore[arg-type]
    threading.Thread(target=worker.serve, daemon=True).start()

    def outcome(work_id: str) -> Any:
        while True:
            message = ours.recv()
            if message[0] in ("done", "failed") and message[1] == work_id:
                return message

    work = Work("a", {"prompt": "a cat"}, {"num_inference_steps": 2})
    ours.send(("work", work))
    assert outcome("a")[0] == "done"
    time.sleep(0.1)
    ours.send(("cancel", "a"))
    ours.send(("work", work))
    assert outcome("a")[0] == "done"
    ours.send(("work", dataclasses.replace(work, id="b", params={"num_inference_steps": 500})))
    ours.send(("cancel", "b"))
    assert outcome("b")[:3] == ("failed", "b", "cancelled")
    time.sleep(0.1)
    assert not worker._cancelled and not worker._known
