"""The command `cfg-parallel`: `edit` runs the main job on a photograph, `demo` runs it on a model made on the spot,
`serve` serves a model, `doctor` says what is wrong here, `bench` measures this machine, and `models` lists pipelines.

Exit status: 0 for a picture (with --compare: an equal one), 1 when --compare found a difference, 2 when nothing was
done, with one line on stderr that names the fix (of `serve`, behind the lines of its log).
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cfg_parallel import __version__
from cfg_parallel.errors import CfgParallelError, ConfigurationError


def main(argv: list[str] | None = None) -> int:
    """Run `cfg-parallel` with these arguments (default: the process's) and return its exit status."""
    try:
        args = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except CfgParallelError as error:
        print(f"cfg-parallel: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see `{self.prog} --help`)")


def _models(args: argparse.Namespace) -> int:
    import json

    from cfg_parallel import models

    rows = models.pipelines(args.words)
    print(json.dumps(rows, indent=1) if args.json else models.table(rows))
    return 0


def _edit(args: argparse.Namespace) -> int:
    from cfg_parallel.edit import run_edit

    return run_edit(args)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cfg-parallel", description="Runs the guidance passes of a diffusers pipeline on several devices."
    )
    parser.add_argument("--version", action="version", version=f"cfg-parallel {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    edit = commands.add_parser("edit", help="edit a picture with any diffusers model", description="Edits a picture.")
    add_edit_arguments(edit)
    edit.set_defaults(command=_edit)
    demo = commands.add_parser(
        "demo",
        help="run the whole thing on a tiny model that is made here, without a download",
        description="Builds a tiny Qwen-Image-Edit with random weights and edits a photograph on one device and two.",
    )
    demo.add_argument(
        "--output", type=_path, default="cfg-parallel-demo.png", metavar="FILE", help="default: %(default)s"
    )
    demo.add_argument(
        "--model-dir", type=_path, metavar="DIR", help="where the model is, or is built (default: a cache folder)"
    )
    demo.add_argument("--model-only", action="store_true", help="build the model, print its folder and stop")
    demo.add_argument("--num-inference-steps", type=_steps, default=4, metavar="N", help="default: %(default)s")
    demo.set_defaults(command=_demo)
    models = commands.add_parser(
        "models",
        help="list the diffusers pipelines that use guidance, and what is known of each",
        description="Lists pipelines: how they apply guidance, whether they ran in parallel with an equal result.",
    )
    models.add_argument("words", nargs="*", metavar="WORD", help="a part of a name, in any case (default: all)")
    models.add_argument("--json", action="store_true", help="the rows as JSON")
    models.set_defaults(command=_models)
    doctor = commands.add_parser(
        "doctor",
        help="look at GPUs, links, this installation and a model, and say what to mend",
        description="Looks at everything that a run needs. Exit status 1 if something does not work.",
    )
    doctor.add_argument("--model", type=_path, metavar="MODEL", help="a folder or a Hugging Face id: does it fit?")
    doctor.add_argument(
        "--devices", type=_devices, metavar="LIST", help="default: the first two GPUs, or CPU processes"
    )
    doctor.add_argument("--quick", action="store_true", help="start no follower")
    doctor.add_argument("--json", action="store_true", help="the findings as JSON")
    doctor.set_defaults(command=_doctor)
    bench = commands.add_parser(
        "bench",
        help="measure this machine: kernels, exchange, steps and whole generations, with a table of speed-ups",
        description="Runs the benchmarks, on models of the published geometry with random weights. Parts: "
        "combine (guidance kernels), exchange (between two GPUs), step (a denoising step), pipeline (prompt to PNG).",
    )
    bench.add_argument(
        "--model",
        type=_names,
        metavar="LIST",
        help="such as sdxl,qwen-image@512 (with random weights), or folders with weights (default: seven)",
    )
    bench.add_argument("--size", type=_pixels, metavar="PIXELS", help="of all models (default: each model's)")
    bench.add_argument("--steps", type=_steps, metavar="N", help="default: 20 for steps, 50 for whole generations")
    bench.add_argument("--devices", type=_devices, metavar="LIST", help="default: the first two GPUs, or CPU processes")
    bench.add_argument("--only", type=_parts, metavar="LIST", help="some of the parts (default: all)")
    bench.add_argument("--quick", action="store_true", help="small models, few steps, nothing compiled")
    bench.add_argument("--out", type=_path, default="cfg-parallel-bench", metavar="DIR", help="default: %(default)s")
    bench.set_defaults(command=_bench)
    serve = commands.add_parser(
        "serve",
        help="serve a model with OpenAI's API for pictures, and a web page",
        description="Serves a model: /v1/images/generations and edits, /v1/chat/completions, /health and /metrics.",
    )
    _add_serve_arguments(serve)
    serve.set_defaults(command=_serve)
    return parser


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    from cfg_parallel.serving.settings import Settings

    add = parser.add_argument
    add(
        "model",
        type=_path,
        metavar="MODEL",
        help="a folder with a model_index.json, a Hugging Face id, or module:function, which is called with a device "
        "and returns a pipeline (with its LoRAs, quantized, ...)",
    )
    add("--host", default="127.0.0.1", help="default: %(default)s, which others cannot reach")
    add("--port", type=_port, default=8091, help="0 takes a free one (default: %(default)s)")
    add(
        "--cfg-parallel-size",
        type=_positive_int,
        metavar="N",
        help="devices of a replica (default: 2, or those of --devices)",
    )
    add(
        "--replicas",
        type=_positive_int,
        default=1,
        metavar="N",
        help="engines, each on devices of its own (default: 1)",
    )
    add(
        "--devices",
        type=_devices,
        metavar="LIST",
        help="of all replicas, one after the other, such as cuda:0,cuda:1 or cpu,cpu (default: GPUs, or CPU processes)",
    )
    _add_engine_arguments(parser)
    add("--served-model-name", metavar="NAME", help="for clients (default: MODEL)")
    add(
        "--api-key",
        type=_key,
        default=os.environ.get("CFG_PARALLEL_API_KEY") or None,
        metavar="KEY",
        help="what clients send as a bearer token (default: CFG_PARALLEL_API_KEY, or none is needed)",
    )
    limits: list[tuple[str, Callable[[str], float], str, str]] = [
        ("--max-queue", _count, "N", "requests that may wait"),
        ("--max-steps", _steps, "N", "of a request"),
        ("--max-pixels", _positive_int, "N", "of a result"),
        ("--max-outputs", _positive_int, "N", "pictures of a request"),
        ("--max-request-mb", _positive, "MB", "of a body"),
        ("--max-upload-seconds", _positive, "S", "until a body is complete"),
        ("--max-step-seconds", _positive, "S", "without a step, after which an engine is replaced"),
    ]
    for flag, kind, unit, of in limits:
        default = getattr(Settings, flag.removeprefix("--").replace("-", "_"))
        add(flag, type=kind, default=default, metavar=unit, help=f"{of} (default: %(default)s)")
    add("--allow-remote-images", action="store_true", help="fetch the http(s) URLs of pictures in chats")
    add("--log-prompts", action="store_true", help="write prompts into the log")
    add("--omni", action="store_true", help=argparse.SUPPRESS)  # of vLLM-Omni's command


def _doctor(args: argparse.Namespace) -> int:
    from cfg_parallel import doctor
    from cfg_parallel.preflight import choose_devices

    devices = choose_devices(len(args.devices), args.devices, "auto") if args.devices else None
    return doctor.run(args.model, devices, args.quick, args.json)


def _bench(args: argparse.Namespace) -> int:
    from cfg_parallel import bench
    from cfg_parallel.doctor import default_devices
    from cfg_parallel.preflight import choose_devices

    devices = args.devices or default_devices()
    if len(devices) > 2:
        raise ConfigurationError(f"--devices names {len(devices)}, and the benchmarks compare two with one: name two.")
    return bench.run(args, choose_devices(len(devices), devices, "auto"))


def _serve(args: argparse.Namespace) -> int:
    if (missing := _missing_for_serve()) is not None:
        raise ConfigurationError(f"`serve` needs {missing}: pip install 'cfg-parallel[serve]'.")
    from cfg_parallel.preflight import choose_devices, device_names, enable_arguments, read_model_index
    from cfg_parallel.serving.server import bind, serve
    from cfg_parallel.serving.settings import Settings, check_factory, is_factory

    size = args.cfg_parallel_size or (len(args.devices) // args.replicas if args.devices else 2)
    if args.devices is not None and len(args.devices) != size * args.replicas:
        raise ConfigurationError(
            f"--devices names {len(args.devices)}, and {args.replicas} x {size} are needed (--replicas and "
            "--cfg-parallel-size): make them agree."
        )
    if is_factory(args.model):
        check_factory(args.model)
    else:
        read_model_index(args.model)
    bound = bind(args.host, args.port)
    # The replicas find out whether devices and classes that are named exist: to load PyTorch here takes seconds, too.
    devices = device_names(args.devices) if args.devices else choose_devices(size * args.replicas, None, args.transport)
    settings = Settings(
        model=args.model,
        devices=tuple(devices),
        replicas=args.replicas,
        dtype=args.dtype,
        enable=tuple(enable_arguments(args.transport, args.cuda_graphs, args.compile).items()),
        served_model_name=args.served_model_name,
        api_key=args.api_key,
        max_queue=args.max_queue,
        max_steps=args.max_steps,
        max_pixels=args.max_pixels,
        max_outputs=args.max_outputs,
        max_request_mb=args.max_request_mb,
        max_upload_seconds=args.max_upload_seconds,
        max_step_seconds=args.max_step_seconds,
        allow_remote_images=args.allow_remote_images,
        log_prompts=args.log_prompts,
    )
    return serve(settings, bound)


def _missing_for_serve() -> str | None:
    import importlib.util

    needed = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """How a pipeline is loaded and enabled; `preflight.enable_arguments` makes arguments of them."""
    add = parser.add_argument
    add(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="auto is bfloat16 on GPUs and float32 on CPUs (default: %(default)s)",
    )
    add("--transport", choices=["auto", "host", "nccl", "peer"], default="auto", help="default: %(default)s")
    add("--cuda-graphs", choices=["auto", "on", "off"], default="auto", help="default: %(default)s")
    add("--compile", choices=["auto", "regional", "full", "off"], default="off", help="default: %(default)s")


def add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `cfg-parallel edit`."""
    add = parser.add_argument
    add(
        "--model", required=True, type=_path, metavar="M", help="a folder with a model_index.json, or a Hugging Face id"
    )
    add(
        "--image",
        action="append",
        type=_path,
        default=[],
        metavar="FILE",
        help="the picture to edit; repeat it for models that take several",
    )
    add("--prompt", required=True, metavar="P", help="what to do")
    add("--negative-prompt", metavar="N", help="what to avoid; models with a true CFG scale need one for guidance")
    add("--cfg-scale", type=_finite_float, default=4.0, metavar="S", help="guidance scale (default: %(default)s)")
    add(
        "--output", required=True, type=_path, metavar="FILE", help="where the picture goes; the suffix says the format"
    )
    add("--cfg-parallel-size", type=_positive_int, default=2, metavar="N", help="devices to use (default: %(default)s)")
    add("--num-inference-steps", type=_steps, default=50, metavar="N", help="default: %(default)s")
    add("--seed", type=_seed, default=0, help="default: %(default)s")
    add("--height", type=_pixels, metavar="PIXELS", help="default: the model's")
    add("--width", type=_pixels, metavar="PIXELS", help="default: the model's")
    add(
        "--devices",
        type=_devices,
        metavar="LIST",
        help="such as cuda:0,cuda:1 or cpu,cpu; the first leads (default: GPUs, or CPU processes without a GPU)",
    )
    _add_engine_arguments(parser)
    add("--compare", action="store_true", help="run one device first and compare time and picture")
    add(
        "--trace", type=_path, metavar="FILE", help="write a timeline of all processes and devices, for ui.perfetto.dev"
    )


def _path(text: str) -> str:
    """A path that a file system can hold, whether or not something is there; a Hugging Face id is one too."""
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, a null character
        why = getattr(error, "strerror", error)
        raise argparse.ArgumentTypeError(f"expected a path, but got {textwrap.shorten(text, 60)!r} ({why})") from None
    if not text:
        raise argparse.ArgumentTypeError("expected a path, but got ''")
    return text


def _positive_int(text: str, low: int = 1, high: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}{most}, but got {text!r}")
    return value


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, but got {text!r}")
    return names


def _parts(text: str) -> tuple[str, ...]:
    from cfg_parallel.bench import PARTS

    parts = _names(text)
    for name in parts:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}, but got {name!r}")
    return parts


def _key(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a key, but got an empty one; leave --api-key out to need none")
    return text


def _count(text: str) -> int:
    return _positive_int(text, low=0)


def _port(text: str) -> int:
    return _positive_int(text, low=0, high=65535)


def _positive(text: str) -> float:
    value = _finite_float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, but got {text!r}")
    return value


def _steps(text: str) -> int:
    return _positive_int(text, high=1000)  # the steps of which schedulers choose


def _pixels(text: str) -> int:
    return _positive_int(text, low=16, high=16384)  # a VAE and the patches of a transformer take 16 for one token


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**64 - 1, but got {text!r}")
    return value


def _finite_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, but got {text!r}")
    return value


def _devices(text: str) -> list[str]:
    devices = [device.strip() for device in text.split(",")]
    for device in devices:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise argparse.ArgumentTypeError(f"expected a list such as cuda:0,cuda:1 or cpu,cpu, but got {text!r}")
    return devices


def _demo(args: argparse.Namespace) -> int:
    """`cfg-parallel demo`: the main job on a tiny model with random weights and a photograph that is already here."""
    from cfg_parallel import demo
    from cfg_parallel.images import check_output

    if args.num_inference_steps < 2:
        raise ConfigurationError("Qwen-Image's schedule divides by zero with one step: use --num-inference-steps 2.")
    folder = Path(args.model_dir) if args.model_dir is not None else demo.cache_folder()

    def model() -> Path:
        try:
            return demo.ensure_demo_model(folder)
        except OSError as error:
            raise ConfigurationError(
                f"the demo model cannot be written to {folder} ({error}): name another folder with --model-dir."
            ) from error

    if args.model_only:
        print(model())
        return 0
    check_output(args.output)
    photo = demo.demo_photo()
    print(
        "This model is tiny and its weights are random: the picture will look like noise. What the demo shows is that "
        "the real pipeline runs on two devices and gives the same picture as on one, element for element.",
        flush=True,
    )
    print(f"model: {model()}")
    print(f"photograph: {photo}")

    import torch

    from cfg_parallel.edit import run_edit

    devices = "cuda:0,cuda:1" if torch.cuda.device_count() >= 2 else "cpu,cpu"
    edit = _parser().parse_args(
        [
            "edit",
            f"--model={folder}",
            f"--image={photo}",
            f"--prompt={demo.PROMPT}",
            f"--negative-prompt={demo.NEGATIVE_PROMPT}",
            "--cfg-scale=4.0",
            f"--output={args.output}",
            f"--num-inference-steps={args.num_inference_steps}",
            f"--devices={devices}",
            "--compare",
        ]
    )
    return run_edit(edit, quiet_load=True)


if __name__ == "__main__":
    sys.exit(main())
