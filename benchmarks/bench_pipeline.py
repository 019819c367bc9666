"""A whole generation, prompt (and photo) in, picture out: one GPU against two, in one process and one run.

    python benchmarks/bench_pipeline.py --model qwen-image-edit --size 1024 --steps 20 --repeat 3

The reference is the stock diffusers pipeline on one GPU. Then `enable_cfg_parallel` is called on the same pipeline
object, and the same seed must give the same picture, element for element. A pipeline that batches its two branches (SD,
SDXL, SD 3) is timed as it is, and compared with itself running the two halves of the batch one after the other, because
cuBLAS picks other kernels for another batch size. Compiled modes are compared with one compiled GPU, unless
branches are batched there.

    python benchmarks/bench_pipeline.py --scale tiny --devices cpu,cpu --steps 4      # dry run, writes no file

Exit status: 0, 1 if a picture was wrong or differed, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import datetime
import io
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import models
from benchmarks.results_file import markdown_table, merge_rows
from benchmarks.timing import some_of

from cfg_parallel.stopwatch import stopwatch

# What each two-GPU mode passes to enable_cfg_parallel.
TWO_GPU_MODES: dict[str, dict[str, Any]] = {
    "two-gpu-eager": {"cuda_graphs": False},
    "two-gpu-graphs": {"cuda_graphs": True},
    "two-gpu-auto": {"cuda_graphs": "auto"},
    "two-gpu-compiled": {"cuda_graphs": True, "compile": True},
}
ONE_GPU = "one-gpu-eager"
WARMUP_STEPS = 4
SKIPPED_STEPS = 2  # the first two steps of a generation still fill caches and the launch queue

START = time.perf_counter()


class BenchmarkError(RuntimeError):
    """A picture that proves nothing: not finite, or of one colour."""


def say(line: str) -> None:
    print(f"[{time.perf_counter() - START:7.1f} s] {line}", flush=True)


class StepClock:
    """A `callback_on_step_end` that marks the end of each step without waiting for it.

    On a GPU it records an event. With predictions still pending when the callback runs, the event of a step may come
    before that step's last kernels, but by the same amount at every step, so the interval between two events is a step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        return {}

    def step_ms(self) -> list[float]:
        """Milliseconds of every step after the first `SKIPPED_STEPS`. To be called after a synchronize."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))[SKIPPED_STEPS - 1 :]
        if self.device.type == "cuda":
            return [before.elapsed_time(after) for before, after in pairs]
        return [(after - before) * 1e3 for before, after in pairs]


@dataclass
class Measured:
    """All repeats of one mode."""

    step_ms: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    stages_s: list[dict[str, float]] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    peak_gib: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Bench:
    """One pipeline, its inputs and the device it lives on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.leader = torch.device(args.devices[0])
        self.text_encoders: bool = getattr(args, "text_encoders", False)  # the rows of bench_step.py do without
        self.dtype = getattr(torch, args.dtype)
        self.image = Image.open(args.image).convert("RGB") if args.image else None
        self.image = self.inputs(args.steps).get("image")  # read once, and missing before 40 GB of weights are made
        say(f"building {args.model} ({args.scale}, {args.dtype}) on {self.leader}")
        self.pipe = models.build_pipeline(
            args.model,
            device=self.leader,
            dtype=self.dtype,
            seed=args.seed,
            scale=args.scale,
            text_encoders=self.text_encoders,
            log=say,
        )
        self.pipe.set_progress_bar_config(disable=True)

    def inputs(self, steps: int) -> dict[str, Any]:
        args = self.args
        inputs = models.inputs(
            args.model,
            size=args.size,
            steps=steps,
            seed=args.seed,
            device=self.leader,
            dtype=self.dtype,
            scale=args.scale,
            image=self.image,
            text_encoders=self.text_encoders,
        )
        return inputs | ({"output_type": "latent"} if getattr(args, "latents", False) else {})

    def generate(self, steps: int, clock: StepClock | None = None, **changes: Any) -> np.ndarray:
        """One generation with the run's seed: the picture (or the frames) as floats in [0, 1], or the latents."""
        hooks = {} if clock is None else {"callback_on_step_end": clock, "callback_on_step_end_tensor_inputs": []}
        output = self.pipe(**(self.inputs(steps) | changes), **hooks)
        shown = output.frames if hasattr(output, "frames") else output.images
        picture = shown.float().cpu().numpy() if isinstance(shown, torch.Tensor) else np.asarray(shown)
        if not np.isfinite(picture).all():
            raise BenchmarkError(f"{self.args.model} made a picture with nan or inf in it.")
        if picture.std() < 1e-3:
            raise BenchmarkError(f"{self.args.model} made a picture of one colour (std {picture.std():.2g}).")
        return picture

    def measure(self, mode: str, into: Measured) -> None:
        """One timed generation, added to `into`."""
        clock = StepClock(self.leader)
        self.synchronize()
        if self.leader.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.leader)
        with stopwatch(self.pipe, str(self.leader)) as times:
            picture = self.generate(self.args.steps, clock)
        total = times.end - times.start
        parts = {"encode_s": times.begun - times.start, "denoise_s": times.denoised - times.begun}
        parts["decode_s"] = times.end - times.denoised
        if not getattr(self.args, "latents", False) and picture.ndim == 4:  # no video
            start = time.perf_counter()
            as_image(picture[0]).save(io.BytesIO(), "png")
            parts["png_s"] = time.perf_counter() - start
            total += parts["png_s"]
        step_ms = clock.step_ms()
        into.step_ms += step_ms
        into.stages_s.append(parts)
        into.total_s.append(total)
        into.pictures.append(picture)
        if self.leader.type == "cuda":
            into.peak_gib = max(into.peak_gib or 0.0, torch.cuda.max_memory_allocated(self.leader) / 2**30)
        slowest = max(step_ms)
        say(f"{mode}: {statistics.median(step_ms):.2f} ms a step, at most {slowest:.2f}, {total:.2f} s in all")

    def synchronize(self) -> None:
        if self.leader.type == "cuda":
            torch.cuda.synchronize(self.leader)

    @property
    def denoiser(self) -> torch.nn.Module:
        return getattr(self.pipe, models.spec(self.args.model).denoiser_attribute)


def as_image(picture: np.ndarray) -> Image.Image:
    """As diffusers makes an image of floats."""
    return Image.fromarray((picture * 255).round().astype("uint8"))


@contextmanager
def half_batches(denoiser: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Run a batch of two branches as two batches of one. Yields a dict whose "split" counts the calls that were split.

    Good for the UNet and SD 3 calls of this benchmark, where whatever has the batch's length on dimension 0 is batched.
    """
    original = denoiser.forward
    count = {"split": 0}

    def take(value: Any, batch: int, half: int) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch:
            return value.chunk(2)[half]
        if isinstance(value, dict):
            return {key: take(item, batch, half) for key, item in value.items()}
        return value

    def forward(*args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["hidden_states"]
        batch = sample.shape[0]
        if batch % 2 or kwargs.get("return_dict", True):
            return original(*args, **kwargs)
        count["split"] += 1
        halves = [
            original(*(take(arg, batch, half) for arg in args), **{k: take(v, batch, half) for k, v in kwargs.items()})
            for half in (0, 1)
        ]
        return tuple(torch.cat(pair) for pair in zip(*halves, strict=True))

    denoiser.forward = forward  # type: ignore[method-assign]
    try:
        yield count
    finally:
        del denoiser.forward


def exact_reference(bench: Bench) -> tuple[np.ndarray, str]:
    """What two GPUs must reproduce, made on one GPU, and its name.

    The halves of a batched call run one after the other; without batched calls this is plain diffusers.
    """
    with half_batches(bench.denoiser) as count:
        picture = bench.generate(bench.args.steps)
    say(f"exact reference made; {count['split']} batched calls were run in halves")
    return picture, f"{ONE_GPU}, half-batches in turn" if count["split"] else ONE_GPU


def guidance_changes(bench: Bench) -> float:
    """Fraction of the picture that guidance changes in a few steps. If it is small, equal pictures prove little."""
    with_guidance = bench.generate(WARMUP_STEPS)
    without = bench.generate(WARMUP_STEPS, **models.guidance_off(bench.args.model))
    fraction = float((with_guidance != without).mean())
    if fraction < 0.01:
        raise BenchmarkError(f"Guidance changes only {fraction:.2%} of the picture; equality would prove nothing.")
    return fraction


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    import cfg_parallel

    if args.devices[0].startswith("cuda"):
        torch.cuda.set_device(args.devices[0])  # the clock's events are recorded on the current device
    bench = Bench(args)
    effect = guidance_changes(bench)  # also the warm-up of the one-GPU runs
    say(f"warm; guidance changes {effect:.0%} of the picture")
    reference, reference_name = exact_reference(bench)
    one = Measured()
    modes = {mode: Measured() for mode in args.mode}
    references = dict.fromkeys(modes, (reference, reference_name))
    for _ in range(args.repeat):
        bench.measure(ONE_GPU, one)
        for mode, two in modes.items():
            start = time.perf_counter()
            with cfg_parallel.enable_cfg_parallel(
                bench.pipe,
                cfg_parallel_size=2,
                devices=args.devices,
                transport=args.transport,
                **({"cuda_graphs": False} if args.devices[0] == "cpu" else TWO_GPU_MODES[mode]),
            ) as handle:
                two.extra["enable_s"] = round(time.perf_counter() - start, 2)
                say(f"enabled in {two.extra['enable_s']} s")
                bench.generate(WARMUP_STEPS)
                bench.measure(mode, two)
                two.extra["report"] = handle.report.to_dict()
                say(f"report\n{handle.report}")
    for mode in [mode for mode in modes if "compile" in TWO_GPU_MODES[mode]]:
        # Not for shapes that vary: one GPU sees two prompts, and would decide so.
        settings = TWO_GPU_MODES[mode] | {"compile_options": {"dynamic": False}}
        with cfg_parallel.enable_cfg_parallel(bench.pipe, cfg_parallel_size=1, **settings):
            references[mode] = bench.generate(args.steps), "one GPU, compiled"
        if reference_name != ONE_GPU:
            modes[mode].extra |= {"equal": None, "why": "one GPU compiles the forward of a batch, which is another"}
    if args.pictures:
        pictures = {mode: measured.pictures[0] for mode, measured in [(ONE_GPU, one), *modes.items()]}
        save_pictures(args.pictures, models.label(args.model), pictures)
    if reference_name == ONE_GPU and not np.array_equal(reference, one.pictures[0]):
        raise BenchmarkError("Two generations on one GPU with the same seed differ; equality cannot be tested.")
    rows = [row(args, ONE_GPU, one, one, one.pictures[0], ONE_GPU)]
    rows += [row(args, mode, two, one, *references[mode]) for mode, two in modes.items()]
    return [each | {"guidance_changes": round(effect, 4)} for each in rows]


def row(
    args: argparse.Namespace, mode: str, got: Measured, one: Measured, reference: np.ndarray, reference_name: str
) -> dict[str, Any]:
    median = statistics.median(got.step_ms)
    p10, p90 = np.percentile(got.step_ms, [10, 90])
    report = got.extra.get("report", {})
    follower_peak = report.get("follower_peak_bytes")
    gpu = torch.cuda.get_device_name(args.devices[0]) if args.devices[0].startswith("cuda") else platform.machine()
    return {
        "bench": "pipeline",
        "model": models.label(args.model, args.scale),
        "size": models.size_label(args.model, size=args.size, scale=args.scale),
        "steps": args.steps,
        "mode": mode,
        "transport": None if mode == ONE_GPU else report.get("transport", args.transport),
        "devices": args.devices[0] if mode == ONE_GPU else ",".join(args.devices),
        "ms": round(median, 3),
        "ms_p10": round(float(p10), 3),
        "ms_p90": round(float(p90), 3),
        "total_s": round(statistics.median(got.total_s), 3),
        **stages(got),
        "speedup": round(statistics.median(one.step_ms) / median, 4),
        "speedup_total": round(statistics.median(one.total_s) / statistics.median(got.total_s), 4),
        "equal": all(np.array_equal(picture, reference) for picture in got.pictures),
        "equal_to": reference_name,
        "differing": max(float((picture != reference).mean()) for picture in got.pictures),
        "picture_std": round(float(got.pictures[0].std()), 4),
        "latents": getattr(args, "latents", False),
        "repeat": args.repeat,
        "dtype": args.dtype,
        "seed": args.seed,
        "leader_peak_gib": None if got.peak_gib is None else round(got.peak_gib, 2),
        "follower_peak_gib": None if follower_peak is None else round(follower_peak / 2**30, 2),
        "gpu": gpu,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **got.extra,
    }


def stages(got: Measured) -> dict[str, float]:
    """Medians of the seconds of each part of a generation."""
    names = got.stages_s[0] if got.stages_s else {}
    return {name: round(statistics.median(times[name] for times in got.stages_s), 3) for name in names}


def save_pictures(folder: Path, model: str, pictures: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for mode, picture in pictures.items():
        while picture.ndim > 3:  # batch, and the frames of a video
            picture = picture[0]
        path = folder / f"{model}-{mode}.png"
        as_image(picture).save(path)
        say(f"wrote {path}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", type=models.argument, default="qwen-image-edit", help=f"{', '.join(models.SPECS)}, or a folder"
    )
    parser.add_argument("--size", type=int, help="side of the picture or lines of the video; default: the model's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=1, help="one GPU and each mode in turn, this many times")
    parser.add_argument("--mode", type=some_of(*TWO_GPU_MODES), default=["two-gpu-eager"], help="one or several")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="leader,follower")
    parser.add_argument("--scale", default="real", choices=["real", "tiny"], help="tiny: for a dry run")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, tiny: float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=Path, help="photo for an edit model (default: Matplotlib's sample portrait)")
    parser.add_argument("--out", type=Path, help="JSON file to merge the rows into (default: none is written)")
    parser.add_argument("--pictures", type=Path, help="folder to save the pictures in")
    args = parser.parse_args(argv)
    args.text_encoders = True
    args.devices = args.devices.split(",")
    args.dtype = args.dtype or ("bfloat16" if args.scale == "real" else "float32")
    if len(args.devices) != 2:
        parser.error(f"--devices: expected leader,follower, but got {','.join(args.devices)}")
    if args.steps <= SKIPPED_STEPS:
        parser.error(f"--steps: expected at least {SKIPPED_STEPS + 1}: the first {SKIPPED_STEPS} steps are not counted")
    if args.repeat < 1:
        parser.error("--repeat: expected at least 1")
    wanted = [torch.device(name) for name in args.devices]
    for device in wanted:
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            parser.error(
                f"--devices: {device} is not there ({torch.cuda.device_count()} GPUs are visible); "
                "for a dry run without GPUs: --scale tiny --devices cpu,cpu"
            )
    if args.image and not args.image.is_file():
        parser.error(f"--image: {args.image} is not a file")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        rows = run(args)
    except BenchmarkError as error:
        print(f"bench_pipeline: {error}", file=sys.stderr, flush=True)
        return 1
    print(markdown_table(rows), flush=True)
    if args.out:
        merge_rows(args.out, rows)
        say(f"wrote {args.out}")
    unequal = [item for item in rows if item["equal"] is False]
    for item in unequal:
        print(f"bench_pipeline: {item['mode']}: {item['differing']:.2%} of the picture differs", file=sys.stderr)
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
