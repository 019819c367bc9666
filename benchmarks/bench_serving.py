"""A server under load, and what it costs over the offline call.

    python benchmarks/bench_serving.py --model qwen-image-edit --size 1024 --steps 50 --clients 4 --requests 8 \
        --out benchmarks/results/serving.json
    python benchmarks/bench_serving.py --scale tiny --devices cpu,cpu --clients 16 --requests 50 --max-queue 8
    python benchmarks/bench_serving.py --scale tiny --devices cpu,cpu --clients 16 --requests 50 --max-queue 8 --kill 5

First the offline engine makes the picture of each seed and is timed, then `cfg-parallel serve` is started on the same
devices, asked by one client for the same pictures, and then by all clients at once, each of which goes on at once with
its next request, or after a 429. With --kill, a follower is killed every so many seconds. Every picture is compared
with the offline one of its seed, and every request has to be answered: with a picture, or with 429.

Exit status: 0, 1 if a picture was wrong or a request was not answered so, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import functools
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import models
from benchmarks.results_file import markdown_table, merge_rows

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("qwen-image", "qwen-image-edit")  # with a text encoder, so that a prompt goes in
COLUMNS = ("model", "size", "steps", "mode", "clients", "requests", "pictures", "busy", "failed", "wrong")
COLUMNS += ("pictures_per_s", "p50_s", "p95_s", "offline_s", "server_s", "overhead", "kills")
SEEDS = 4  # of the pictures that are asked for again and again
BUSY_PAUSE = 0.1  # seconds after a 429


def build(device: str) -> Any:
    """What `cfg-parallel serve benchmarks.bench_serving:build` serves; the arguments are in the environment."""
    name, scale = os.environ["BENCH_SERVING"].split(",")
    dtype = torch.float32 if scale == "tiny" else torch.bfloat16
    pipe = models.build_pipeline(name, device=device, dtype=dtype, scale=scale)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass
class Request:
    """The same picture for the offline engine and for the server."""

    model: str
    scale: str
    size: int
    steps: int

    @functools.cached_property
    def photo(self) -> Image.Image:
        return models.photo(self.size)

    @property
    def fields(self) -> dict[str, Any]:
        call = models.inputs(self.model, size=self.size, steps=self.steps, scale=self.scale)
        fields = {"prompt": call["prompt"], "negative_prompt": call["negative_prompt"]}
        return fields | {"true_cfg_scale": call["true_cfg_scale"], "num_inference_steps": self.steps}

    def offline(self, engine: Any, seed: int) -> Image.Image:
        from cfg_parallel import OmniDiffusionSamplingParams

        fields = self.fields
        prompt = {name: fields.pop(name) for name in ("prompt", "negative_prompt")}
        if self.model == "qwen-image-edit":
            prompt["multi_modal_data"] = {"image": self.photo}
        params = OmniDiffusionSamplingParams(**fields, height=self.size, width=self.size, seed=seed)
        image: Image.Image = engine.generate(prompt, params)[0].images[0]
        return image

    def post(self, url: str, seed: int) -> tuple[int, Image.Image | None, str]:
        """Status, picture, and what an error says."""
        fields = self.fields | {"size": f"{self.size}x{self.size}", "seed": seed}
        if self.model == "qwen-image-edit":
            path, kind, body = "edits", "multipart/form-data; boundary=xx", self._form(fields)
        else:
            path, kind, body = "generations", "application/json", json.dumps(fields).encode()
        request = urllib.request.Request(f"{url}/v1/images/{path}", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=3600) as answer:
                data = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
                return answer.status, Image.open(io.BytesIO(data)).convert("RGB"), ""
        except urllib.error.HTTPError as error:
            return error.code, None, error.read().decode()
        except OSError as error:
            return 0, None, repr(error)

    @functools.cached_property
    def _file(self) -> bytes:
        file = io.BytesIO()
        self.photo.save(file, "PNG", compress_level=1)
        return file.getvalue()

    def _form(self, fields: dict[str, Any]) -> bytes:
        parts = [(f'name="{name}"', str(value).encode()) for name, value in fields.items()]
        parts.append(('name="image"; filename="photo.png"', self._file))
        lines = [b"--xx\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (h.encode(), d) for h, d in parts]
        return b"".join(lines) + b"--xx--\r\n"


@dataclass
class Load:
    """What the clients saw."""

    answers: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    seconds: list[float] = field(default_factory=list)  # of answers with a picture
    errors: list[str] = field(default_factory=list)


def offline(request: Request, devices: list[str]) -> tuple[list[Image.Image], float]:
    """The picture of each seed, and the median of the seconds that one takes."""
    from cfg_parallel import DiffusionParallelConfig, Omni

    config = DiffusionParallelConfig(cfg_parallel_size=len(devices))
    with Omni(build(devices[0]), parallel_config=config, devices=devices) as engine:
        for _ in range(2):
            request.offline(engine, 0)
        seconds, pictures = [], []
        for seed in range(SEEDS):
            began = time.perf_counter()
            pictures.append(request.offline(engine, seed))
            seconds.append(time.perf_counter() - began)
    return pictures, statistics.median(seconds)


@contextlib.contextmanager
def server(devices: list[str], max_queue: int) -> Iterator[tuple[psutil.Process, str]]:
    command = [sys.executable, "-m", "cfg_parallel.cli", "serve", "benchmarks.bench_serving:build", "--port", "0"]
    command += ["--devices", ",".join(devices), "--max-queue", str(max_queue)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " is ready at " not in line:
            raise SystemExit(f"bench_serving: the server ended with exit status {process.wait()}")
        yield psutil.Process(process.pid), line.strip().rpartition(" is ready at ")[2]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ask(request: Request, url: str, pictures: list[Image.Image], clients: int, requests: int) -> Load:
    load, lock = Load(), threading.Lock()
    bar = tqdm(total=clients * requests, desc=f"{clients} clients", mininterval=2)

    def client(number: int) -> None:
        draw = random.Random(number)
        for _ in range(requests):
            seed, began = draw.randrange(SEEDS), time.perf_counter()
            status, picture, error = request.post(url, seed)
            seconds = time.perf_counter() - began
            same = picture is not None and np.array_equal(np.asarray(picture), np.asarray(pictures[seed]))
            with lock:
                load.answers[status] += 1
                if status == 200:
                    load.seconds.append(seconds)
                    load.wrong += not same
                elif status != 429:
                    load.errors.append(f"{status}: {error[:300]}")
                bar.update()
            if status == 429:
                time.sleep(BUSY_PAUSE)

    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client, number) for number in range(clients)]:
            done.result()
    bar.close()
    return load


def kill_followers(process: psutil.Process, every: float, over: threading.Event, kills: list[float]) -> None:
    while not over.wait(every):
        for each in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "cfg_parallel.follower" in " ".join(each.cmdline()):
                    each.kill()
                    kills.append(time.monotonic())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    request = Request(args.model, args.scale, args.size, args.steps)
    pictures, offline_s = offline(request, args.devices)
    kills: list[float] = []
    with server(args.devices, args.max_queue) as (process, url):
        ask(request, url, pictures, 1, 2)
        alone = ask(request, url, pictures, 1, args.sequential)
        over = threading.Event()
        if args.kill:
            threading.Thread(target=kill_followers, args=(process, args.kill, over, kills), daemon=True).start()
        began = time.perf_counter()
        load = ask(request, url, pictures, args.clients, args.requests)
        seconds = time.perf_counter() - began
        over.set()
    for error in load.errors[:5]:
        print(f"bench_serving: {error}", file=sys.stderr)
    server_s = statistics.median(alone.seconds)
    latencies = sorted(load.seconds)
    gpu = torch.cuda.get_device_name(0) if args.devices[0] != "cpu" else "cpu"
    return {
        "bench": "serving",
        "model": args.model if args.scale == "real" else f"{args.model} ({args.scale})",
        "size": f"{args.size}x{args.size}",
        "steps": args.steps,
        "mode": "followers killed" if args.kill else "served",
        "devices": ",".join(args.devices),
        "clients": args.clients,
        "requests": args.clients * args.requests,
        "max_queue": args.max_queue,
        "pictures": load.answers[200],
        "busy": load.answers[429],
        "failed": sum(count for status, count in load.answers.items() if status not in (200, 429)),
        "wrong": load.wrong + alone.wrong,
        "kills": len(kills),
        "pictures_per_s": round(load.answers[200] / seconds, 4),
        "p50_s": round(statistics.median(latencies), 4),
        "p95_s": round(latencies[int(0.95 * (len(latencies) - 1))], 4),
        "offline_s": round(offline_s, 4),
        "server_s": round(server_s, 4),
        "overhead": round(server_s / offline_s - 1, 5),
        "gpu": gpu,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-image-edit", choices=MODELS)
    parser.add_argument("--scale", default="real", choices=["real", "tiny"], help="tiny: for CPUs")
    parser.add_argument("--size", type=int, help="side of the picture; default: the model's")
    parser.add_argument("--steps", type=int, help="default: 50, tiny: 3")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="leader,follower")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=8, help="of each client")
    parser.add_argument("--sequential", type=int, default=SEEDS, help="requests of one client, for the overhead")
    parser.add_argument("--max-queue", type=int, default=8)
    parser.add_argument("--kill", type=float, default=0.0, metavar="SECONDS", help="kill a follower so often")
    parser.add_argument("--out", type=Path, help="JSON file to merge the row into (default: none is written)")
    args = parser.parse_args(argv)
    args.devices = args.devices.split(",")
    args.size = args.size or models.resolution(args.model, scale=args.scale)["height"]
    args.steps = args.steps or (50 if args.scale == "real" else 3)
    for name in ("clients", "requests", "sequential"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1")
    if args.devices[0] != "cpu" and torch.cuda.device_count() < len(args.devices):
        parser.error(f"--devices: {len(args.devices)} GPUs are needed, and {torch.cuda.device_count()} are visible")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ["BENCH_SERVING"] = f"{args.model},{args.scale}"
    if args.devices[0] == "cpu":
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    row = measure(args)
    print(markdown_table([row], COLUMNS))
    if args.out:
        merge_rows(args.out, [row])
        print(f"wrote {args.out}")
    return 1 if row["wrong"] or row["failed"] or row["pictures"] + row["busy"] != row["requests"] else 0


if __name__ == "__main__":
    sys.exit(main())
