"""What a request may hold, in OpenAI's names with those of diffusers beside them, and how an error is told."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

MAX_PROMPT = 32_000  # characters
_MAX_SEED = 2**63 - 1


class ApiError(HTTPException):
    """An error in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message, {} if retry_after is None else {"Retry-After": str(retry_after)})
        self.type, self.param, self.code = type, param, code

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.detail, "type": self.type, "param": self.param, "code": self.code}}


class Generation(BaseModel):
    """How to make a picture. All but the prompt may be left out.

    Fields that are not OpenAI's: negative_prompt, true_cfg_scale, guidance_scale, num_inference_steps, seed, height and
    width (in place of size), strength, compare (run one device as well, for the time and the bits)."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    model: str | None = None
    n: int = Field(1, ge=1)
    size: str | None = None
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100)
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)

    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    true_cfg_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    num_inference_steps: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, le=_MAX_SEED)
    height: int | None = Field(None, ge=8)
    width: int | None = Field(None, ge=8)
    strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    compare: bool = False

    # Of OpenAI's own models; no pipeline has them.
    user: str | None = None
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = None
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None
    background: Literal["auto", "opaque"] | None = None
    input_fidelity: Literal["high", "low"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        given = _without_null(data)
        if isinstance(given, dict) and "num_outputs_per_prompt" in given:  # as vLLM-Omni's clients say
            given.setdefault("n", given.pop("num_outputs_per_prompt"))
        return given

    @model_validator(mode="after")
    def _size(self) -> Generation:
        if self.size is not None and self.size != "auto":
            match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", self.size)
            if match is None:
                raise ValueError(f"size: expected WIDTHxHEIGHT, such as 1024x1024, or auto, but got {self.size[:40]!r}")
            if (self.height, self.width) != (None, None):
                raise ValueError("size: give size, or height and width, not both")
            self.width, self.height = int(match[1]), int(match[2])
        if (self.height is None) != (self.width is None):
            raise ValueError("size: give both height and width, or neither")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images: pictures on the way need stream=true")
        if self.partial_images and self.compare:
            raise ValueError("partial_images: their decoding would count in the time that is compared; leave them out")
        return self


def _without_null(data: Any) -> Any:
    """A field that is null is one that is not there."""
    return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: str
    content: str | list[dict[str, Any]] | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        return _without_null(data)


class Chat(BaseModel):
    """A chat whose last user message has the prompt and the pictures. Everything else is as in `Generation`, beside the
    messages or in an `extra_body`."""

    model_config = ConfigDict(extra="allow")

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    extra_body: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        return _without_null(data)


# Of OpenAI's chat: nothing for a picture to follow.
_CHAT = """audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens metadata
modalities parallel_tool_calls prediction presence_penalty prompt_cache_key reasoning_effort response_format
safety_identifier service_tier stop store temperature tool_choice tools top_logprobs top_p verbosity
web_search_options"""
CHAT_FIELDS_WITHOUT_USE = frozenset(_CHAT.split())


def error_of(errors: list[Any]) -> ApiError:
    """The first of pydantic's errors, as OpenAI tells it."""
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and ": " in message:
        param, message = message.split(": ", 1)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: {param!r}.", param=param, code="unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    if first["type"] == "missing" and not param:
        return ApiError(400, "The request has no body.", code="invalid_json")
    given = first.get("input")
    shown = (
        f", but got {str(given)[:60]!r}" if first["type"] != "missing" and isinstance(given, (str, int, float)) else ""
    )
    return ApiError(
        400, f"{param}: {message}{shown}." if param else f"{message}.", param=param or None, code="invalid_value"
    )
