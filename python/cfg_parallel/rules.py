"""Names the guidance rule that a recording applies, for the report. What runs does not depend on the name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cfg_parallel.recording import Node, Ref

aten = torch.ops.aten

_FAMILY: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.lerp.Scalar: "lerp",
    aten.linalg_vector_norm.default: "norm",
    aten.std.correction: "std",
}
_TRANSPARENT = frozenset([aten._to_copy.default, aten.clone.default, aten.unsqueeze.default, aten.cat.default])
_COMMUTES = frozenset(["add", "mul"])

# A word stands for any operand, the same wherever it occurs.
_CFG = ("add", "n", ("mul", "s", ("sub", "p", "n")))
_SCALED = ("mul", "u", "alpha")
_GUIDANCE = {
    "instruct_pix2pix": ("add", ("add", "n", ("mul", "s", ("sub", "t", "i"))), ("mul", "r", ("sub", "i", "n"))),
    "zero_star": ("add", _SCALED, ("mul", "s", ("sub", "p", _SCALED))),
    "apg": ("add", "n", ("mul", "s", ("add", ("sub", "d", "parallel"), ("mul", "eta", "parallel")))),
    "cfg": _CFG,
    "cfg_cond": ("add", "p", ("mul", "s", ("sub", "p", "n"))),
    "lerp": ("lerp", "n", "p", "s"),
}
_RESCALED = ("mul", "x", ("div", ("std", "p"), ("std", "x")))
_AFTER = {
    "norm": ("mul", "x", ("div", ("norm", "p"), ("norm", "x"))),
    "rescale": ("add", ("mul", "f", _RESCALED), ("mul", "g", "x")),
}
_EULER = ("add", "sample", ("mul", "dt", "v"))


def name_of(nodes: Sequence[Node]) -> str:
    """Such as "cfg + norm + flow_match_euler"; "elementwise" for arithmetic that is none of the rules known here."""
    names: list[str] = []
    results: list[Any] = []
    for patterns in (_GUIDANCE, _AFTER):
        found = _find(patterns, nodes)
        if found is not None:
            names.append(found[0])
            results.append(Ref(found[1], 0))
    end = _see_through(Ref(nodes[-1], 0))
    if end in results:
        pass
    elif any(_match(_EULER, end, {"v": result}) for result in results):
        names.append("flow_match_euler")
    elif results:
        names.append("scheduler step")
    return " + ".join(names) or "elementwise"


def _find(patterns: dict[str, Any], nodes: Sequence[Node]) -> tuple[str, Node] | None:
    for name, pattern in patterns.items():
        for node in nodes:
            if node.op not in _TRANSPARENT and _match(pattern, Ref(node, 0), {}):
                return name, node
    return None


def _match(pattern: Any, operand: Any, bound: dict[str, Any]) -> bool:
    """Whether `operand` is computed as `pattern` says; notes in `bound` what the pattern's words stand for."""
    operand = _see_through(operand)
    if isinstance(pattern, str):
        known = bound.setdefault(pattern, operand)
        return known is operand or (isinstance(known, Ref) and known == operand)
    family, *parts = pattern
    if not isinstance(operand, Ref) or _FAMILY.get(operand.node.op) != family or len(operand.node.args) < len(parts):
        return False
    args = list(operand.node.args[: len(parts)])
    orders = [args, args[::-1]] if family in _COMMUTES else [args]
    for order in orders:
        attempt = dict(bound)
        if all(_match(part, arg, attempt) for part, arg in zip(parts, order, strict=True)):
            bound.update(attempt)
            return True
    return False


def _see_through(operand: Any) -> Any:
    """Without the casts and copies on top of it."""
    while isinstance(operand, Ref) and operand.node.values is None and operand.node.op in _TRANSPARENT:
        inner = operand.node.args[0]
        operand = inner[0] if isinstance(inner, (tuple, list)) else inner
    return operand
