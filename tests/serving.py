"""A server of its own process, as a user starts it, and the pictures it must give."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import torch
from PIL import Image

from cfg_parallel import Omni, OmniDiffusionSamplingParams
from helpers_demo import demo_model
from tiny import TINY

READY = " is ready at "


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)  # lines of stderr

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, body and headers of an answer."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, body, given), timeout=120) as answer:
                return answer.status, _body(answer), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, _body(error), error.headers

    def post(self, path: str, fields: Any) -> tuple[int, Any, Any]:
        return self.ask(path, json.dumps(fields).encode(), Content_Type="application/json")

    def health(self) -> dict[str, Any]:
        shown: dict[str, Any] = self.ask("/health")[1]
        return shown

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of the structured log; other lines are of libraries."""
        return [json.loads(line) for line in list(self.log) if line.startswith("{")]

    def workers(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children() if "serving.worker" in " ".join(p.cmdline())]

    def followers(self) -> list[psutil.Process]:
        return [
            child for worker in self.workers() for child in worker.children() if "follower" in " ".join(child.cmdline())
        ]


def _body(answer: Any) -> Any:
    data = answer.read()
    return json.loads(data) if "json" in answer.headers.get("content-type", "") else data.decode()


def serving_small(model: str, *options: str) -> contextlib.AbstractContextManager[Served]:
    """`serving` of an edit model that makes photographs small."""
    small = {"SMALL_MODEL": model, "PYTHONPATH": str(Path(__file__).parent)}
    return serving("small_models:build", *options, **small)


@contextlib.contextmanager
def serving(model: str, *options: str, wait: bool = True, **environment: str) -> Iterator[Served]:
    """`cfg-parallel serve` on two CPU processes and a free port, until the end of the block; nothing stays behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cfg_parallel.cli", "serve", model, "--port", "0", *(options or DEVICES)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    served = Served(process)
    assert process.stdout is not None and process.stderr is not None
    reader = threading.Thread(target=_collect, args=(process.stderr, served.log), daemon=True)
    reader.start()
    family: list[psutil.Process] = []
    try:
        if wait:
            line = process.stdout.readline()
            assert READY in line, "".join(served.log)
            served.url = line.strip().rpartition(READY)[2]
            family = psutil.Process(process.pid).children(recursive=True)
        yield served
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        reader.join(5)
        _, left = psutil.wait_procs(family, 10)
        for each in left:
            each.kill()
        assert not left, f"left behind: {left}"


DEVICES = ("--devices", "cpu,cpu", "--served-model-name", "tiny")


def _collect(lines: Any, into: list[str]) -> None:
    for line in lines:
        into.append(line.rstrip("\n"))


def image_of(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    file.name = f"picture.{format.lower()}"
    return file


def url_of(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(file_of(image).getvalue()).decode()


# Pictures as they are without a server.

FIELDS: dict[str, Any] = {"negative_prompt": "low quality", "true_cfg_scale": 4.0, "num_inference_steps": 3}
_engines: dict[str, Omni] = {}


@functools.cache
def models(folder: Path) -> dict[str, str]:
    """Folders of tiny pipelines: one that needs no picture, one that takes several."""
    import diffusers

    TINY["qwen_image"].build().save_pretrained(folder / "image")
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(demo_model()))
    diffusers.QwenImageEditPlusPipeline(**pipe.components).save_pretrained(folder / "plus")
    return {"image": str(folder / "image"), "plus": str(folder / "plus")}


def offline(model: str, seed: int, *images: Image.Image, size: int = 32, **params: Any) -> list[Image.Image]:
    """What plain diffusers gives on one device, in this process. `close_engines` ends what is kept for it."""
    if model not in _engines:
        torch.set_num_threads(1)
        _engines[model] = Omni(model, devices=["cpu"])
        _engines[model].pipe.set_progress_bar_config(disable=True)
    given = {"true_cfg_scale": 4.0, "num_inference_steps": 3, "height": size, "width": size, "seed": seed} | params
    prompt: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "low quality"}
    if images:
        prompt["multi_modal_data"] = {"image": images[0] if len(images) == 1 else list(images)}
    (output,) = _engines[model].generate(prompt, OmniDiffusionSamplingParams(**given))
    return output.images


def close_engines() -> None:
    while _engines:
        _engines.popitem()[1].close()
    models.cache_clear()


def same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))
