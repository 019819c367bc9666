"""The offline engine: code that was written for vLLM-Omni's CFG-Parallel moves over with its import.

from cfg_parallel import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

omni = Omni(model="Qwen/Qwen-Image-Edit", parallel_config=DiffusionParallelConfig(cfg_parallel_size=2))
outputs = omni.generate(
    {"prompt": "turn this cat to a dog", "negative_prompt": "low quality", "multi_modal_data": {"image": cat}},
    OmniDiffusionSamplingParams(true_cfg_scale=4.0, num_inference_steps=50),
)
outputs[0].images[0].save("edited.png")
"""

from __future__ import annotations

import inspect
import itertools
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from cfg_parallel.errors import ConfigurationError
from cfg_parallel.loading import load_pipeline, share_cpu_threads
from cfg_parallel.preflight import fetch_model_index, find_pipeline_class, model_modules, read_model_index
from cfg_parallel.stopwatch import stopwatch

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from cfg_parallel.patch import CfgParallel

Prompt = str | Mapping[str, Any]

# What a field is called in the call of a diffusers pipeline, in the order in which the names are looked for.
_NAMES: dict[str, tuple[str, ...]] = {
    "num_outputs_per_prompt": ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"),
    "cfg_normalize": ("cfg_normalization",),
}


@dataclass(frozen=True)
class DiffusionParallelConfig:
    """How many devices share the work. All of them together are the product of the four.

    cfg_parallel_size: devices that share the guidance passes of a step. The other three are diffusers' own parallelism
    inside a forward, and need `torchrun` with a process for each device: ulysses_degree and ring_degree (context
    parallelism), tensor_parallel_size. Raises ConfigurationError for values that cannot work."""

    cfg_parallel_size: int = 1
    ulysses_degree: int = 1
    ring_degree: int = 1
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"Expected {each.name} to be an integer of at least 1, but got {value!r}.")
        if self.tensor_parallel_size > 1 and self.context_parallel_size > 1:
            raise ConfigurationError(
                "diffusers shares a forward by context or by tensor parallelism, not by both; leave ulysses_degree and "
                "ring_degree at 1, or tensor_parallel_size."
            )

    @property
    def context_parallel_size(self) -> int:
        return self.ulysses_degree * self.ring_degree

    @property
    def inside_a_forward(self) -> int:
        """Processes that share one forward."""
        return self.context_parallel_size * self.tensor_parallel_size


@dataclass
class OmniDiffusionSamplingParams:
    """How to generate. None leaves the pipeline's own default; a field that it does not take is an error.

    true_cfg_scale, guidance_scale, guidance_scale_2 (low-noise denoiser of Wan 2.2), guidance_rescale: of guidance.
    cfg_normalize: whether guidance keeps the norm of the prediction. seed: of a CPU generator, which draws the same
    numbers on every device; generator: in its place. num_outputs_per_prompt: images or videos. num_frames: of a video.
    strength: how much of the picture is redrawn, from 0 to 1. output_type: "pil" (default), "np", "pt" or "latent"."""

    true_cfg_scale: float | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance_rescale: float | None = None
    cfg_normalize: bool | None = None
    num_inference_steps: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_outputs_per_prompt: int | None = None
    seed: int | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    strength: float | None = None
    sigmas: list[float] | None = None
    eta: float | None = None
    output_type: str | None = None


@dataclass
class OmniRequestOutput:
    """What came of one prompt. `images` has the pictures, or for a video pipeline the frames of each video.

    `metrics`: seconds and denoising_seconds, and what the report says: steps, parallel_steps, devices and why; under
    torchrun the latter are on the ranks that lead."""

    request_id: str
    prompt: str
    images: list[Any]
    metrics: dict[str, Any] = field(default_factory=dict)


class Omni:
    """A pipeline that is loaded and enabled, until `close` or the end of its `with` block.

    Args:
        model: a folder in the diffusers format, an id of the Hugging Face hub, or a pipeline that is there already.
        parallel_config: how many devices share the work.
        devices: such as ["cuda:0", "cuda:1"] or ["cpu", "cpu"]. Default: GPUs; where there are none, CPU processes.
        dtype: the name of a dtype; "auto" is bfloat16 on GPUs and float32 on CPUs.
        enable: further arguments of `enable_cfg_parallel`, such as cuda_graphs, compile or on_follower_loss.

    Raises ConfigurationError, before any weights are loaded, for what cannot work. `generate` may be called by several
    threads; they take turns."""

    def __init__(
        self,
        model: str | DiffusionPipeline,
        *,
        parallel_config: DiffusionParallelConfig | None = None,
        devices: Sequence[str] | None = None,
        dtype: str = "auto",
        **enable: Any,
    ) -> None:
        from cfg_parallel import spmd
        from cfg_parallel.discovery import check_numbers
        from cfg_parallel.early import followers_coming
        from cfg_parallel.enable import enable_cfg_parallel
        from cfg_parallel.remote import FOLLOWER_TIMEOUT

        config = parallel_config or DiffusionParallelConfig()
        timeout = enable.get("follower_timeout", FOLLOWER_TIMEOUT)
        check_numbers(config.cfg_parallel_size, devices, timeout)
        self._lock = threading.Lock()
        self._ids = itertools.count()
        if isinstance(model, str):
            index = read_model_index(model) or fetch_model_index(model)
            pipeline_class: Any = find_pipeline_class(model, index)
        else:
            pipeline_class = type(model)
        self._parameters = inspect.signature(pipeline_class.__call__).parameters
        if spmd.rank() is None:
            if config.inside_a_forward > 1:
                count = config.cfg_parallel_size * config.inside_a_forward
                raise ConfigurationError(
                    "ulysses_degree, ring_degree and tensor_parallel_size need a process for each device; start the "
                    f"script with torchrun --nproc-per-node={count}."
                )
            chosen = _choose(config.cfg_parallel_size, devices)
        else:
            chosen = [_device_of_this_rank()]
        if chosen[0] == "cpu":
            share_cpu_threads(chosen)
        self._device = chosen[0]
        self.pipe: Any = model
        modules = model_modules(index) if isinstance(model, str) else []
        with followers_coming(chosen, modules, timeout):
            if isinstance(model, str):
                self.pipe = load_pipeline(model, dtype, self._device)
            self.pipe.to(self._device)
            if config.inside_a_forward > 1:
                _share_forwards(self.pipe, config)
            self._handle: CfgParallel | None = enable_cfg_parallel(
                self.pipe,
                cfg_parallel_size=config.cfg_parallel_size,
                devices=chosen if spmd.rank() is None else None,
                **enable,
            )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: OmniDiffusionSamplingParams | None = None,
        *,
        on_step: Callable[[int, int], None] | None = None,
        one_device: bool = False,
        **call: Any,
    ) -> list[OmniRequestOutput]:
        """An output for each prompt, in their order; each is what it would be alone, with the same parameters.

        A prompt is a string, or a mapping with `prompt` and, as the pipeline takes them, `negative_prompt` and
        `multi_modal_data`: {"image": a picture or a list of them, "mask_image": ...}. `on_step(step, steps)` is called
        after each denoising step, and may end the generation by raising. `one_device` is plain diffusers on the first
        device, to compare with. `call`: further arguments of the pipeline, such as callback_on_step_end. Raises
        ConfigurationError for what the pipeline does not take."""
        several = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        calls = [self._call(prompt, sampling_params or OmniDiffusionSamplingParams(), call) for prompt in several]
        with self._lock:
            if self._handle is None:
                raise ConfigurationError("The engine is closed; make another Omni(...).")
            return [self._generate(each, on_step, one_device) for each in calls]

    @property
    def handle(self) -> CfgParallel:
        """What `enable_cfg_parallel` gave: the report and the followers."""
        if self._handle is None:
            raise ConfigurationError("The engine is closed; make another Omni(...).")
        return self._handle

    def _generate(
        self, call: dict[str, Any], on_step: Callable[[int, int], None] | None, one_device: bool
    ) -> OmniRequestOutput:
        from cfg_parallel.enable import Leading

        run = self.handle.call_alone if one_device else self.pipe
        with stopwatch(self.pipe, self._device, on_step) as clock:
            output = run(**call)
        images = getattr(output, "images", getattr(output, "frames", None))
        if images is None:
            raise ConfigurationError(f"{type(self.pipe).__name__} makes neither pictures nor videos; use its own call.")
        metrics: dict[str, Any] = {
            "seconds": clock.end - clock.start,
            "denoising_seconds": clock.denoised - clock.begun,
        }
        if one_device:
            metrics |= {"devices": [self._device], "steps": clock.steps, "parallel_steps": 0}
        elif isinstance(self._handle, Leading):
            report = self._handle.report
            metrics |= {name: getattr(report, name) for name in ("steps", "parallel_steps", "devices", "why")}
        request_id = f"{next(self._ids)}-{uuid.uuid4().hex[:8]}"
        return OmniRequestOutput(request_id, call["prompt"], list(images), metrics)

    def _call(self, prompt: Prompt, params: OmniDiffusionSamplingParams, further: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the pipeline's own call."""
        call: dict[str, Any] = {self._name_of(name): value for name, value in further.items()}
        request: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        if not isinstance(request.get("prompt"), str):
            raise ConfigurationError(
                f"Expected a prompt, or a mapping with 'prompt', but got {_short(prompt)}; see Omni.generate."
            )
        data = request.pop("multi_modal_data", None) or {}
        for name, value in {**request, **data}.items():
            if value is not None:
                call[self._name_of(name)] = value
        for each in fields(params):
            value = getattr(params, each.name)
            if value is not None and each.name not in ("seed", "generator"):
                call[self._name_of(each.name)] = value
        generator = self._generator(params)
        if generator is not None:
            call[self._name_of("generator")] = generator
        missing = [
            name
            for name, parameter in self._parameters.items()
            if name != "self" and parameter.default is parameter.empty and name not in call
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        if missing:
            raise ConfigurationError(f"{self._class} needs {missing[0]!r}; put it into the prompt's mapping.")
        return call

    def _generator(self, params: OmniDiffusionSamplingParams) -> Any:
        import torch

        if params.generator is not None or params.seed is None:
            return params.generator
        if not isinstance(params.seed, int) or isinstance(params.seed, bool):
            raise ConfigurationError(f"Expected seed to be an integer, but got {params.seed!r}.")
        return torch.Generator("cpu").manual_seed(params.seed)

    @property
    def _class(self) -> str:
        return type(self.pipe).__name__

    def _name_of(self, name: str) -> str:
        """What the pipeline calls it."""
        for known in (name, *_NAMES.get(name, ())):
            if known in self._parameters:
                return known
        taken = [each.name for each in fields(OmniDiffusionSamplingParams)]
        takes = [each for each in taken if any(n in self._parameters for n in (each, *_NAMES.get(each, ())))]
        takes += ["seed"] if "generator" in self._parameters else []
        data = [each for each in ("negative_prompt", "image", "mask_image") if each in self._parameters]
        raise ConfigurationError(
            f"{self._class} takes no {name}; it takes {', '.join(sorted(takes))}, and with the prompt "
            f"{', '.join(data) or 'nothing else'}."
        )

    def close(self) -> None:
        """End its processes and give its memory back. May be called twice."""
        with self._lock:
            if self._handle is not None:
                self._handle.disable()
                self._handle = None
                del self.pipe

    def __enter__(self) -> Omni:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            warnings.warn("An Omni engine was not closed; use it as a context manager.", ResourceWarning, stacklevel=2)
            self.close()


def _choose(size: int, devices: Sequence[str] | None) -> list[str]:
    """A device for each place, the pipeline's own first."""
    import torch

    from cfg_parallel.discovery import choose_devices

    leader = torch.device(devices[0] if devices else "cuda:0" if torch.cuda.is_available() else "cpu")
    return [str(device) for device in choose_devices(leader, size, devices, None)]


def _device_of_this_rank() -> str:
    import os

    import torch

    return f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"


def _share_forwards(pipe: Any, config: DiffusionParallelConfig) -> None:
    """diffusers' own parallelism on every denoiser of this rank."""
    import torch
    from diffusers import ContextParallelConfig

    from cfg_parallel.discovery import find_denoisers

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    shape = (config.cfg_parallel_size, config.ring_degree, config.ulysses_degree, config.tensor_parallel_size)
    mesh = torch.distributed.device_mesh.init_device_mesh(kind, shape, mesh_dim_names=("cfg", "ring", "ulysses", "tp"))
    for denoiser in find_denoisers(pipe).values():
        if config.tensor_parallel_size > 1:
            from diffusers import TensorParallelConfig

            shared: Any = TensorParallelConfig(mesh=mesh["tp"])
        else:
            shared = ContextParallelConfig(
                ulysses_degree=config.ulysses_degree, ring_degree=config.ring_degree, mesh=mesh["ring", "ulysses"]
            )
        denoiser.enable_parallelism(config=shared)  # type: ignore[operator]


def _short(obj: Any) -> str:
    text = repr(obj)
    return text if len(text) <= 80 else text[:77] + "..."
