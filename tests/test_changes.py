"""Whether a denoiser has changed: a fingerprint that differs when bits would, and what is quicker than one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting

import cfg_parallel
from cfg_parallel.changes import Hooks, Watch, fingerprint
from reference import reference
from tiny import TINY, generate


def changed_by(module: torch.nn.Module, change: Callable[[], Any]) -> bool:
    before = fingerprint(module)
    assert fingerprint(module) == before
    hash(before)
    change()
    return fingerprint(module) != before


class Lora(torch.nn.Module):
    """As peft has it: weights, and settings beside them that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(4, 4)
        self.down = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2)})
        self.scaling = {"default": 1.0}
        self.active = ["default"]
        self.merged: list[str] = []
        self.disabled = False
        self.nothing = None
        self.table = torch.ones(4)
        self.options = {"nested": {"values": [1, (2, 3)]}}
        self.first = torch.nn.SiLU()
        self.register_module("second", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


def other_forward(x: torch.Tensor) -> torch.Tensor:
    return x


@torch.no_grad()
def in_place(module: Lora) -> None:
    module.base.weight.mul_(2)


class Parts(torch.Tensor):
    """Made of several tensors, as quantized weights are."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Parts:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data: torch.Tensor) -> None:
        self.data_part = data

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_part"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(arg.data_part if isinstance(arg, Parts) else arg for arg in args), **(kwargs or {}))


def quantized(module: Lora) -> None:
    module.base._parameters["weight"] = Parts(module.base.weight.detach())  # type: ignore[assignment]


def cast_for_each_forward(module: Lora) -> None:
    apply_layerwise_casting(module, storage_dtype=torch.float64, compute_dtype=torch.float32)


def of_inference(module: Lora) -> None:
    with torch.inference_mode():
        module.register_buffer("cache", torch.ones(2))


CHANGES: dict[str, Callable[[Lora], Any]] = {
    "in place": in_place,
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    "new parameter": lambda m: setattr(m.base, "weight", torch.nn.Parameter(torch.randn(4, 4))),
    "removed parameter": lambda m: setattr(m.base, "bias", None),
    "data": lambda m: setattr(m.base.weight, "data", torch.zeros(4, 4)),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to dtype and back": lambda m: m.to(torch.float64).to(torch.float32),
    "half": lambda m: m.half(),
    "new module": lambda m: m.down.update({"second": torch.nn.Linear(4, 2)}),
    "removed module": lambda m: m.down.pop("default"),
    "replaced module": lambda m: setattr(m, "base", torch.nn.Linear(4, 4)),
    "replaced by another class": lambda m: setattr(m, "base", torch.nn.Identity()),
    "replaced without weights": lambda m: setattr(m, "first", torch.nn.SiLU()),
    "in another place": lambda m: m._modules.update(first=None, second=m.first),
    "of another class": lambda m: setattr(m.base, "__class__", type("Other", (torch.nn.Linear,), {})),
    "new dict": lambda m: setattr(m.base, "_parameters", dict.fromkeys(m.base._parameters)),
    "view of another dtype": lambda m: setattr(m.base.weight, "data", m.base.weight.data.view(torch.float64)),
    "one attribute for another": lambda m: (delattr(m, "nothing"), setattr(m, "something", None)),
    "scaling": lambda m: m.scaling.update(default=0.5),
    "adapter": lambda m: m.active.append("second"),
    "merged": lambda m: m.merged.append("default"),
    "flag": lambda m: setattr(m, "disabled", True),
    "nested": lambda m: m.options["nested"]["values"].append(4),
    "eval": lambda m: m.eval(),
    "buffer": lambda m: m.register_buffer("b", torch.ones(1)),
    "hook": lambda m: m.base.register_forward_hook(lambda *args: None),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda *args: None),
    "forward": lambda m: setattr(m, "forward", other_forward),
    "inner forward": lambda m: setattr(m.base, "forward", other_forward),
    "processor": lambda m: setattr(m, "processor", object()),
    "plain tensor": lambda m: m.table.mul_(2),
    "plain tensor replaced": lambda m: setattr(m, "table", torch.ones(4) * 2),
    "compiled": lambda m: m.compile(backend="eager"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_fingerprint_changes(name: str) -> None:
    module = Lora()
    assert changed_by(module, lambda: CHANGES[name](module))


@pytest.mark.parametrize("name", CHANGES)
def test_a_watch_sees_what_a_fingerprint_sees(name: str) -> None:
    module = Lora()
    watch = Watch(module)
    module(torch.ones(4))
    module.state_dict()
    assert watch.same() and not watch.changed()
    CHANGES[name](module)
    assert not watch.same()


@pytest.mark.parametrize("spoil", [quantized, cast_for_each_forward, of_inference])
def test_a_watch_that_cannot_tell(spoil: Callable[[Lora], Any]) -> None:
    module = Lora()
    spoil(module)
    watch = Watch(module)
    assert not watch.can_tell and not watch.same() and not watch.changed()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("name", TINY)
def test_no_fingerprint_where_nothing_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer has thousands of modules, and some models make twenty pictures a second."""
    tiny = TINY[name]
    pipe = tiny.build()
    with cfg_parallel.enable_cfg_parallel(pipe):
        for _ in range(2):
            generate(pipe, tiny.inputs())
        monkeypatch.setattr("cfg_parallel.enable.fingerprint", lambda module: pytest.fail("it was asked for"))
        generate(pipe, tiny.inputs())


def test_fingerprint_sees_a_tensor_in_the_place_of_a_freed_one() -> None:
    """A LoRA unloaded and another loaded: Python gives the new objects the addresses of the old ones."""
    module = torch.nn.Linear(8, 8)
    seen = fingerprint(module)
    for _ in range(2000):
        shape = module.weight.shape
        del module.weight
        module.weight = torch.nn.Parameter(torch.empty(shape))
        if fingerprint(module) == seen:
            pytest.fail("another parameter has the fingerprint of the first one")


def test_fingerprint_of_a_processor_with_settings() -> None:
    """An attention processor is a plain object: its scale is a setting of the model as well."""

    class Processor:
        scale = 1.0

    module = torch.nn.Linear(2, 2)
    module.processor = Processor()
    assert changed_by(module, lambda: setattr(module.processor, "scale", 0.5))


def test_fingerprint_of_inference_tensors() -> None:
    """A model loaded, or cast, under `torch.inference_mode()`: its tensors have no version counter."""
    with torch.inference_mode():
        module = torch.nn.Linear(2, 2)
    assert fingerprint(module) == fingerprint(module)
    module = torch.nn.Linear(2, 2)
    with torch.inference_mode():
        assert changed_by(module, lambda: module.register_buffer("cache", torch.ones(2)))
    assert fingerprint(module) == fingerprint(module)


def test_reading_changes_nothing() -> None:
    module = Lora()

    def read() -> None:
        module.state_dict()
        list(module.named_parameters())
        str(module)
        module.requires_grad_(True)
        with torch.no_grad():
            module(torch.ones(1, 4))

    assert not changed_by(module, read)


@pytest.mark.parametrize("name", ["qwen_image", "flux", "wan", "sd15", "sdxl", "sd3"])
def test_a_generation_changes_nothing(name: str) -> None:
    """Else every generation would ship the weights again."""
    tiny = TINY[name]
    pipe = tiny.build()
    generate(pipe, tiny.inputs())  # some models make tables on their first forward
    assert not changed_by(getattr(pipe, tiny.denoiser), lambda: generate(pipe, tiny.inputs(seed=1)))


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("generation", [0, 1], ids=["that one", "the next one"])
def test_weights_changed_during_a_generation(generation: int) -> None:
    """By a callback, a LoRA scale that follows a schedule for one: it counts in that generation, and in the next."""
    tiny = TINY["qwen_image"]

    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            with torch.no_grad():
                next(pipe.transformer.parameters()).mul_(1.5)
        return {}

    plain, pipe = tiny.build(), tiny.build()
    runs = [{"callback_on_step_end": on_step}, {}]
    expected = [reference(tiny, plain, tiny.inputs(**run)) for run in runs]
    with cfg_parallel.enable_cfg_parallel(pipe, devices=["cpu", "cpu"]):
        got = [generate(pipe, tiny.inputs(**run)) for run in runs]
    assert torch.equal(got[generation], expected[generation])


# Hooks between two calls.


def test_hooks_notices_what_a_guider_or_pag_does() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.processor: Any = object()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    module = torch.nn.Sequential(Attention(), torch.nn.Linear(2, 2))
    hooks = Hooks(module)
    assert not hooks.changed()
    plain = module[0].processor
    module[0].processor = object()
    assert hooks.changed()
    module[0].processor = plain
    assert not hooks.changed()
    for register in (module[1].register_forward_hook, module[1].register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert hooks.changed()
        handle.remove()
        assert not hooks.changed()
    registry = HookRegistry.check_if_exists_or_initialize(module[1])
    registry.register_hook(ModelHook(), "skip")
    assert hooks.changed()
    registry.remove_hook("skip")
    assert not hooks.changed()  # the class's own forward is left on the object
    module[1].table = torch.ones(2)  # as a model does that makes something once
    assert not hooks.changed()
