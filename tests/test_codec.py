"""Objects to bytes and tensors, and back: nothing lost, nothing shared by accident, a clear no to state."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import pickle
import subprocess
import sys
import textwrap
import threading
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg_parallel.codec import (
    Rows,
    TensorSpec,
    UnshippableError,
    decode,
    encode_plain,
    encode_structure,
    flat_bytes,
    is_dense,
    map_tensors,
    signature,
    tensors_in,
)
from cfg_parallel.errors import ConfigurationError

CPU = torch.device("cpu")
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int64,
]


class Point(NamedTuple):
    x: Any
    y: Any = 2


@dataclasses.dataclass
class Output(BaseOutput):
    sample: Any
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Derived:
    a: int
    double: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.double = 2 * self.a


class Color(enum.Enum):
    RED = 1


class Cache:
    def __init__(self) -> None:
        self.step = 0


def a_function(x: int) -> int:
    return x


def travel(tensor: torch.Tensor) -> torch.Tensor:
    """What a link does to one tensor."""
    spec = pickle.loads(pickle.dumps(TensorSpec.of(tensor, CPU)))
    arrived = spec.empty(CPU)
    assert spec.nbytes == flat_bytes(tensor).numel() == flat_bytes(arrived).numel()
    flat_bytes(arrived).copy_(flat_bytes(tensor))
    return arrived


def round_trip(obj: Any) -> Any:
    body, tensors = encode_plain(obj)
    return decode(body, [travel(t.tensor() if isinstance(t, Rows) else t) for t in tensors])


def ship_module(module: Any) -> Any:
    body, tensors = encode_structure(module)
    return decode(body, [travel(t.detach()) for t in tensors])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return flat.copy_(tensor.detach().reshape(-1)).view(torch.uint8)


def same(a: Any, b: Any, exact: bool = True) -> bool:
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)
    if type(a) is not type(b) and (exact or not isinstance(b, dict)):
        return False
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, f.name), getattr(b, f.name), exact) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k], exact) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y, exact) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    return raw > 0 if dtype == torch.bool else raw.to(dtype)


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    value = values(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    layout = draw(st.sampled_from(["contiguous", "permuted", "strided", "expanded", "offset", "transposed slice"]))
    if not value.dim():
        return value
    if layout == "permuted":
        value = value.permute(draw(st.permutations(range(value.dim()))))
    elif layout == "strided":
        value = value[..., ::2]
    elif layout == "expanded":
        value = value[..., :1].expand(shape) if shape[-1] else value
    elif layout == "offset":
        value = value[shape[0] // 2 :]
    elif layout == "transposed slice":
        value = value.transpose(0, -1)[: shape[-1] // 2]
    if value.is_complex() and draw(st.booleans()):
        value = value.conj()
    return value


# Tensors.


@settings(deadline=None, max_examples=300)
@given(tensor=tensors())
def test_any_tensor(tensor: torch.Tensor) -> None:
    arrived = travel(tensor)
    assert same(arrived, tensor.resolve_conj().resolve_neg())
    if is_dense(tensor):
        assert arrived.stride() == tensor.stride()


@settings(deadline=None, max_examples=300)
@given(tensor=tensors())
def test_dense_is_what_its_name_says(tensor: torch.Tensor) -> None:
    """Against the definition: the elements' addresses are numel different ones in a row."""
    addresses = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        view = [1] * tensor.dim()
        view[dim] = size
        addresses = addresses + (torch.arange(size) * stride).view(view)
    expected = sorted(addresses.flatten().tolist()) == list(range(tensor.numel()))
    assert is_dense(tensor) == expected or not tensor.numel()


def test_channels_last_stays_channels_last() -> None:
    for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        tensor = torch.randn([2, 3, 4, 5, 6][:dim]).to(memory_format=memory_format)
        assert travel(tensor).is_contiguous(memory_format=memory_format)


def test_a_strided_tensor_keeps_the_order_of_its_dimensions() -> None:
    """Kernels are picked by it. `empty_like` keeps it, and so would the op that made such a tensor dense."""
    tensor = torch.randn(2, 3, 4, 10).to(memory_format=torch.channels_last)[..., ::2]
    assert travel(tensor).stride() == torch.empty_like(tensor).stride()


def test_negated_and_conjugated_views() -> None:
    tensor = torch.randn(3, dtype=torch.complex64)
    for view in (tensor.conj(), tensor.conj().imag, torch._neg_view(tensor), tensor[::2].conj(), tensor.real):
        assert same(travel(view), view.resolve_conj().resolve_neg())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("offset", range(9))
def test_address_of_any_alignment(dtype: torch.dtype, offset: int) -> None:
    """As mapped from a file: not even a multiple of the element's size."""
    tensor = torch.frombuffer(bytearray(200), dtype=dtype, count=6, offset=offset)
    tensor.copy_(torch.arange(6))
    for each in (tensor, tensor.view(2, 3).t(), tensor[:0], tensor[2]):
        arrived = travel(each)
        assert same(arrived, each)
        if each.data_ptr() % dtype.itemsize == 0 and each.numel():
            assert arrived.data_ptr() % 64 == each.data_ptr() % 64


def test_unsupported_tensors_are_named() -> None:
    with pytest.raises(UnshippableError, match="sparse"):
        TensorSpec.of(torch.eye(2).to_sparse(), CPU)
    with pytest.raises(UnshippableError, match="meta"):
        TensorSpec.of(torch.empty(2, device="meta"), CPU)


def test_sending_does_not_change_or_alias() -> None:
    tensor = torch.randn(4, 4)
    version = tensor._version
    arrived = travel(tensor)
    arrived.zero_()
    assert tensor._version == version and tensor.abs().sum() > 0


# Plain data.

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from([torch.float16, torch.Size([1, 2]), CPU, torch.channels_last, torch.strided]),
    st.sampled_from([np.arange(3), np.int64(3), np.dtype("int8"), np.float32(2)]),
    st.sampled_from([Color.RED, float, a_function, len, int, Output]),
    tensors(),
)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(collections.OrderedDict),
        st.builds(Point, inner, inner),
        st.builds(Frozen, inner, inner),
        st.builds(Output, tensors(), inner),
        st.builds(lambda x: Transformer2DModelOutput(sample=x), tensors()),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(obj=nested)
def test_any_plain_data(obj: Any) -> None:
    body, found = encode_plain(obj)
    arrived = decode(body, found)
    assert same(arrived, obj)
    assert len(found) == len({id(t) for t in found})
    assert {id(t) for t in tensors_in(obj)} == {id(t) for t in found}
    assert signature(obj) == signature(arrived)
    hash(signature(obj))


@settings(deadline=None, max_examples=200)
@given(obj=nested)
def test_map_tensors_keeps_everything_else(obj: Any) -> None:
    mapped = map_tensors(obj, lambda t: t)
    assert same(mapped, obj, exact=False)  # an OrderedDict becomes a dict
    counted = map_tensors(obj, lambda t: "tensor")
    assert not list(tensors_in(counted))


def test_more_plain_data() -> None:
    for obj in ({1, 2}, frozenset([1]), bytearray(b"a"), Derived(3), {"k": Point(torch.ones(1))}, [[]], (), {}):
        assert same(round_trip(obj), obj)


@pytest.mark.parametrize("value", [1j, slice(1, 2), range(3), ...], ids=repr)
def test_immutable_builtins_are_plain_data(value: Any) -> None:
    assert round_trip([value]) == [value]


def test_output_class_is_kept() -> None:
    arrived = round_trip(Output(sample=torch.ones(2), extra={"a": (1, torch.zeros(1))}))
    assert type(arrived) is Output and arrived["sample"] is arrived.sample is arrived[0]
    assert arrived.to_tuple()[1]["a"][0] == 1


def test_one_tensor_is_one_tensor() -> None:
    tensor = torch.randn(2)
    body, found = encode_plain({"a": tensor, "b": [tensor, tensor.clone()]})
    assert len(found) == 2
    arrived = decode(body, [t.clone() for t in found])
    assert arrived["a"] is arrived["b"][0] and arrived["a"] is not arrived["b"][1]


def test_rows_are_one_tensor_by_base_and_range() -> None:
    base = torch.arange(8).view(4, 2)
    body, found = encode_plain([Rows(base, 0, 2), Rows(base, 0, 2), Rows(base, 2, 4), base])
    assert len(found) == 3
    arrived = decode(body, [t.tensor() if isinstance(t, Rows) else t for t in found])
    assert same(arrived, [base[:2], base[:2], base[2:], base])


def test_unwrap_is_applied_and_subclasses_are_refused() -> None:
    class Wrapped(torch.Tensor):
        pass

    wrapped = torch.ones(2).as_subclass(Wrapped)
    with pytest.raises(UnshippableError, match="Wrapped"):
        encode_plain([wrapped])
    _, found = encode_plain([wrapped], lambda t: t.as_subclass(torch.Tensor))
    assert [type(t) for t in found] == [torch.Tensor]


def test_parameters_are_plain_tensors_of_a_call() -> None:
    (arrived,) = round_trip([torch.nn.Parameter(torch.ones(2))])
    assert torch.equal(arrived, torch.ones(2))


def local_class() -> Any:
    @dataclasses.dataclass
    class Local:
        a: int = 1

    return Local()


def local_enum() -> Any:
    return enum.Enum("Nowhere", "A B").A


STATEFUL: dict[str, Any] = {
    "cache": Cache(),
    "generator": torch.Generator(),
    "module": torch.nn.Linear(1, 1),
    "iterator": iter([1]),
    "generator expression": (i for i in range(2)),
    "lock": threading.Lock(),
    "bound method": Cache().__init__,  # type: ignore[misc]
    "partial": functools.partial(a_function, 1),
    "lambda": lambda: 1,
    "local function": functools.wraps(a_function)(lambda x: x),
    "local class": local_class(),
    "local enum": local_enum(),
    "namespace": types.SimpleNamespace(a=1),
    "file": sys.stderr,
    "module object": math if (math := sys.modules.get("math")) else None,
    "cuda-like stream": object(),
    "random state": np.random.default_rng(),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_objects_with_state_are_refused(name: str) -> None:
    """A copy would drift from the leader's object, or cannot be made: such a call is run on the leader."""
    if name == "local function":
        pytest.skip("functools.wraps gives it the name of a function that exists")
    for obj in (STATEFUL[name], {"deep": [(STATEFUL[name], torch.ones(1))]}):
        with pytest.raises(UnshippableError):
            encode_plain(obj)


def test_a_dataclass_with_state_inside_is_refused() -> None:
    with pytest.raises(UnshippableError, match="Cache"):
        encode_plain(Frozen(a=Cache()))


# Signatures.


@settings(deadline=None, max_examples=200)
@given(a=nested, b=nested)
def test_signature_is_hashable_and_a_function_of_shape(a: Any, b: Any) -> None:
    emptied = map_tensors(a, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))
    assert isinstance(a, collections.OrderedDict) or signature(a) == signature(emptied)
    assert (hash(signature(a)), hash(signature(b))) is not None
    if signature(a) == signature(b):
        assert [(t.shape, t.dtype) for t in tensors_in(a)] == [(t.shape, t.dtype) for t in tensors_in(b)]


DIFFERENT: list[tuple[Any, Any]] = [
    (torch.empty(2), torch.empty(3)),
    (torch.empty(2), torch.empty(2, 1)),
    (torch.empty(2), torch.empty(2).half()),
    (torch.empty(()), 1),
    (torch.empty(()), 1.0),
    (None, torch.empty(2)),
    ([1, 2], [2, 1]),
    ([1, 2], (1, 2)),
    ([[1], 2], [[1, 2]]),
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"b": 1}),
    ({"a": None}, {}),
    (True, 1),
    (False, 0),
    (1, 1.0),
    ("1", 1),
    (True, 1.0),
    (None, 0),
    (torch.float16, torch.float32),
    (Point(1), (1, 2)),
    (Output(torch.empty(1)), {"sample": torch.empty(1)}),
    (Frozen(1), Frozen(2)),
    (np.arange(3), np.arange(4)),
    (np.zeros(5000), np.zeros(5001)),
    ({1, 2}, {1, 3}),
    ([(1, 4, 4)], [(1, 4, 6)]),
    (Rows(torch.empty(4, 2), 0, 2), torch.empty(4, 2)),
]


@pytest.mark.parametrize(("a", "b"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_signatures_differ(a: Any, b: Any) -> None:
    assert signature(a) != signature(b)
    assert signature([a]) != signature([b])


def test_signature_of_rows_is_that_of_the_rows() -> None:
    base = torch.empty(4, 2)
    assert signature(Rows(base, 0, 2)) == signature(Rows(base, 2, 4)) == signature(base[:2])


def test_signature_ignores_the_value_of_floats() -> None:
    assert signature({"timestep": 0.5, "scale": [1.0]}) == signature({"timestep": 0.25, "scale": [7.0]})


def test_signature_sees_the_memory_format() -> None:
    """An output's strides follow the input's, and a signature stands for the output's strides."""
    tensor = torch.empty(2, 3, 4, 4)
    assert signature(tensor) != signature(tensor.to(memory_format=torch.channels_last))


# Modules.


class Denoiser(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight  # tied
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("not_kept", torch.arange(3.0) + 1, persistent=False)
        self.register_buffer("alias", self.kept)
        self.table = torch.randn(3)  # neither a parameter nor a buffer
        self.tables = {"a": [self.table, torch.randn(3, 3).t()]}
        self.frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_parameter("none", None)
        self.config = {"scale": 2.0}
        self.conv = torch.nn.Conv2d(2, 2, 1).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.second(self.first(x)) + self.kept * self.not_kept + self.alias)
        return (x + self.table + self.tables["a"][1][0]) * self.config["scale"] + self.frozen


def test_module() -> None:
    module = Denoiser().eval()
    arrived = ship_module(module)
    x = torch.randn(2, 3)
    assert torch.equal(arrived(x), module(x)) and not arrived.training
    assert arrived.first.weight is arrived.second.weight
    assert arrived.kept is arrived.alias and arrived.table is arrived.tables["a"][0]
    assert list(arrived.state_dict()) == list(module.state_dict())
    assert [(n, type(p), p.requires_grad) for n, p in arrived.named_parameters()] == [
        (n, type(p), p.requires_grad) for n, p in module.named_parameters()
    ]
    assert arrived._non_persistent_buffers_set == module._non_persistent_buffers_set
    assert type(arrived.table) is torch.Tensor and arrived.none is None
    assert arrived.tables["a"][1].stride() == module.tables["a"][1].stride()
    assert arrived.conv.weight.stride() == module.conv.weight.stride()
    arrived.first.weight.data.zero_()
    assert module.first.weight.abs().sum() > 0
    assert len(encode_structure(module)[1]) == len({id(t) for t in encode_structure(module)[1]})


def test_no_weight_is_in_the_bytes() -> None:
    module = torch.nn.Linear(512, 512)
    body, found = encode_structure(module)
    assert len(body) < 10_000 and len(found) == 2


def test_tied_weights_are_sent_once() -> None:
    module = Denoiser()
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert {"first.weight", "second.weight"} <= set(names)
    assert sum(t is module.first.weight for t in encode_structure(module)[1]) == 1


def test_hooks_and_a_replaced_forward() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    offset = torch.ones(3)
    module[0].register_forward_hook(lambda m, args, out: out + offset)
    module[1].register_forward_pre_hook(lambda m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    original = module[1].forward
    module[1].forward = lambda x: original(x) - 1  # as accelerate and diffusers' hooks do
    arrived = ship_module(module)
    x = torch.randn(2, 3)
    assert torch.equal(arrived(x), module(x))
    module[0].weight.data.zero_()
    assert not torch.equal(arrived(x), module(x))  # its own weights, also inside the closures


def test_diffusers_hook_registry() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Double(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return output * 2

    module = torch.nn.Linear(2, 2)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(Double(), "double")
    arrived = ship_module(module)
    x = torch.randn(1, 2)
    assert torch.equal(arrived(x), module(x))
    HookRegistry.check_if_exists_or_initialize(arrived).remove_hook("double")
    assert not torch.equal(arrived(x), module(x))


class Tagged(torch.nn.Parameter):
    tag: Any


def test_a_parameter_with_attributes_keeps_them() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias = Tagged(torch.randn(2))
    module.bias.tag = {"scale": torch.randn(3), "name": "four bits"}
    arrived = ship_module(module)
    assert type(arrived.bias) is Tagged
    assert torch.equal(arrived.bias, module.bias)
    assert torch.equal(arrived.bias.tag["scale"], module.bias.tag["scale"])
    assert arrived.bias.tag["name"] == "four bits"


class Wrapper(torch.Tensor):
    """As quantized weights are made, but with no protocol to take it apart by."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


def test_a_weight_that_cannot_be_taken_apart_is_refused() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias = torch.nn.Parameter(Wrapper(torch.randn(2)), requires_grad=False)
    with pytest.raises(ConfigurationError, match="a weight of type Wrapper, which wraps other tensors"):
        ship_module(module)


def test_class_defined_in_main() -> None:
    """As in a notebook: the bytes alone must do, in a process that has never seen the class."""
    sender = textwrap.dedent("""
        import sys, torch
        from cfg_parallel.codec import encode_structure

        FACTOR = 3

        def helper(x):
            return x * FACTOR

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(2))

            def forward(self, x):
                return helper(x) * self.weight

        body, tensors = encode_structure(Model())
        assert len(tensors) == 1
        sys.stdout.buffer.write(body)
    """)
    receiver = textwrap.dedent("""
        import sys, torch
        from cfg_parallel.codec import decode
        model = decode(sys.stdin.buffer.read(), [torch.full((2,), 5.0)])
        print(model(torch.ones(2)).tolist(), [n for n, p in model.named_parameters()])
    """)
    body = subprocess.run([sys.executable, "-c", sender], capture_output=True, check=True, timeout=60).stdout
    result = subprocess.run([sys.executable, "-c", receiver], input=body, capture_output=True, check=True, timeout=60)
    assert result.stdout.decode().strip() == "[15.0, 15.0] ['weight']"
