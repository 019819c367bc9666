"""Recordings: ops that were asked for and not run yet, as a graph of nodes. A node's values come from running it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cfg_parallel.codec import version

Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


class RecordingError(RuntimeError):
    """A tensor was overwritten after an op that reads it had been recorded."""


@dataclass(frozen=True, slots=True)
class Ref:
    """An operand that another node has yet to compute: its output `index`."""

    node: Node
    index: int

    @property
    def spec(self) -> Spec:
        return self.node.specs[self.index]


class Node:
    """One recorded op, or the output of a denoiser call (`op` is None), whose values come from `force`."""

    __slots__ = (
        "__weakref__",
        "args",
        "borrow",
        "device",
        "force",
        "handed_out",
        "is_listed",
        "kwargs",
        "leaf",
        "left_by",
        "op",
        "parts",
        "row",
        "row_splits",
        "rows",
        "settled_versions",
        "specs",
        "values",
        "versions",
    )

    def __init__(
        self,
        op: Any,
        specs: Sequence[Spec],
        device: torch.device,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
        versions: Sequence[tuple[torch.Tensor, int]] = (),
        force: Callable[[], Sequence[torch.Tensor]] | None = None,
    ) -> None:
        self.op = op
        self.specs = specs
        self.device = device
        self.args = args
        self.kwargs = kwargs or {}
        self.versions = versions
        self.force = force
        self.values: Sequence[torch.Tensor] | None = None
        self.settled_versions: Sequence[int] = ()  # of the values when they came
        self.handed_out = False  # whether somebody may write to its memory unseen
        self.leaf: Node | None = None  # the call whose rows this node still has, one to one
        self.rows = 0
        self.row: int | None = None  # of a batch whose rows are the outputs of a call: which of them this was made of
        self.is_listed = False  # its rows are outputs of their own
        self.row_splits: set[int] = set()  # into how many equal parts the rows of this call were taken apart
        self.parts: Sequence[Sequence[Any]] = ()  # the outputs of a batch that was split, part by part
        # Of a call: its output where another device writes it, for a kernel that waits for it there; None if it cannot.
        self.borrow: Callable[[], Any] | None = None
        self.left_by: Any = None  # the fused evaluation that did not need this node's value
        recording.unsettled.add(self)

    def operands(self) -> Iterator[Ref]:
        """What it reads of other nodes."""
        return refs_in((self.args, self.kwargs))

    def settle(self, values: Sequence[torch.Tensor]) -> None:
        """Note the values, and let go of what led here."""
        self.values = values
        self.settled_versions = list(map(version, values))
        self.args, self.kwargs, self.versions, self.force, self.leaf, self.left_by = (), {}, (), None, None, None
        self.borrow = None
        recording.unsettled.discard(self)

    def recorded(self) -> tuple[Any, ...]:
        """What `settle` lets go of."""
        return self.args, self.kwargs, self.versions, self.leaf

    def forget_values(self, recorded: tuple[Any, ...], left_by: Any) -> None:
        """Undo `settle`: the values are to be computed again when somebody asks for them."""
        self.values = None
        self.args, self.kwargs, self.versions, self.leaf = recorded
        self.left_by = left_by
        recording.unsettled.add(self)


def ancestors(node: Node) -> list[Node]:
    """The unsettled nodes that `node` needs, itself last, operands before what reads them. A recording can be deeper
    than Python's stack, so this does not recurse."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(node, False)]
    while stack:
        top, operands_done = stack.pop()
        if operands_done:
            order.append(top)
        elif top.values is None and top not in seen:
            seen.add(top)
            stack.append((top, True))
            stack.extend((ref.node, False) for ref in reversed(list(top.operands())))
    return order


def replay(nodes: Sequence[Node]) -> None:
    """Run what was recorded, op by op: the same ops on the same values in the same order as without a recording."""
    for node in nodes:
        run(node)


@torch.no_grad()  # autograd has seen the op when it was recorded, on the pending prediction itself
def run(node: Node) -> None:
    """Give `node` its values; those of its operands are there."""
    if node.values is not None:
        return
    if node.op is None:
        assert node.force is not None
        node.settle(node.force())
        return
    check_versions(node)
    with torch._C._DisableAutocast():  # its casts came before the op was recorded
        out = node.op(*map_leaves(node.args, _value), **map_leaves(node.kwargs, _value))
    node.settle(list(out) if isinstance(out, (tuple, list)) else [out])


def check_versions(node: Node) -> None:
    """Raise RecordingError when an operand of `node` is no longer what it was when the op was recorded."""
    for operand, then in node.versions:
        if operand._version != then:
            _overwritten(node, operand)
    for ref in node.operands():
        if ref.node.values is not None:
            value = ref.node.values[ref.index]
            if not value.is_inference() and value._version != ref.node.settled_versions[ref.index]:
                _overwritten(node, value)


def _overwritten(node: Node, operand: torch.Tensor) -> None:
    raise RecordingError(
        f"A tensor of shape {tuple(operand.shape)} was changed in place after `{node.op}` had read it "
        "and before the prediction it was combined with arrived; write to a clone of it instead, or "
        "call `disable_cfg_parallel(pipe)` for this pipeline."
    )


def leaves(obj: Any) -> Iterator[Any]:
    """What is in nested tuples, lists and dicts."""
    if isinstance(obj, (tuple, list)):
        for item in obj:
            yield from leaves(item)
    elif isinstance(obj, dict):
        for item in obj.values():
            yield from leaves(item)
    else:
        yield obj


def map_leaves(obj: Any, fn: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dicts with `fn(leaf)` in the place of each leaf."""
    if isinstance(obj, (tuple, list)):
        return type(obj)(map_leaves(item, fn) for item in obj)
    if isinstance(obj, dict):
        return {key: map_leaves(value, fn) for key, value in obj.items()}
    return fn(obj)


def refs_in(obj: Any) -> Iterator[Ref]:
    return (leaf for leaf in leaves(obj) if isinstance(leaf, Ref))


def _value(leaf: Any) -> Any:
    if not isinstance(leaf, Ref):
        return leaf
    values = leaf.node.values
    assert values is not None
    return values[leaf.index]


class _Recording(threading.local):
    """What this thread has recorded and not settled; another thread's pipeline is none of its business."""

    def __init__(self) -> None:
        self.unsettled: weakref.WeakSet[Node] = weakref.WeakSet()
        self.evaluate: Callable[[Sequence[Node]], None] = replay
        self.fuses = False  # whether `evaluate` may fuse ops, so that it pays to record more of them


recording = _Recording()
