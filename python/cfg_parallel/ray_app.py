"""A Ray Serve application for more than one host: each of its replicas is one group, a leader and its followers, behind
the HTTP API of `cfg-parallel serve`.

    serve run cfg_parallel.ray_app:build model=Qwen/Qwen-Image-Edit cfg_parallel_size=2 replicas=4

or in Python `serve.run(build({"model": "Qwen/Qwen-Image-Edit", "cfg_parallel_size": 2, "replicas": 4}))`. Ray chooses
the hosts and the GPUs, spreads the requests and replaces replicas that fail. GET /health and /metrics are answered by
one replica, for itself; `serve status` is for all of them.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

try:
    from ray import serve
except ImportError as error:
    raise ImportError("cfg_parallel.ray_app needs Ray Serve: pip install 'cfg-parallel[ray]'.") from error

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cfg_parallel.errors import ConfigurationError
from cfg_parallel.preflight import enable_arguments
from cfg_parallel.serving.schemas import error_of
from cfg_parallel.serving.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Beyond those that wait and the one that runs, so that it is the application that says 429, and /health is answered.
_MORE_REQUESTS = 64
_LAST_PICTURE = 120.0  # seconds that a replica has to finish what it has, when it stops


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    model: str = Field(min_length=1)
    cfg_parallel_size: int | None = Field(None, ge=1)
    replicas: int = Field(1, ge=1)
    devices: tuple[str, ...] = ()
    num_cpus: float = Field(1, gt=0, allow_inf_nan=False)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    transport: Literal["auto", "host", "nccl", "peer"] = "auto"
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    compile: Literal["auto", "regional", "full", "off"] = "off"
    served_model_name: str | None = None
    api_key: str | None = Field(min_length=1, default_factory=lambda: os.environ.get("CFG_PARALLEL_API_KEY") or None)
    max_queue: int = Field(Settings.max_queue, ge=0)
    max_steps: int = Field(Settings.max_steps, ge=1, le=1000)
    max_pixels: int = Field(Settings.max_pixels, ge=1)
    max_outputs: int = Field(Settings.max_outputs, ge=1)
    max_request_mb: float = Field(Settings.max_request_mb, gt=0, allow_inf_nan=False)
    max_upload_seconds: float = Field(Settings.max_upload_seconds, gt=0, allow_inf_nan=False)
    max_step_seconds: float = Field(Settings.max_step_seconds, gt=0, allow_inf_nan=False)
    allow_remote_images: bool = False
    log_prompts: bool = False

    @field_validator("devices", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return [device.strip() for device in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_group(self) -> _Arguments:
        size = self.cfg_parallel_size or len(self.devices) or 2
        cpus, gpus = ["cpu"] * size, [f"cuda:{gpu}" for gpu in range(size)]
        self.devices = self.devices or tuple(gpus)
        if sorted(self.devices) not in (cpus, sorted(gpus)):
            raise ValueError(
                f"devices: expected {','.join(cpus)} or {','.join(gpus)}, which counts those that Ray gives a replica, "
                f"but got {','.join(self.devices)}"
            )
        return self

    def settings(self) -> Settings:
        """Of one group: the replicas are Ray's."""
        enable = enable_arguments(self.transport, self.cuda_graphs, self.compile)
        ours = self.model_dump(exclude={"replicas"})
        same = {each.name: ours[each.name] for each in fields(Settings) if each.name in ours}
        return Settings(**same, enable=tuple(enable.items()))


def build(args: dict[str, Any]) -> serve.Application:
    """The application, for `serve.run`, `serve run` and config files of Ray Serve. Values may be text.

    model: a Hugging Face id, or a folder that every host has. Required.
    cfg_parallel_size: devices of a replica (default: 2, or those of `devices`).
    replicas: groups, each a replica of Ray's (default: 1).
    devices: of one group: cpu,cpu (default: as many GPUs, which Ray is asked for).
    num_cpus: what Ray is asked for, for each replica; also its CPU threads, unless OMP_NUM_THREADS says (default: 1).
    dtype, transport, cuda_graphs, compile, served_model_name, api_key, max_queue, max_steps, max_pixels, max_outputs,
    max_request_mb, max_upload_seconds, max_step_seconds, allow_remote_images, log_prompts: as the flags of
    `cfg-parallel serve`. The limits are a replica's.

    Raises ConfigurationError for an argument that is unknown, missing or bad."""
    try:
        asked = _Arguments.model_validate(args)
    except ValidationError as error:
        first = error.errors()[0]
        message = error_of([first]).detail
        if first["type"] in ("extra_forbidden", "missing"):
            message += f" build takes {', '.join(_Arguments.model_fields)}."
        raise ConfigurationError(message) from None
    settings = asked.settings()

    def app() -> FastAPI:
        """In the replica, as it cannot be pickled. Ray runs its lifespan there, and with it the engine's process."""
        from cfg_parallel.serving.app import Server
        from cfg_parallel.serving.observability import set_up_logs

        set_up_logs()
        server = Server(settings)
        (server.app.state.group,) = server.replicas
        server.app.add_middleware(_WithoutRequestId)
        return server.app

    class Group:
        app: FastAPI  # of serve.ingress

        async def check_health(self) -> None:
            """The first one, without which a replica gets no requests, is asked after the lifespan has begun, and waits
            for the model. A lost follower, or engine, is replaced by the group; only when it gives up does this raise,
            and Ray replaces the replica."""
            group = self.app.state.group
            if group.facts is None:
                await group.loaded()
            if group.state == "failed":
                raise RuntimeError(group.failure)

    deployment = serve.deployment(
        name="cfg-parallel",
        num_replicas=asked.replicas,
        ray_actor_options={"num_cpus": asked.num_cpus, "num_gpus": sum(device != "cpu" for device in asked.devices)},
        max_ongoing_requests=settings.max_queue + 1 + _MORE_REQUESTS,
        graceful_shutdown_timeout_s=_LAST_PICTURE,
    )
    return deployment(serve.ingress(app)(Group)).bind()


class _WithoutRequestId:
    """Ray's proxy gives each request an id, which the server takes over; and both would send it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, without)
