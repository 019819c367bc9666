"""Pending predictions: tensors with the true shape, dtype and device whose value has not arrived yet.

Guidance and scheduler arithmetic on a pending prediction is recorded, not run. When a value is needed, the recording is
replayed op by op: the same ops on the same values in the same order as without cfg-parallel, so the bits are the same.
Nothing here knows a pipeline; an op that is not recordable settles its inputs and runs at once.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

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
_ROW_SPLITS = frozenset([aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.slice.Tensor])

_metadata: dict[Any, Any] = {}  # (op, operand metadata) -> result metadata; a generation repeats a few dozen keys
_METADATA_LIMIT = 16_384
_NOT_IN_PLACE = "use the form of it that returns a new tensor."


class _Recording(threading.local):
    """What this thread has recorded and not settled; another thread's pipeline is none of its business."""

    def __init__(self) -> None:
        self.unsettled: weakref.WeakSet[Node] = weakref.WeakSet()


_recording = _Recording()


class RecordingError(RuntimeError):
    """A tensor was overwritten after an op that reads it had been recorded."""


class Node:
    """One recorded op, or the output of a denoiser call (`op` is None), whose values come from `force`."""

    __slots__ = ("__weakref__", "args", "force", "kwargs", "leaf", "op", "row_splits", "rows", "values", "versions")

    def __init__(
        self,
        op: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
        versions: Sequence[tuple[torch.Tensor, int]] = (),
        force: Callable[[], Sequence[torch.Tensor]] | None = None,
    ) -> None:
        self.op = op
        self.args = args
        self.kwargs = kwargs or {}
        self.versions = versions
        self.force = force
        self.values: Sequence[torch.Tensor] | None = None
        self.leaf: Node | None = None  # the call whose rows this node still has, one to one
        self.rows = 0
        self.row_splits: set[int] = set()  # into how many equal parts the rows of this call were taken apart
        _recording.unsettled.add(self)


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
        if torch.is_inference_mode_enabled():  # where a composite op (chunk, to, flatten) arrives whole
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func._schema.is_mutable:
            return _mutate(func, args, kwargs)
        if any(returned.alias_info is not None for returned in func._schema.returns):
            _replay_recorded()  # the result is a plain view
        return func(*_unwrap(args), **_unwrap(kwargs))

    def settle(self) -> torch.Tensor:
        """The value as a plain tensor. Waits for the follower if it must."""
        return settle(self)

    # These read memory without passing through an op, and a wrapper has no memory of its own.
    def numpy(self, *, force: bool = False) -> Any:
        _replay_recorded()
        return settle(self).numpy(force=force)

    def tolist(self) -> Any:
        return settle(self).tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        _replay_recorded()
        value = settle(self).__array__(dtype) if dtype is not None else settle(self).__array__()
        return value.copy() if copy else value

    def data_ptr(self) -> int:
        _replay_recorded()
        return settle(self).data_ptr()

    def untyped_storage(self) -> Any:
        _replay_recorded()
        return settle(self).untyped_storage()

    def storage_offset(self) -> Any:
        return settle(self).storage_offset()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        _replay_recorded()
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
) -> tuple[Node, list[PendingPrediction]]:
    """The outputs of one denoiser call: `force()` gives their values, `specs` their shape, stride, dtype and device.

    `rows` > 0 asks to note into how many parts dim 0 is taken apart (`Node.row_splits`)."""
    node = Node(None, force=force)
    node.rows = rows
    return node, [PendingPrediction(node, i, *spec) for i, spec in enumerate(specs)]


def settle(tensor: torch.Tensor) -> torch.Tensor:
    """The plain value of `tensor`; `tensor` itself when it is not a pending prediction."""
    if not isinstance(tensor, PendingPrediction):
        return tensor
    if tensor._node.values is None:
        _replay(tensor._node)
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
    _recording.unsettled = weakref.WeakSet()


def settle_all() -> None:
    """Settle every pending prediction that somebody still holds."""
    for node in list(_recording.unsettled):
        if node.values is None:
            _replay(node)


def _pendings(obj: Any) -> Iterator[PendingPrediction]:
    if isinstance(obj, PendingPrediction):
        yield obj
    elif isinstance(obj, (tuple, list)):
        for item in obj:
            yield from _pendings(item)
    elif isinstance(obj, dict):
        for item in obj.values():
            yield from _pendings(item)


def _unwrap(obj: Any) -> Any:
    if isinstance(obj, PendingPrediction):
        return settle(obj)
    if isinstance(obj, (tuple, list)):
        return type(obj)(_unwrap(item) for item in obj)
    if isinstance(obj, dict):
        return {key: _unwrap(value) for key, value in obj.items()}
    return obj


@torch.no_grad()  # autograd has seen the op when it was recorded, on the pending prediction itself
def _replay(node: Node) -> None:
    """Run what `node` needs, oldest first. Iterative: a recording can be deeper than Python's stack."""
    stack = [node]
    while stack:
        top = stack[-1]
        if top.values is not None:
            stack.pop()
            continue
        if top.op is None:
            assert top.force is not None
            values = top.force()
        else:
            missing = [p._node for p in _pendings((top.args, top.kwargs)) if p._node.values is None]
            if missing:
                stack.extend(reversed(missing))
                continue
            for operand, version in top.versions:
                if operand._version != version:
                    raise RecordingError(
                        f"A tensor of shape {tuple(operand.shape)} was changed in place after `{top.op}` had read it "
                        "and before the prediction it was combined with arrived; write to a clone of it instead, or "
                        "call `disable_cfg_parallel(pipe)` for this pipeline."
                    )
            with torch._C._DisableAutocast():  # its casts came before the op was recorded
                out = top.op(*_unwrap(top.args), **_unwrap(top.kwargs))
            values = list(out) if isinstance(out, (tuple, list)) else [out]
        top.values = values
        top.args, top.kwargs, top.versions, top.force, top.leaf = (), {}, (), None, None  # let go of what led here
        _recording.unsettled.discard(top)
        stack.pop()


def _replay_recorded() -> None:
    """Before memory is written to or handed out: what was recorded must read what is there now."""
    for node in list(_recording.unsettled):
        if node.op is not None and node.values is None:  # an output that no op has read aliases nothing
            _replay(node)


def _mutate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An in-place or `out=` op: whatever was recorded before must read the old values, so it is replayed first."""
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"`{func}` changes the layout of a prediction in place; {_NOT_IN_PLACE}")
    _replay_recorded()
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
    if not waiting:
        return None
    device = waiting[0].device
    target = kwargs.get("device")
    if target is not None and (target.type != device.type or target.index not in (None, device.index)):
        return None
    versions: list[tuple[torch.Tensor, int]] = []
    key_parts: list[Any] = []
    kwargs = {name: value for name, value in kwargs.items() if not (name == "pin_memory" and not value)}
    args = tuple(_freeze(arg, key_parts, versions) for arg in args)
    kwargs = {name: _freeze(value, key_parts, versions) for name, value in kwargs.items()}
    try:
        key: Any = (func, torch.get_default_dtype(), *key_parts, *kwargs)
        known = _metadata.get(key)
    except TypeError:
        key, known = None, None
    if known is None:
        known = _infer_metadata(func, args, kwargs)
        if key is not None:
            if len(_metadata) >= _METADATA_LIMIT:
                _metadata.clear()
            _metadata[key] = known
    container, specs = known
    node = Node(func, args, kwargs, versions)
    _follow_rows(node, func, args, specs, waiting)
    outs = [PendingPrediction(node, i, *spec, device) for i, spec in enumerate(specs)]  # type: ignore[call-arg]
    return container(outs) if container is not None else outs[0]


def _freeze(obj: Any, key_parts: list[Any], versions: list[tuple[torch.Tensor, int]]) -> Any:
    """An operand as a recording keeps it. Notes what decides the result's metadata, and a plain tensor's version."""
    if isinstance(obj, torch.Tensor):
        key_parts.append((tuple(obj.shape), obj.stride(), obj.dtype))
        if is_unsettled(obj):
            return obj
        if isinstance(obj, PendingPrediction) and not obj.is_inference():
            versions.append((obj, obj._version))  # counts writes by way of plain views of it
        obj = settle(obj)
        if obj.is_inference():  # has no version to check, so a later write would go unseen
            return obj.clone()
        versions.append((obj, obj._version))
        return obj
    if isinstance(obj, (tuple, list)):
        key_parts.append(len(obj))
        return type(obj)(_freeze(item, key_parts, versions) for item in obj)
    key_parts.append(float if isinstance(obj, float) else (type(obj), obj))  # a float's value sets no shape
    return obj


def _infer_metadata(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    def to_meta(obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            return torch.empty_strided(obj.shape, obj.stride(), dtype=obj.dtype, device="meta")
        if isinstance(obj, (tuple, list)):
            return type(obj)(to_meta(item) for item in obj)
        return obj

    kwargs = {name: to_meta(value) for name, value in kwargs.items() if name != "device"}
    out = func(*to_meta(args), **kwargs)
    outs = out if isinstance(out, (tuple, list)) else [out]
    specs = [(tuple(o.shape), o.stride(), o.dtype) for o in outs]
    return (type(out) if isinstance(out, (tuple, list)) else None), specs


def _follow_rows(node: Node, func: Any, args: Any, specs: Any, waiting: list[PendingPrediction]) -> None:
    """Note on a call's node into how many equal parts its rows are taken apart: that tells a batch of CFG branches."""
    parent = waiting[0]._node
    leaf = parent.leaf if parent.op is not None else parent if parent.rows else None
    if leaf is None or args[0] is not waiting[0] or not specs:
        return
    shape = specs[0][0]
    if func in _ROW_SPLITS and waiting[0].dim() and shape != waiting[0].shape:
        dim = args[1] if func in (aten.slice.Tensor, aten.unbind.int) and len(args) > 1 else 0
        if func in (aten.split.Tensor, aten.split_with_sizes.default):
            dim = args[2] if len(args) > 2 else 0
        if dim % waiting[0].dim() == 0:
            part = 1 if func is aten.unbind.int else shape[0]
            equal = func is aten.slice.Tensor or all(spec[0] == shape for spec in specs)
            if equal and part and leaf.rows % part == 0 and leaf.rows > part:
                leaf.row_splits.add(leaf.rows // part)
            return
    alone = sum(1 for arg in args if isinstance(arg, torch.Tensor) and math.prod(arg.shape) != 1) == 1
    adds_dim_0 = func is aten.unsqueeze.default and args[1] in (0, -waiting[0].dim() - 1)
    if func in _ROWWISE_SET and alone and not adds_dim_0 and shape[:1] == waiting[0].shape[:1] == (leaf.rows,):
        node.leaf = leaf
