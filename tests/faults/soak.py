"""Thousands of generations: `python tests/faults/soak.py --generations 2000 [--device cuda] [--out ...] [--chart ...]`.

One enabled pipeline with two LoRAs. Shapes, prompts, steps, seeds and the number of branches are drawn at random; now
and then a LoRA is switched, a generation is interrupted, a callback raises, or the follower is killed. Every tenth
image is compared with the one of one device. What each process holds is noted after every generation (resident memory,
and memory of each GPU); the result is by how much it has grown from generations 100 to 200 to the last hundred.

Exit status: 0, or 1 if an image was wrong or memory has grown by a hundredth. LoRAs need peft.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch

if str(Path(__file__).parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import cfg_parallel
from faults.world import gpu_memory
from test_lora import save_lora
from tiny import TINY, generate

WARM = 100  # generations; memory is compared with that of the hundred after them
LIMIT = 0.01
PROMPTS = [" ".join(["a cat"] * words) for words in (1, 2, 3, 5, 8)]


class Soak:
    def __init__(self, name: str, device: str, folder: Path) -> None:
        self.tiny = TINY[name]
        self.device = device
        loras = {adapter: save_lora(name, folder, seed) for seed, adapter in enumerate("ab")}
        self.plain, self.pipe = (self._build(loras) for _ in range(2))
        devices = ["cpu", "cpu"] if device == "cpu" else None
        self.handle: Any = cfg_parallel.enable_cfg_parallel(self.pipe, devices=devices, follower_timeout=10)
        self.counts = dict.fromkeys(
            ["generations", "compared", "wrong", "lora switches", "interrupts", "errors", "kills", "one branch"], 0
        )
        self.memory: list[dict[str, float]] = []

    def _build(self, loras: dict[str, Path]) -> Any:
        pipe = self.tiny.build().to(self.device)
        for adapter, path in loras.items():
            pipe.load_lora_weights(path, adapter_name=adapter)
        pipe.set_adapters("a")
        return pipe

    def draw(self, rng: random.Random) -> dict[str, Any]:
        arguments = {
            "size": (16 * rng.randint(1, 4), 16 * rng.randint(1, 4)),
            "num_inference_steps": rng.randint(2, 4),
            "prompt": rng.choice(PROMPTS),
            "negative_prompt": rng.choice(PROMPTS),
        }
        if rng.random() < 0.1:
            arguments[self.tiny.scale_kwarg] = 1.0
        return self.tiny.inputs(rng.randrange(1000), **arguments)

    def one(self, rng: random.Random) -> None:
        if rng.random() < 0.03:
            self.counts["lora switches"] += 1
            adapters, weights = rng.choice([("a", 1.0), ("b", 0.5), (["a", "b"], [0.7, -0.3])])
            for pipe in (self.pipe, self.plain):
                pipe.set_adapters(adapters, weights)
        seed = rng.randrange(1 << 30)
        arguments = self.draw(random.Random(seed))
        self.counts["one branch"] += arguments[self.tiny.scale_kwarg] == 1.0
        event = rng.choices(["", "interrupts", "errors", "kills"], [0.95, 0.02, 0.02, 0.01])[0]
        if event:
            self.counts[event] += 1
            arguments["callback_on_step_end"] = getattr(self, f"_{event}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of followers that are lost, and of guidance that is off
            try:
                image = generate(self.pipe, arguments, seed)
            except ZeroDivisionError:
                image = None
        self.counts["generations"] += 1
        if image is not None and event != "interrupts" and self.counts["generations"] % 10 == 0:
            self.counts["compared"] += 1
            expected = generate(self.plain, self.draw(random.Random(seed)), seed)
            self.counts["wrong"] += not torch.equal(image, expected)
        if event == "kills":
            self.handle.wait_until_ready(120)
        self._note()

    def _interrupts(self, pipe: Any, step: int, timestep: Any, values: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    def _errors(self, pipe: Any, step: int, timestep: Any, values: Any) -> dict[str, Any]:
        raise ZeroDivisionError("on purpose")

    def _kills(self, pipe: Any, step: int, timestep: Any, values: Any) -> dict[str, Any]:
        process = self.handle._leader.remotes[0].process
        if process.poll() is None:
            os.kill(process.pid, 9)
        return {}

    def _note(self) -> None:
        if len(self.memory) % 10 == 0:
            gc.collect()
        held = {"leader": psutil.Process().memory_info().rss / 2**20}
        process = self.handle._leader.remotes[0].process
        with contextlib.suppress(psutil.NoSuchProcess):
            held["follower"] = psutil.Process(process.pid).memory_info().rss / 2**20
        if self.device == "cuda":
            held |= gpu_memory()
        self.memory.append(held)

    def growth(self) -> dict[str, float]:
        """By name: the part that has come since the first hundred generations."""
        grown = {}
        for name in self.memory[0]:
            then = [held[name] for held in self.memory[WARM : 2 * WARM] if name in held]
            now = [held[name] for held in self.memory[-WARM:] if name in held]
            grown[name] = round(statistics.median(now) / statistics.median(then) - 1, 5)
        return grown


def draw_chart(memory: list[dict[str, float]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in memory[0]:
        axes.plot([held.get(name, float("nan")) for held in memory], label=name, linewidth=1)
    axes.axvline(WARM, color="black", linewidth=0.6, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("generation")
    axes.set_ylabel("MiB in use")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--pipeline", default="qwen_image", choices=["qwen_image", "flux"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file whose row of this pipeline and device is replaced")
    parser.add_argument("--chart", type=Path, help="PNG file for the memory line")
    options = parser.parse_args(argv)
    if options.generations < 3 * WARM:
        parser.error(f"--generations: expected at least {3 * WARM}")
    torch.set_num_threads(1)
    rng, start = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options.pipeline, options.device, Path(folder))
        with soak.handle:
            for i in range(options.generations):
                soak.one(rng)
                if i % 100 == 99:
                    held = {name: round(mib, 1) for name, mib in soak.memory[-1].items()}
                    print(f"{i + 1} generations, {time.monotonic() - start:.0f} s, MiB {held}", flush=True)
    growth = soak.growth()
    row = {
        "bench": "soak",
        "pipeline": options.pipeline,
        **{name.replace(" ", "_"): count for name, count in soak.counts.items()},
        "growth": growth,
        "seconds": round(time.monotonic() - start, 1),
        "device": "cpu" if options.device == "cpu" else f"2x {torch.cuda.get_device_name(0)}",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    print(json.dumps(row, indent=1))
    if options.out:
        old = json.loads(options.out.read_text()) if options.out.exists() else []
        kept = [each for each in old if (each["pipeline"], each["device"]) != (row["pipeline"], row["device"])]
        options.out.write_text(json.dumps([*kept, row], indent=1) + "\n")
    if options.chart:
        draw_chart(
            soak.memory, f"{row['generations']} generations of {options.pipeline}, {row['device']}", options.chart
        )
    return 1 if soak.counts["wrong"] or max(growth.values()) >= LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
