"""The routes: OpenAI's pictures and chat, the models, health, metrics, and the web page."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import math
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Send

from cfg_parallel import __version__
from cfg_parallel.serving import pictures
from cfg_parallel.serving.dispatcher import Dispatcher, Done, Event, Job, Partial, Step, client_gone
from cfg_parallel.serving.observability import Metrics, tell
from cfg_parallel.serving.replica import Replica
from cfg_parallel.serving.schemas import CHAT_FIELDS_WITHOUT_USE, ApiError, Chat, Generation, error_of
from cfg_parallel.serving.settings import Settings
from cfg_parallel.serving.work import Facts, Picture, Work

_PAGE = Path(__file__).parent / "page"
_GONE = 0.2  # seconds between two looks whether the client is still there
_PING = 5.0  # seconds without an event of a stream
_MOST_IMAGES = 16  # in a request
_FETCHES = 4  # pictures at URLs that are fetched at once

Kind = Literal["image_generation", "image_edit"]
Told = Callable[[Event], Awaitable[list[bytes]]]  # an event of a job, as server-sent events
_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}  # of a chat: there are no tokens


class Server:
    """One FastAPI application, its replicas and its queue."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.replicas = [Replica(settings, number) for number in range(settings.replicas)]
        self.dispatcher = Dispatcher(self.replicas, settings.max_queue, self._made)
        self.created = int(time.time())
        self._fetching = ThreadPoolExecutor(_FETCHES, "cfg-parallel-fetch")
        self.app = FastAPI(title="cfg-parallel", version=__version__, lifespan=self._lifespan, openapi_url=None)
        self._add_routes()
        self.app.add_exception_handler(ApiError, self._on_api_error)  # type: ignore[arg-type]
        self.app.add_exception_handler(RequestValidationError, self._on_invalid)  # type: ignore[arg-type]
        self.app.add_exception_handler(HTTPException, self._on_http_error)  # type: ignore[arg-type]
        self.app.add_exception_handler(Exception, self._on_error)
        self.app.add_middleware(_Gate, server=self)  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        for replica in self.replicas:
            replica.start()
        self.dispatcher.start()
        try:
            yield
        finally:
            await self.dispatcher.close()
            self._fetching.shutdown(wait=False, cancel_futures=True)

    @property
    def facts(self) -> Facts:
        for replica in self.replicas:
            if replica.facts is not None:
                return replica.facts
        raise ApiError(503, "The model is being loaded; see /health.", "server_error", code="not_ready", retry_after=5)

    # Routes.

    def _add_routes(self) -> None:
        add = self.app.add_api_route
        add("/v1/images/generations", self.generations, methods=["POST"], response_model=None)
        add("/v1/images/edits", self.edits, methods=["POST"], response_model=None)
        add("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        add("/v1/models", self.models, methods=["GET"])
        add("/v1/models/{name:path}", self.model, methods=["GET"])
        add("/health", self.health, methods=["GET"], response_model=None)
        add("/metrics", self.show_metrics, methods=["GET"], response_model=None)
        add("/", self.page, methods=["GET"], response_model=None)
        add("/page/{name}", self.page, methods=["GET"], response_model=None)

    async def generations(self, request: Request, body: Generation) -> Response:
        self._check(body, 0, False)
        return await self._answer(request, "image_generation", body, [], None)

    async def edits(self, request: Request) -> Response:
        """Multipart: image (or image[]) once or several times, perhaps mask, and the fields of a generation."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise ApiError(400, "Expected multipart/form-data with an image and a prompt.", code="invalid_content_type")
        try:
            form = await request.form(max_files=_MOST_IMAGES + 1, max_fields=100)
        except ClientDisconnect as error:
            raise client_gone() from error
        fields: dict[str, Any] = {}
        files: dict[str, list[UploadFile]] = {"image": [], "mask": []}
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if name in files:
                if not isinstance(value, UploadFile):
                    raise ApiError(400, f"{name}: expected a file, but got text.", param=name, code="invalid_image")
                files[name].append(value)
            elif isinstance(value, UploadFile):
                raise ApiError(400, f"{name}: expected text, but got a file.", param=name, code="invalid_value")
            elif value != "" or name in ("prompt", "negative_prompt"):
                fields[name] = value.replace("\r\n", "\n")  # which browsers make of a line's end
        asked = _valid(Generation, fields)
        if not files["image"]:
            raise ApiError(400, "image: expected at least one picture.", param="image", code="missing_image")
        if len(files["mask"]) > 1:
            raise ApiError(400, "mask: expected one picture, but got several.", param="mask", code="invalid_value")
        self._check(asked, len(files["image"]), bool(files["mask"]))
        budget = _Budget(self.settings.max_input_pixels)
        images = [await budget.read(file.read, pictures.read, "image") for file in files["image"]]
        mask = await budget.read(files["mask"][0].read, pictures.read_mask, "mask") if files["mask"] else None
        return await self._answer(request, "image_edit", asked, images, mask)

    async def chat(self, request: Request, body: Chat) -> Response:
        """A picture for the last user message, from its text and its image_url parts."""
        message = next((message for message in reversed(body.messages) if message.role == "user"), None)
        if message is None or not message.content:
            raise ApiError(
                400, "messages: there is no user message with content.", param="messages", code="missing_prompt"
            )
        given = {"stream": body.stream, **(body.model_extra or {}), **body.extra_body}
        fields = {name: value for name, value in given.items() if name not in CHAT_FIELDS_WITHOUT_USE}
        texts, urls = _parts(message.content)
        asked = _valid(Generation, {**fields, "prompt": "\n".join(texts), "model": body.model})
        self._check(asked, len(urls), False)
        budget = _Budget(self.settings.max_input_pixels)
        images = [await budget.read(functools.partial(self._fetch, url), pictures.read, "image_url") for url in urls]
        job = self._submit(request, asked, images, None)
        head: dict[str, Any] = {
            "id": f"chatcmpl-{job.work.id}",
            "object": "chat.completion.chunk" if asked.stream else "chat.completion",
            "created": int(time.time()),
            "model": self.settings.name,
        }
        if asked.stream:
            if body.stream_options.include_usage:
                head["usage"] = None  # in all chunks but the last
            chunks = functools.partial(self._chunks, head, asked, job)
            return self._streamed(job, chunks, _chunk(head, {"role": "assistant"}))
        done = await self._wait(request, job)
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": await self._content(done, asked)},
        }
        return JSONResponse(head | {"choices": [choice], "usage": _USAGE} | self._extras(job, done))

    async def _chunks(self, head: dict[str, Any], asked: Generation, job: Job, event: Event) -> list[bytes]:
        """Of a chat: `progress` after a step and `partial_image` beside an empty delta, and then the message."""
        if isinstance(event, Step):
            return [_chunk(head, {}, progress=vars(event))]
        if isinstance(event, Partial):
            shown = [await self._shown(picture, asked) for picture in event.pictures]
            return [_chunk(head, {}, partial_image=each | {"partial_image_index": event.index}) for each in shown]
        chunks = [_chunk(head, {"content": await self._content(event, asked)}, "stop", **self._extras(job, event))]
        if "usage" in head:
            chunks.append(_data(head | {"choices": [], "usage": _USAGE}))
        return chunks

    async def _content(self, done: Done, asked: Generation) -> list[dict[str, Any]]:
        """Of the message that answers a chat."""
        start = f"data:image/{asked.output_format};base64,"
        urls = [start + await self._encode(picture, asked) for picture in done.pictures]
        return [{"type": "image_url", "image_url": {"url": url}} for url in urls]

    async def _fetch(self, url: str) -> bytes:
        most = int(self.settings.max_request_mb * 2**20)
        fetch = functools.partial(pictures.fetch, url, self.settings.allow_remote_images, most, "image_url")
        # Others' servers may be slow, and the loop's own threads are needed for everything else.
        return await asyncio.get_running_loop().run_in_executor(self._fetching, fetch)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        facts = next((replica.facts for replica in self.replicas if replica.facts is not None), None)
        shown = {} if facts is None else {"pipeline": vars(facts)}
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.created,
            "owned_by": "cfg-parallel",
        } | shown

    async def health(self) -> JSONResponse:
        """200 while a picture can be made: "ok", or "degraded" where a follower or a replica is lost. Else 503."""
        replicas = [replica.health for replica in self.replicas]
        states = [replica["state"] for replica in replicas]
        if self.dispatcher.stopping:
            status = "stopping"
        elif not any(replica.serves for replica in self.replicas):
            status = "failed" if all(state == "failed" for state in states) else "starting"
        else:
            status = "ok" if all(state == "ready" for state in states) else "degraded"
        shown: dict[str, Any] = {
            "status": status,
            "model": self.settings.name,
            "version": __version__,
            "replicas": replicas,
        }
        shown |= {"waiting": self.dispatcher.waiting, "running": self.dispatcher.running}
        return JSONResponse(shown, 200 if status in ("ok", "degraded") else 503)

    async def show_metrics(self) -> Response:
        states = [replica.health["state"] for replica in self.replicas]
        restarts = sum(replica.follower_restarts for replica in self.replicas)
        self.metrics.observe(self.dispatcher.waiting, self.dispatcher.running, states, restarts)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self, name: str = "index.html") -> Response:
        if not re.fullmatch(r"[a-z]+\.(html|js|css)", name) or not (_PAGE / name).is_file():
            raise ApiError(404, f"There is no page {name!r}.", code="not_found")
        return FileResponse(_PAGE / name, headers={"Cache-Control": "no-cache"})

    # A request.

    async def _answer(self, request: Request, kind: Kind, asked: Generation, images: list[Any], mask: Any) -> Response:
        job = self._submit(request, asked, images, mask)
        if asked.stream:
            return self._streamed(job, functools.partial(self._image_events, kind, asked, job))
        done = await self._wait(request, job)
        data = [{"b64_json": await self._encode(picture, asked)} for picture in done.pictures]
        answer: dict[str, Any] = {"created": int(time.time()), "data": data, **self._shape(done.pictures[0], asked)}
        return JSONResponse(answer | self._extras(job, done))

    async def _image_events(self, kind: Kind, asked: Generation, job: Job, event: Event) -> list[bytes]:
        """KIND.progress after a step, KIND.partial_image, and KIND.completed for each picture."""
        now: dict[str, Any] = {"created_at": int(time.time())}
        if isinstance(event, Step):
            return [_event(f"{kind}.progress", now | vars(event))]
        shown = [now | await self._shown(picture, asked) for picture in event.pictures]
        if isinstance(event, Partial):
            return [_event(f"{kind}.partial_image", each | {"partial_image_index": event.index}) for each in shown]
        return [_event(f"{kind}.completed", each | self._extras(job, event)) for each in shown]

    def _streamed(self, job: Job, told: Told, opening: bytes = b"") -> StreamingResponse:
        events = self._stream(job, told, opening)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _stream(self, job: Job, told: Told, opening: bytes) -> AsyncIterator[bytes]:
        """Server-sent events: the opening, what `told` makes of each event of the job, an error, and the end."""
        event: Event | None = None
        try:
            if opening:
                yield opening
            while not isinstance(event, Done):
                event = await job.next(_PING)
                if event is None:
                    yield b": waiting\n\n"  # by which a client that has gone is noticed
                    continue
                for message in await told(event):
                    yield message
        except ApiError as error:
            yield _event("error", error.body)
        except Exception as error:  # the answer has begun, so that this is how it is told
            tell("error", "error", request_id=job.request_id, error=repr(error))
            yield _event("error", ApiError(500, "The server has an error; see its log.", "server_error").body)
        finally:
            self._leave(job)
        yield b"data: [DONE]\n\n"

    async def _wait(self, request: Request, job: Job) -> Done:
        """Until the picture is there, or the client has gone."""

        try:
            while True:
                event = await job.next(_GONE)
                if isinstance(event, Done):
                    return event
                if await request.is_disconnected():
                    raise client_gone()
        finally:
            self._leave(job)

    def _leave(self, job: Job) -> None:
        """Nobody listens to the job any more."""
        if not job.over.is_set():
            self.dispatcher.cancel(job)
            tell("client gone", request_id=job.request_id)

    def _submit(self, request: Request, asked: Generation, images: list[Any], mask: Any) -> Job:
        facts, most = self.facts, self.settings
        if images and not facts.takes_size and math.prod(images[0].size) > most.max_pixels:
            message = (
                f"{facts.pipeline} makes a picture as large as the one sent, which has {math.prod(images[0].size)} "
            )
            raise ApiError(
                400, f"{message}pixels; at most {most.max_pixels} are made.", param="image", code="too_large"
            )
        seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        prompt: dict[str, Any] = {"prompt": asked.prompt}
        if asked.negative_prompt is not None:
            prompt["negative_prompt"] = asked.negative_prompt
        data: dict[str, Any] = {}
        if images:
            data["image"] = images[0] if len(images) == 1 else images
        if mask is not None:
            data["mask_image"] = mask
        if data:
            prompt["multi_modal_data"] = data
        names = ["true_cfg_scale", "guidance_scale", "num_inference_steps", "height", "width", "strength"]
        params = {name: value for name in names if (value := getattr(asked, name)) is not None}
        params["seed"] = seed
        if (facts.default_steps or 0) > most.max_steps:
            params.setdefault("num_inference_steps", most.max_steps)
        if asked.n > 1:
            params["num_outputs_per_prompt"] = asked.n
        work = Work(uuid.uuid4().hex, prompt, params, asked.partial_images, asked.compare)
        job = Job(work, request.state.request_id)
        self.dispatcher.submit(job)
        shown: dict[str, Any] = (
            {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt} if self.settings.log_prompts else {}
        )
        tell("queued", request_id=job.request_id, waiting=self.dispatcher.waiting, n=asked.n, **params, **shown)
        return job

    def _check(self, asked: Generation, images: int, mask: bool) -> None:
        """What can be known before a picture is looked at. Raises ApiError, also where one more may not come."""
        facts, most = self.facts, self.settings
        if asked.model is not None:
            self._check_model(asked.model)
        if asked.n > most.max_outputs:
            raise _too_large("n", asked.n, most.max_outputs, "pictures")
        if asked.num_inference_steps is not None and asked.num_inference_steps > most.max_steps:
            raise _too_large("num_inference_steps", asked.num_inference_steps, most.max_steps, "steps")
        if asked.height is not None and asked.width is not None:
            if asked.height * asked.width > most.max_pixels:
                raise _too_large("size", asked.height * asked.width, most.max_pixels, "pixels")
            if asked.height % 8 or asked.width % 8:
                raise ApiError(400, "size: expected multiples of 8.", param="size", code="invalid_value")
        if images and not facts.takes_image:
            raise ApiError(400, f"{facts.pipeline} takes no picture; use /v1/images/generations.", param="image")
        if facts.needs_image and not images:
            raise ApiError(
                400, f"{facts.pipeline} needs a picture; use /v1/images/edits.", param="image", code="missing_image"
            )
        if images > 1 and not facts.several_images:
            raise ApiError(400, f"{facts.pipeline} takes one picture, but got {images}.", param="image")
        if images > _MOST_IMAGES:
            raise _too_large("image", images, _MOST_IMAGES, "pictures")
        if mask and not facts.takes_mask:
            raise ApiError(400, f"{facts.pipeline} takes no mask.", param="mask")
        if asked.negative_prompt is not None and not facts.takes_negative_prompt:
            raise ApiError(400, f"{facts.pipeline} takes no negative_prompt.", param="negative_prompt")
        for scale in ("true_cfg_scale", "guidance_scale"):
            if getattr(asked, scale) is not None and scale not in facts.scales:
                takes = " and ".join(facts.scales) or "no guidance scale"
                raise ApiError(400, f"{facts.pipeline} takes no {scale}; it takes {takes}.", param=scale)
        if asked.partial_images and not facts.partial_images:
            raise ApiError(400, f"{facts.pipeline} has no partial images.", param="partial_images")
        self.dispatcher.admit()

    def _check_model(self, name: str) -> None:
        if name != self.settings.name:
            message = f"The model {name[:100]!r} is not served here; this is {self.settings.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    @staticmethod
    async def _encode(picture: Picture, asked: Generation) -> str:
        return await asyncio.to_thread(pictures.encode, picture, asked.output_format, asked.output_compression)

    async def _shown(self, picture: Picture, asked: Generation) -> dict[str, Any]:
        return {"b64_json": await self._encode(picture, asked)} | self._shape(picture, asked)

    @staticmethod
    def _shape(picture: Picture, asked: Generation) -> dict[str, Any]:
        width, height = picture.size
        return {
            "size": f"{width}x{height}",
            "output_format": asked.output_format,
            "quality": asked.quality or "auto",
            "background": "opaque",
        }

    def _extras(self, job: Job, done: Done) -> dict[str, Any]:
        """What OpenAI's answers do not have: the seed, times and what the report says."""
        return {
            "request_id": job.request_id,
            "seed": job.work.params["seed"],
            "metrics": {"queue_seconds": job.waited, **done.metrics},
        }

    def _made(self, job: Job, done: Done) -> None:
        self.metrics.made(done.metrics, len(done.pictures), job.waited)
        tell("made", request_id=job.request_id, queue_seconds=round(job.waited, 4), **done.metrics)

    # Errors.

    async def _on_api_error(self, request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status_code, error.headers)

    async def _on_invalid(self, request: Request, error: RequestValidationError) -> JSONResponse:
        return await self._on_api_error(request, error_of(list(error.errors())))

    async def _on_http_error(self, request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail.rstrip('.')}."
        answer = await self._on_api_error(request, ApiError(error.status_code, message, code=code))
        answer.headers.update(error.headers or {})
        return answer

    async def _on_error(self, request: Request, error: Exception) -> JSONResponse:
        tell("error", "error", request_id=getattr(request.state, "request_id", None), error=repr(error))
        return await self._on_api_error(request, ApiError(500, "The server has an error; see its log.", "server_error"))


class _Gate:
    """Before the routes: a request's id, the key, the body's size and time; after them, a line in the log."""

    def __init__(self, app: Any, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        settings, began, status = self._server.settings, time.monotonic(), 499
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = headers.get("x-request-id", "")
        if not re.fullmatch(r"[\w.-]{1,64}", request_id):
            request_id = f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # where the application is mounted
        endpoint = path if path in _ENDPOINTS else "other"
        most, got = int(settings.max_request_mb * 2**20), 0
        unread: bool | None = None  # whether more of the body is to come; None before it is read

        async def counted() -> Any:
            nonlocal got, unread
            if unread is False:
                return await receive()
            unread = True
            try:
                message = await asyncio.wait_for(receive(), began + settings.max_upload_seconds - time.monotonic())
            except asyncio.TimeoutError as error:
                text = f"The body was not complete after {settings.max_upload_seconds:g} s."
                raise ApiError(408, text, code="request_timeout") from error
            unread = message.get("more_body", False)
            got += len(message.get("body", b""))
            if got > most:
                raise _body_too_large(most)
            return message

        async def answered(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if unread:  # nor will it be, so that the connection cannot be used again
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        async def refuse(error: ApiError) -> None:
            nonlocal unread
            unread = True
            await JSONResponse(error.body, error.status_code, error.headers)(scope, receive, answered)

        try:
            if path.startswith("/v1/") and settings.api_key and not _has_key(headers, settings.api_key):
                await refuse(
                    ApiError(401, "The API key is missing or wrong.", "authentication_error", code="invalid_api_key")
                )
            elif headers.get("content-length", "").isdigit() and int(headers["content-length"]) > most:
                await refuse(_body_too_large(most))
            else:
                await self._app(scope, counted, answered)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.monotonic() - began
            self._server.metrics.requests.labels(endpoint, str(status)).inc()
            self._server.metrics.request_seconds.labels(endpoint).observe(seconds)
            if endpoint.startswith("/v1/"):
                tell("answered", request_id=request_id, path=endpoint, status=status, seconds=round(seconds, 4))


_ENDPOINTS = frozenset(
    ["/v1/images/generations", "/v1/images/edits", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/"]
)


def _has_key(headers: dict[str, str], key: str) -> bool:
    kind, _, given = headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(given.encode(), key.encode())


class _Budget:
    """Pixels that the pictures of one request may have together."""

    def __init__(self, pixels: int) -> None:
        self._left = pixels

    async def read(
        self, source: Callable[[], Awaitable[bytes]], decode: Callable[[bytes, int, str], Any], param: str
    ) -> Any:
        picture = await asyncio.to_thread(decode, await source(), self._left, param)
        self._left -= math.prod(picture.size)
        return picture


def _parts(content: str | list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Texts and URLs of a message: OpenAI's parts, and vLLM-Omni's {"text": ...} and {"image": BASE64}."""
    texts, urls = [], []
    for part in [{"text": content}] if isinstance(content, str) else content:
        kind = part.get("type", "text" if "text" in part else "image" if "image" in part else None)
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            at = part.get("image_url")
            url = at.get("url") if isinstance(at, dict) else at
            if not isinstance(url, str):
                raise ApiError(400, "image_url: expected a url.", param="messages", code="invalid_image_url")
            urls.append(url)
        elif kind == "image" and isinstance(part.get("image"), str):
            data = part["image"]
            urls.append(data if data.startswith("data:") else f"data:image/png;base64,{data}")
        else:
            raise ApiError(
                400, "messages: expected parts of type text or image_url.", param="messages", code="invalid_value"
            )
    return texts, urls


def _body_too_large(most: int) -> ApiError:
    return ApiError(413, f"The body has more than {most} bytes.", code="request_too_large")


def _too_large(param: str, value: int, most: int, of: str) -> ApiError:
    return ApiError(400, f"{param}: at most {most} {of}, but got {value}.", param=param, code="too_large")


def _valid(model: Any, fields: dict[str, Any]) -> Any:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise error_of(error.errors()) from error


def _event(name: str, what: dict[str, Any]) -> bytes:
    return f"event: {name}\n".encode() + _data({"type": name} | what)


def _chunk(head: dict[str, Any], delta: dict[str, Any], finish_reason: str | None = None, **beside: Any) -> bytes:
    return _data(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]} | beside)


def _data(what: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(what)}\n\n".encode()
