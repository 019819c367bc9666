"""What `cfg-parallel edit` can know before any weight is loaded: is there a model, which pipeline is it, does it
take these arguments, are there such devices. Each function raises `ConfigurationError`, whose message is one line
that names the fix."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfg_parallel.errors import ConfigurationError

if TYPE_CHECKING:
    from PIL import Image

# Pipelines that condition on several pictures: a signature does not tell them from those that take a batch.
_SEVERAL_IMAGES = {
    "Flux2KleinKVPipeline",
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "QwenImage21Pipeline",
    "QwenImageEditPlusPipeline",
    "ZImageOmniPipeline",
}
# Pipelines that take pictures and work without one; the signature gives `image=None` to nearly all of them.
_IMAGE_OPTIONAL = {
    *(_SEVERAL_IMAGES - {"QwenImageEditPlusPipeline"}),
    "BriaFibo2Pipeline",
    "DreamLiteMobilePipeline",
    "DreamLitePipeline",
    "FluxKontextPipeline",
}


def read_model_index(model: str) -> dict[str, Any] | None:
    """The model's `model_index.json`, or None where `model` is the id of one that is not a local folder."""
    folder = Path(model)
    if not folder.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
            return None
        raise ConfigurationError(
            f"there is no folder {model}, and it is no Hugging Face id (owner/name): check --model."
        )
    if not folder.is_dir():
        raise ConfigurationError(f"{model} is a file: give --model the folder that holds model_index.json.")
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            f"{model} holds no model: it has no model_index.json; give --model a folder in the diffusers format."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{folder / 'model_index.json'} cannot be read ({error}): download it again."
        ) from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ConfigurationError(f"{folder / 'model_index.json'} names no pipeline class: download it again.")
    return index


def fetch_model_index(model: str) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"there is no folder {model}, and the Hugging Face id gives no model ({first_line(error)}): check --model."
        ) from error
    if not isinstance(index.get("_class_name"), str):
        raise ConfigurationError(
            f"{model} brings its own pipeline code: use cfg_parallel.enable_cfg_parallel in Python."
        )
    return dict(index)


def find_pipeline_class(model: str, index: dict[str, Any]) -> type:
    """The class of the pipeline, after a check that it and every component's class exist here."""
    import diffusers
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    name = index["_class_name"]
    pipeline_class = getattr(diffusers, name, None)
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, diffusers.DiffusionPipeline)):
        raise ConfigurationError(
            f"{model} needs the pipeline class {name}, which diffusers {diffusers.__version__} does not have: "
            "`pip install -U diffusers`, or check the _class_name in its model_index.json."
        )
    for component, library, class_name in _components(index):
        try:
            found = simple_get_class_obj(library, class_name)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"the {component} of {model} needs the class {class_name} of {library}, which is not there: "
                f"`pip install -U {library}`, or check model_index.json."
            ) from error
        # transformers 5 has video processors for torchvision only, and loads one for pictures, too.
        if (
            library == "transformers"
            and "video_processor" in inspect.signature(found.__init__).parameters
            and importlib.util.find_spec("torchvision") is None
            and int(importlib.metadata.version("transformers").split(".")[0]) >= 5
        ):
            torch_version = importlib.metadata.version("torch").split("+")[0]
            raise ConfigurationError(
                f"the {component} of {model} ({class_name}) needs torchvision: "
                f"`pip install torchvision torch=={torch_version}`."
            )
    return pipeline_class


def _components(index: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, library and class of each."""
    for component, entry in index.items():
        if component.startswith("_") or not isinstance(entry, (list, tuple)) or len(entry) != 2 or entry[1] is None:
            continue
        yield component, *entry


def model_modules(index: dict[str, Any]) -> list[str]:
    """What a follower imports for its denoiser, and with it for the other models that are diffusers' own."""
    import diffusers
    import torch

    classes = [getattr(diffusers, name) for _, library, name in _components(index) if library == "diffusers"]
    return [each.__module__ for each in classes if isinstance(each, type) and issubclass(each, torch.nn.Module)]


def call_arguments(pipeline_class: type, args: argparse.Namespace, images: list[Image.Image]) -> dict[str, Any]:
    """What to call the pipeline with, under the names that its own `__call__` has."""
    name = pipeline_class.__name__
    parameters = inspect.signature(pipeline_class.__call__).parameters  # type: ignore[operator]
    if "num_frames" in parameters:
        raise ConfigurationError(
            f"{name} makes a video and `edit` writes a picture: use enable_cfg_parallel in Python."
        )
    call: dict[str, Any] = {"prompt": args.prompt, "num_inference_steps": args.num_inference_steps}
    if args.negative_prompt is not None:
        call["negative_prompt"] = args.negative_prompt
    call["true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"] = args.cfg_scale
    call.update({key: value for key in ("height", "width") if (value := getattr(args, key)) is not None})
    for key in call:
        if key not in parameters:
            raise ConfigurationError(
                f"{name} takes no {key}: use another model, or leave --{key.replace('_', '-')} out."
            )

    takes, needs, several = pictures_of(pipeline_class)
    if images and not takes:
        raise ConfigurationError(f"{name} takes no picture: leave --image out, or use an image-editing model.")
    if not images and needs:
        raise ConfigurationError(f"{name} needs a picture: add --image FILE.")
    if len(images) > 1 and not several:
        raise ConfigurationError(
            f"{name} takes one picture, but {len(images)} are given: keep one --image, or use a model that takes "
            "several, such as Qwen-Image-Edit-2509."
        )
    if images:
        call["image"] = images[0] if len(images) == 1 else images

    needed = [
        key
        for key, parameter in parameters.items()
        if key not in call
        and key != "self"
        and (key in ("mask_image", "control_image") or parameter.default is parameter.empty)
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ConfigurationError(
            f"{name} needs {needed[0]}, which `edit` has no flag for: use enable_cfg_parallel in Python."
        )
    return call


def pictures_of(pipeline_class: type) -> tuple[bool, bool, bool]:
    """Whether the pipeline takes a picture, needs one, and conditions on several."""
    name = pipeline_class.__name__
    takes = "image" in inspect.signature(pipeline_class.__call__).parameters  # type: ignore[operator]
    return takes, takes and name not in _IMAGE_OPTIONAL, name in _SEVERAL_IMAGES


def enable_arguments(transport: str, cuda_graphs: str, compile: str) -> dict[str, Any]:
    """What `enable_cfg_parallel` calls the values of these flags."""
    return {
        "transport": transport,
        "cuda_graphs": {"auto": "auto", "on": True, "off": False}[cuda_graphs],
        "compile": {"auto": True, "off": False}.get(compile, compile),
    }


def choose_devices(size: int, devices: list[str] | None, transport: str) -> list[str]:
    """The devices asked for, after a check that they exist; by default GPUs or, without a GPU, CPU processes."""
    import torch

    from cfg_parallel.transports import resolve

    chosen = _gpus_or_cpus(size) if devices is None else _existing(devices)
    resolve(transport, [torch.device(device) for device in chosen])
    return chosen


def _gpus_or_cpus(size: int) -> list[str]:
    import torch

    from cfg_parallel.discovery import check_cpu_processes

    gpus = torch.cuda.device_count()
    if gpus == 0:
        check_cpu_processes(size)
        return ["cpu"] * size
    if gpus < size:
        raise ConfigurationError(
            f"--cfg-parallel-size {size} needs {size} GPUs and {gpus} {'is' if gpus == 1 else 'are'} visible: use "
            f"--cfg-parallel-size {gpus}, make more visible, or pass --devices {','.join(['cpu'] * size)}."
        )
    return [f"cuda:{gpu}" for gpu in range(size)]


def _existing(devices: list[str]) -> list[str]:
    import torch

    gpus = torch.cuda.device_count()
    devices = device_names(devices)
    for device in devices:
        if device != "cpu" and int(device.removeprefix("cuda:")) >= gpus:
            visible = f"cuda:0 to cuda:{gpus - 1} are" if gpus > 1 else "cuda:0 is" if gpus else "no GPU is"
            raise ConfigurationError(f"there is no {device}: {visible} visible; change --devices.")
    return devices


def device_names(devices: list[str]) -> list[str]:
    """The devices asked for, when they can go together. Whether they exist, only PyTorch knows."""
    devices = ["cuda:0" if device == "cuda" else device for device in devices]
    for device in devices:
        if device != "cpu" and devices.count(device) > 1:
            raise ConfigurationError(f"--devices names {device} twice: each branch needs a GPU of its own.")
    if "cpu" in devices and set(devices) != {"cpu"}:
        raise ConfigurationError("--devices mixes CPU and GPU, which compute different bits: use one kind.")
    return devices


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
