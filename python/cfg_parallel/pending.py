"""Pending predictions: tensors with the true shape, dtype and device whose value has not arrived yet.

Guidance and scheduler arithmetic on a pending prediction is recorded, not run. When a value is needed, the recording is
evaluated: by fused kernels (fusion.py), or replayed op by op, which is what the pipeline would have done without
cfg-parallel. Nothing here knows a pipeline; an op that is not recordable settles its inputs and runs at once.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cfg_parallel.codec import is_dense
from cfg_parallel.recording import Node, RecordingError, Ref, ancestors, leaves, map_leaves, recording, replay

__all__ = ["Node", "PendingPrediction", "RecordingError", "pending_outputs", "settle", "settle_all"]

aten = torch.ops.aten

# Casts and arithmetic that keep dim 0 apart: row i of the result depends on row i of the one tensor operand only.
_ROWWISE = [
    aten._to_copy.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.neg.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.rsub.Scalar,
    aten.rsub.Tensor,
    aten.pow.Tensor_Scalar,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.square.default,
    aten.abs.default,
    aten.exp.default,
    aten.sigmoid.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.slice.Tensor,
    aten.unsqueeze.default,
]
_OTHER = [
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.select.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.cat.default,
    aten.stack.default,
    aten.lerp.Scalar,
    aten.lerp.Tensor,
    aten.where.self,
    aten.minimum.default,
    aten.maximum.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.var.correction,
    aten.std.correction,
    aten.norm.ScalarOpt_dim,
    aten.norm.ScalarOpt_dim_dtype,
    aten.norm.Scalar,
    aten.linalg_vector_norm.default,
    aten.amax.default,
    aten.amin.default,
    aten.pow.Tensor_Tensor,
    aten.reciprocal.default,
    aten.addcmul.default,
    aten.addcdiv.default,
]
_RECORDABLE = frozenset(_ROWWISE + _OTHER)
_ROWWISE_SET = frozenset(_ROWWISE)
# What they return depends on the shape, strides and dtype of a tensor, not on its value.
_ONLY_METADATA = frozenset(
    [
        aten.empty_like.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.randn_like.default,
        aten.rand_like.default,
    ]
)
_DIM_ARGUMENT = {
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.unbind.int: 1,
    aten.select.int: 1,
    aten.squeeze.dim: 1,
}
_RESHAPES = frozenset(  # row after row in memory, before and after, when dimension 0 stays as long
    [
        aten.view.default,
        aten._unsafe_view.default,
        aten._reshape_alias.default,
        aten.reshape.default,
        aten.expand.default,
        aten.squeeze.default,
    ]
)
_ROW_SPLITS = frozenset([aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.slice.Tensor])

_metadata: dict[Any, Any] = {}  # (op, operand metadata) -> result metadata; a generation repeats a few dozen keys
_METADATA_LIMIT = 16_384
_NOT_IN_PLACE = "use the form of it that returns a new tensor."


class PendingPrediction(torch.Tensor):
    """A tensor whose value is `node.values[index]`, once there is one."""

    _node: Node
    _index: int
    _written: int  # the version of this tensor that its value's version has in it

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        node: Node,
        index: int,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> PendingPrediction:
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), strides=tuple(stride), dtype=dtype, device=device)
        self._node = node
        self._index = index
        self._written = 0
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RECORDABLE:
            recorded = _record(func, args, kwargs)
            if recorded is not None:
                return recorded
        if func in _ONLY_METADATA and is_unsettled(args[0]):
            like = args[0]
            stand_in = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
            return func(stand_in, *_unwrap(args[1:]), **_unwrap(kwargs))
        if torch.is_inference_mode_enabled():  # where a composite op (chunk, to, flatten) arrives whole
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func._schema.is_mutable:
            return _mutate(func, args, kwargs)
        if any(returned.alias_info is not None for returned in func._schema.returns):
            _hand_out(*_pendings((args, kwargs)))  # the result is a plain view
        return func(*_unwrap(args), **_unwrap(kwargs))

    def settle(self) -> torch.Tensor:
        """The value as a plain tensor. Waits for the follower if it must."""
        return settle(self)

    # These read memory without passing through an op, and a wrapper has no memory of its own.
    def numpy(self, *, force: bool = False) -> Any:
        _hand_out(self)
        return settle(self).numpy(force=force)

    def tolist(self) -> Any:
        return settle(self).tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        _hand_out(self)
        value = settle(self).__array__(dtype) if dtype is not None else settle(self).__array__()
        return value.copy() if copy else value

    def data_ptr(self) -> int:
        _hand_out(self)
        return settle(self).data_ptr()

    def untyped_storage(self) -> Any:
        _hand_out(self)
        return settle(self).untyped_storage()

    def storage_offset(self) -> Any:
        return settle(self).storage_offset()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        _hand_out(self)
        return settle(self).__dlpack__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return settle(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = settle(self).clone()
        memo[id(self)] = copy
        return copy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(settle(self))

    def __format__(self, spec: str) -> str:
        return format(settle(self), spec)


def pending_outputs(
    force: Callable[[], Sequence[torch.Tensor]],
    specs: Sequence[tuple[Sequence[int], Sequence[int], torch.dtype, torch.device]],
    rows: int = 0,
    listed: bool = False,
) -> tuple[Node, list[PendingPrediction]]:
    """The outputs of one denoiser call: `force()` gives their values, `specs` their shape, stride, dtype and device.

    `rows` > 0 asks to note into how many parts dim 0 is taken apart, or with `listed` the outputs themselves
    (`Node.row_splits`)."""
    metas = [(tuple(shape), tuple(stride), dtype) for shape, stride, dtype, _ in specs]
    node = Node(None, metas, specs[0][3] if specs else torch.device("cpu"), force=force)
    node.rows, node.is_listed = rows, listed
    return node, [PendingPrediction(node, i, *spec) for i, spec in enumerate(specs)]


def outputs_of(values: Sequence[torch.Tensor]) -> tuple[Node, list[PendingPrediction]]:
    """Values that are there, as the outputs of a call that nobody has asked for yet."""
    specs = [(value.shape, value.stride(), value.dtype, value.device) for value in values]
    return pending_outputs(lambda: values, specs)


def settled_outputs(values: Sequence[torch.Tensor]) -> list[PendingPrediction]:
    """Values that are there, in the form of the outputs of a call."""
    node, outputs = outputs_of(values)
    replay([node])
    return outputs


def join(parts: Sequence[Sequence[PendingPrediction]], listed: bool = False) -> list[torch.Tensor]:
    """The outputs of a batch whose rows were split; the parts become views of it, as `chunk` would have made them.

    `listed`: the rows are outputs of their own."""
    if listed:
        return [settle(output) for part in parts for output in part]
    joined = [cat_rows([settle(part[i]) for part in parts]) for i in range(len(parts[0]))]
    chunks = [value.chunk(len(parts)) for value in joined]
    for k, part in enumerate(parts):
        if part:
            part[0]._node.settle([chunk[k] for chunk in chunks])
    return joined


def cat_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` of equal parts, in the memory format of the parts, in which their model would have made the batch.

    `torch.cat` keeps channels_last alone, and the order of a later sum depends on the strides."""
    part = parts[0]
    row = part.numel() // max(1, part.shape[0])
    if not row or not is_dense(part[:1]):
        return torch.cat(list(parts))
    shape = (sum(len(each) for each in parts), *part.shape[1:])
    joined = torch.empty_strided(shape, (row, *part.stride()[1:]), dtype=part.dtype, device=part.device)
    start = 0
    for each in parts:
        joined[start : start + len(each)].copy_(each)
        start += len(each)
    return joined


def settle(tensor: torch.Tensor) -> torch.Tensor:
    """The plain value of `tensor`; `tensor` itself when it is not a pending prediction."""
    if not isinstance(tensor, PendingPrediction):
        return tensor
    if tensor._node.values is None:
        recording.evaluate(ancestors(tensor._node))
    values = tensor._node.values
    assert values is not None
    value = values[tensor._index]
    # A write by way of a plain view of `tensor` counts on `tensor` and its views, not on the value below them.
    if not tensor.is_inference() and tensor._version != tensor._written:
        tensor._written = tensor._version
        if not value.is_inference():
            torch.autograd.graph.increment_version(value)
    return value


def is_unsettled(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, PendingPrediction) and tensor._node.values is None


def forget_unsettled() -> None:
    """Start anew: what an earlier generation left unsettled (it raised, say) does not concern the next one."""
    recording.unsettled = weakref.WeakSet()


def settle_all() -> None:
    """Settle every pending prediction that somebody still holds."""
    _settle_recorded()
    for node in list(recording.unsettled):
        replay(ancestors(node))


def _pendings(obj: Any) -> Iterator[PendingPrediction]:
    return (leaf for leaf in leaves(obj) if isinstance(leaf, PendingPrediction))


def _unwrap(obj: Any) -> Any:
    return map_leaves(obj, settle)


def _hand_out(*pendings: PendingPrediction) -> None:
    """Their memory is given to somebody who can write to it without an op that is seen here."""
    for pending in pendings:
        pending._node.handed_out = True
    _settle_recorded()


def _settle_recorded() -> None:
    """Before memory is written to or handed out: what was recorded must read what is there now."""
    nodes = [node for node in list(recording.unsettled) if node.op is not None]
    read = {ref.node for node in nodes for ref in node.operands()}
    for node in nodes:
        if node not in read and node.values is None:  # the ends of the recording first: they are what is fused
            recording.evaluate(ancestors(node))
    for node in list(recording.unsettled):
        if node.op is not None or node.row_splits:  # an output that no op has read aliases nothing
            replay(ancestors(node))


def _mutate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An in-place or `out=` op: whatever was recorded before must read the old values, so it is settled first."""
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"`{func}` changes the layout of a prediction in place; {_NOT_IN_PLACE}")
    _settle_recorded()
    pendings = list(_pendings((args, kwargs)))
    out = func(*_unwrap(args), **_unwrap(kwargs))
    writes = [(i, s.name) for i, s in enumerate(func._schema.arguments) if s.alias_info and s.alias_info.is_write]
    for value in map(settle, _pendings([args[i] if i < len(args) else kwargs.get(name) for i, name in writes])):
        if not value.is_inference():
            torch.autograd.graph.increment_version(value)  # below autograd, where this runs, no op counts versions
    if any(settle(pending).shape != pending.shape for pending in pendings):
        raise NotImplementedError(f"`{func}` changes the shape of a prediction in place; {_NOT_IN_PLACE}")

    def rewrap(result: Any) -> Any:
        return next((p for p in pendings if settle(p) is result), result)

    return type(out)(rewrap(item) for item in out) if isinstance(out, (tuple, list)) else rewrap(out)


def _record(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The op's results as pending predictions, or None when nothing it reads is unsettled or it leaves the device."""
    pendings = list(_pendings((args, kwargs)))
    waiting = [p for p in pendings if p._node.values is None]
    if not waiting and func is aten._to_copy.default and recording.fuses and not pendings[0]._node.handed_out:
        waiting = pendings  # latents that a scheduler casts before its step: the cast becomes part of that
    if not waiting:
        return None
    device = waiting[0].device
    target = kwargs.get("device")
    if target is not None and (target.type != device.type or target.index not in (None, device.index)):
        return None
    parts = _take_apart(func, args, waiting[0])
    if parts is not None:
        return parts
    versions: list[tuple[torch.Tensor, int]] = []
    key_parts: list[Any] = []
    kwargs = {name: value for name, value in kwargs.items() if not (name == "pin_memory" and not value)}
    frozen = tuple(_freeze(arg, key_parts, versions) for arg in args)
    kwargs = {name: _freeze(value, key_parts, versions) for name, value in kwargs.items()}
    try:
        key: Any = (func, torch.get_default_dtype(), *key_parts, *kwargs)
        known = _metadata.get(key)
    except TypeError:
        key, known = None, None
    if known is None:
        known = _infer_metadata(func, frozen, kwargs)
        if key is not None:
            if len(_metadata) >= _METADATA_LIMIT:
                _metadata.clear()
            _metadata[key] = known
    container, specs = known
    node = Node(func, specs, device, frozen, kwargs, versions)
    _follow_rows(node, func, args, waiting)
    outs = [PendingPrediction(node, i, *spec, device) for i, spec in enumerate(specs)]  # type: ignore[call-arg]
    return container(outs) if container is not None else outs[0]


def _take_apart(func: Any, args: Any, batch: PendingPrediction) -> Any:
    """The parts of a batch that was split, when that is what `func` asks for: they need not be joined first."""
    parts = batch._node.parts
    if func is not aten.split.Tensor or args[0] is not batch or not parts or (args[2] if len(args) > 2 else 0) != 0:
        return None
    if args[1] * len(parts) != batch.shape[0]:
        return None
    batch._node.row_splits.add(len(parts))
    return [part[batch._index] for part in parts]


def _freeze(obj: Any, key_parts: list[Any], versions: list[tuple[torch.Tensor, int]]) -> Any:
    """An operand as a recording keeps it. Notes what decides the result's metadata, and a plain tensor's version."""
    if isinstance(obj, torch.Tensor):
        key_parts.append((tuple(obj.shape), obj.stride(), obj.dtype))
        if is_unsettled(obj):
            return Ref(obj._node, obj._index)  # type: ignore[attr-defined]
        if isinstance(obj, PendingPrediction) and not obj.is_inference():
            versions.append((obj, obj._version))  # counts writes by way of plain views of it
        obj = settle(obj)
        if obj.is_inference():  # has no version to check, so a later write would go unseen
            return _copy_of_memory(obj)
        versions.append((obj, obj._version))
        return obj
    if isinstance(obj, (tuple, list)):
        key_parts.append(len(obj))
        return type(obj)(_freeze(item, key_parts, versions) for item in obj)
    key_parts.append(float if isinstance(obj, float) else (type(obj), obj))  # a float's value sets no shape
    return obj


def _copy_of_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, those of expanded dimensions too: they decide the strides of results."""
    if not tensor.numel():
        return tensor.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride())


def _infer_metadata(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    def to_meta(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        if isinstance(leaf, Ref):
            shape, stride, dtype = leaf.spec
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return leaf

    kwargs = {name: map_leaves(value, to_meta) for name, value in kwargs.items() if name != "device"}
    out = func(*map_leaves(args, to_meta), **kwargs)
    outs = out if isinstance(out, (tuple, list)) else [out]
    specs = [(tuple(o.shape), o.stride(), o.dtype) for o in outs]
    return (type(out) if isinstance(out, (tuple, list)) else None), specs


def _follow_rows(node: Node, func: Any, args: Any, waiting: list[PendingPrediction]) -> None:
    """Note on a call's node into how many equal parts its rows are taken apart: that tells a batch of CFG branches."""
    parent = waiting[0]._node
    leaf = parent.leaf if parent.op is not None else parent if parent.rows else None
    if leaf is not None and leaf.is_listed:
        _follow_listed_rows(node, func, leaf, waiting)
        return
    if leaf is None or not node.specs or args[0] is not waiting[0]:
        return
    shape = node.specs[0][0]
    if func in _ROW_SPLITS and waiting[0].dim() and shape != waiting[0].shape:
        dim = args[1] if func in (aten.slice.Tensor, aten.unbind.int) and len(args) > 1 else 0
        if func in (aten.split.Tensor, aten.split_with_sizes.default):
            dim = args[2] if len(args) > 2 else 0
        if dim % waiting[0].dim() == 0:
            part = 1 if func is aten.unbind.int else shape[0]
            equal = func is aten.slice.Tensor or all(spec[0] == shape for spec in node.specs)
            if equal and part and leaf.rows % part == 0 and leaf.rows > part:
                leaf.row_splits.add(leaf.rows // part)
            return
    kept = all(spec[0][:1] == (leaf.rows,) for spec in node.specs) and waiting[0].shape[:1] == (leaf.rows,)
    if kept and _keeps_rows(func, args, waiting[0].dim()):
        node.leaf = leaf


def _follow_listed_rows(node: Node, func: Any, leaf: Node, waiting: list[PendingPrediction]) -> None:
    """Rows that are outputs of their own are of two branches when they are combined: `pos[i] - neg[i]`."""
    places = [(p._node, p._index) if p._node.op is None else (p._node.leaf, p._node.row) for p in waiting]
    rows = {row for source, row in places if source is leaf and row is not None}
    if len(rows) == 1 and all(source is leaf for source, _ in places):
        node.leaf, node.row = leaf, rows.pop()
    elif len(rows) == 2 and func not in (aten.stack.default, aten.cat.default):  # which make a batch of two images
        distance = max(rows) - min(rows)
        if leaf.rows % distance == 0 and leaf.rows > distance:
            leaf.row_splits.add(leaf.rows // distance)


def _keeps_rows(func: Any, args: Any, rank: int) -> bool:
    """Whether dimension 0 of the result, which is as long as that of the first operand, has its rows in their order."""
    if func in _ROWWISE_SET:
        alone = sum(1 for arg in args if isinstance(arg, torch.Tensor) and math.prod(arg.shape) != 1) == 1
        return alone and not (func is aten.unsqueeze.default and args[1] in (0, -rank - 1))
    if func in _DIM_ARGUMENT:
        index = _DIM_ARGUMENT[func]
        return len(args) > index and args[index] % rank != 0
    if func is aten.permute.default:
        return bool(args[1][0] % rank == 0)
    if func is aten.transpose.int:
        return args[1] % rank != 0 and args[2] % rank != 0
    return func in _RESHAPES
