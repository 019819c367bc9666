"""Evaluates recordings in as few launches as it can: the elementwise ops between two other ops become one program.

A plan is made once for each structure of recording (a generation repeats a few) and tells what to run: ops that are not
elementwise and views of real tensors as PyTorch runs them, everything else by programs. In exact mode a plan is used
only after it has given, on the first values that came along, the bits of the replay.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cfg_parallel.codec import flat_bytes
from cfg_parallel.launch import Execute, LaunchError, NotCompiledError
from cfg_parallel.lowering import (
    BINARY,
    NORM,
    STD,
    VIEWS,
    Launch,
    Leaf,
    Lowering,
    Scalar,
    Source,
    Step,
    Unfusable,
    is_elementwise,
    is_row_norm,
    is_sample_std,
    shape_of,
    view_dims,
)
from cfg_parallel.numerics import same_bits
from cfg_parallel.pending import settle
from cfg_parallel.program import Program
from cfg_parallel.recording import Node, Ref, ancestors, check_versions, recording, replay, run
from cfg_parallel.rules import name_of
from cfg_parallel.transports.peer import Arrival

aten = torch.ops.aten

_PLAN_LIMIT = 1024
_MOST_OPS = 256  # a plan takes time that grows faster than its ops
CHECKED = "the fused kernels were compared with it, once for each kind of step"


@dataclass(slots=True)
class Plan:
    """What to run, in order: the position of an op that PyTorch runs, or a launch. `left` are the positions of ops
    whose values only a program saw: nobody has asked for them yet."""

    actions: list[int | Launch]
    left: list[int]
    label: str
    borrowed: frozenset[int] = frozenset()  # calls whose output only a launch reads, which can wait for it itself
    unfit: str | None = None  # why the recording is replayed instead


@dataclass
class Fusion:
    """Evaluates the recordings of one pipeline on `device`.

    `execute` runs a program; None where that cannot be done, and `backend` says why. `prepare` has a kernel compiled
    that will wait for one of its inputs. `fused` and `replayed` count the evaluations that combined predictions, by
    rule and backend and by reason."""

    device: torch.device
    execute: Execute | None
    backend: str
    exact: bool = True
    prepare: Callable[[Program, int, torch.device], None] = lambda *_: None
    fused: Counter[str] = field(default_factory=Counter)
    replayed: Counter[str] = field(default_factory=Counter)
    _plans: dict[Any, Plan] = field(default_factory=dict)
    _wanted: set[int] = field(default_factory=set)
    _checked: set[Any] = field(default_factory=set)
    _without_norm: set[Any] = field(default_factory=set)
    _label: str = ""
    _into: torch.Tensor | None = None  # memory for the value that is asked for

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def install(self) -> None:
        """From now on this thread's recordings are evaluated here; the counts begin anew."""
        self.fused.clear()
        self.replayed.clear()
        recording.evaluate, recording.fuses = self.evaluate, self.execute is not None

    def remove(self) -> None:
        recording.evaluate, recording.fuses = replay, False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Evaluate here what is recorded inside."""
        before = recording.evaluate, recording.fuses
        self.install()
        try:
            yield
        finally:
            recording.evaluate, recording.fuses = before

    def settle_into(self, out: torch.Tensor, result: torch.Tensor) -> None:
        """Give `out` the value of `result`, straight from the kernel where that is possible."""
        self._into = out
        try:
            value = settle(result)
        finally:
            self._into = None
        if value.data_ptr() != out.data_ptr():
            out.copy_(value)

    def evaluate(self, nodes: Sequence[Node]) -> None:
        """Give the last of `nodes` its values. They are unsettled, operands first."""
        calls = [node for node in nodes if node.op is None]
        replay([call for call in calls if call.borrow is None])
        nodes = [node for node in nodes if node.values is None]
        reason = self._evaluate(nodes)
        if calls and nodes and nodes[-1].op is not None:
            if reason is None:
                self.fused[self._label] += 1
            else:
                self.replayed[reason] += 1

    @torch.no_grad()  # autograd has seen the ops when they were recorded
    def _evaluate(self, nodes: Sequence[Node]) -> str | None:
        """None when fused kernels did it; otherwise why the recording was replayed."""
        if self.execute is None:
            replay(nodes)
            return self.backend
        for node in _asked_for(nodes):
            if node.left_by is not None:  # left out before: what is computed likewise is stored from now on
                self._wanted.add(node.left_by)
                replay(ancestors(node))
        nodes = [node for node in nodes if node.values is None]
        ops = sum(node.op is not None for node in nodes)
        least = 1 if self._into is not None else 2  # PyTorch's op would be followed by a copy
        if not least <= ops <= _MOST_OPS:
            replay(nodes)
            return "a single op has nothing to be fused with" if ops < least else f"more than {_MOST_OPS} ops in a row"
        recorded = _Recorded(nodes, self.device, self._into is not None)
        wanted = frozenset(i for i, way in enumerate(recorded.ways) if way in self._wanted)
        plan = self._plans.get((recorded.key, wanted))
        if plan is None:
            if len(self._plans) >= _PLAN_LIMIT:
                for learned in (self._plans, self._wanted, self._checked, self._without_norm):
                    learned.clear()  # type: ignore[attr-defined]
            plan = self._make_plan(recorded, wanted)
            self._plans[recorded.key, wanted] = plan
        self._label = f"{plan.label} ({self.backend})"
        if plan.unfit is None and (recorded.key in self._checked or not self.exact):
            try:
                self._run(plan, recorded)
            except LaunchError as error:
                if not isinstance(error, NotCompiledError):
                    self._give_up(plan, recorded, str(error))
                replay(nodes)
                return str(error)
            return None
        left = {position: nodes[position].recorded() for position in plan.left}
        replay(nodes)
        if plan.unfit is not None:
            return plan.unfit
        reason = self._check(plan, recorded)
        for position, what in left.items():  # as if the plan had been followed: it shows whether they are missed
            nodes[position].forget_values(what, recorded.ways[position])
        return reason

    def _run(self, plan: Plan, recorded: _Recorded) -> None:
        nodes = recorded.nodes
        for node in nodes:
            check_versions(node)
        for action in plan.actions:
            if not isinstance(action, int):
                self._launch_and_settle(action, recorded)
            elif action not in plan.borrowed:
                run(nodes[action])
        for position in plan.left:
            nodes[position].left_by = recorded.ways[position]

    def _launch_and_settle(self, launch: Launch, recorded: _Recorded) -> None:
        """A call that is on its way is waited for by the kernel, which also keeps a copy of its output."""
        outputs = [self._empty(recorded, position, self._into) for position in launch.outputs]
        late = next((recorded.nodes[p] for p in launch.positions if recorded.nodes[p].values is None), None)
        arrival = keep = None
        if late is not None:
            keep = self._empty(recorded, recorded.position[late])  # before borrowing: there may be no memory
            arrival = late.borrow() if late.borrow is not None else None
            if arrival is None:
                run(late)
        try:
            self._launch(launch, recorded, outputs, arrival, keep)
        except LaunchError:
            if arrival is not None and late is not None and keep is not None:
                arrival.copy_out([flat_bytes(keep)])
                late.settle([keep])
            raise
        if late is not None and arrival is not None and keep is not None:
            late.settle([keep])
        for position, value in zip(launch.outputs, outputs, strict=True):
            recorded.nodes[position].settle([value])

    def _launch(
        self,
        launch: Launch,
        recorded: _Recorded,
        outputs: Sequence[torch.Tensor],
        arrival: Arrival | None = None,
        keep: torch.Tensor | None = None,
    ) -> None:
        assert self.execute is not None
        inputs = [recorded.value(source) for source in launch.inputs]
        scalars = launch.scalar_values(recorded.scalars)
        self.execute(launch.program, inputs, scalars, outputs, arrival, keep)

    def _empty(self, recorded: _Recorded, position: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Memory for the value at `position`: `into`, when that is what was asked for and laid out alike."""
        shape, strides, dtype = recorded.nodes[position].specs[0]
        asked_for = into is not None and position == len(recorded.nodes) - 1
        if asked_for and (into.shape, into.stride(), into.dtype) == (shape, strides, dtype):  # type: ignore[union-attr]
            return into  # type: ignore[return-value]
        return torch.empty_strided(shape, strides, dtype=dtype, device=self.device)

    def _check(self, plan: Plan, recorded: _Recorded) -> str:
        """Compare the plan's results with those of a replay. Waits for the device: once for each plan, when all of its
        kernels are there. Returns why the recording was replayed."""
        reason = CHECKED
        for action in plan.actions:
            if isinstance(action, int):
                continue
            late = [i for i, source in enumerate(action.inputs) if source.position in plan.borrowed]
            try:
                for index in late:
                    self.prepare(action.program, index, self.device)
                outputs = [self._empty(recorded, position) for position in action.outputs]
                self._launch(action, recorded, outputs)
            except NotCompiledError as error:
                reason = str(error)
                continue
            except (LaunchError, torch.OutOfMemoryError) as error:  # the replay has given every value that is needed
                self._give_up(plan, recorded, str(error))
                return CHECKED
            for position, value in zip(action.outputs, outputs, strict=True):
                expected = recorded.nodes[position].values
                assert expected is not None
                if not same_bits(value, expected[0]):
                    self._give_up(
                        plan, recorded, f"the fused kernel ({plan.label}) does not round as PyTorch does here"
                    )
                    return CHECKED
        if reason is CHECKED:
            self._checked.add(recorded.key)
        return reason

    def _give_up(self, plan: Plan, recorded: _Recorded, reason: str) -> None:
        """Replay recordings of this kind from now on; first without norms, of which the kernels do not do all."""
        self._checked.discard(recorded.key)
        if any(launch.program.has_norm for launch in plan.actions if isinstance(launch, Launch)):
            self._without_norm.add(recorded.key)
            self._plans = {key: known for key, known in self._plans.items() if key[0] != recorded.key}
        else:
            plan.unfit = reason

    def _make_plan(self, recorded: _Recorded, wanted: frozenset[int]) -> Plan:
        label = name_of(recorded.nodes)
        tries = [False] if recorded.key in self._without_norm else [True, False]
        for with_norm in tries:
            try:
                planner = _Planner(recorded, self.exact, self.on_gpu, with_norm)
                actions, left = planner.plan(wanted)
            except Unfusable as error:
                unfit = f"the ops do not fit in one program: {error}"
                continue
            if any(isinstance(action, Launch) for action in actions):
                return Plan(actions, left, label, planner.borrowed)
            unfit = "there are no two elementwise ops in a row"
        return Plan([], [], label, unfit=unfit)


def _asked_for(nodes: Sequence[Node]) -> list[Node]:
    """The last one, and what those read that no evaluation has left out. What was left out needs others to be replayed,
    but that is no reason to store them."""
    return [*(ref.node for node in nodes if node.left_by is None for ref in node.operands()), *nodes[-1:]]


class _Recorded:
    """A recording taken apart: its structure, which other recordings share, and its tensors and numbers."""

    def __init__(self, nodes: Sequence[Node], device: torch.device, has_place: bool) -> None:
        self.nodes = nodes
        self.has_place = has_place  # the memory for the last value is there already
        self.device = device
        self.position = {node: i for i, node in enumerate(nodes)}
        self.tensors: list[torch.Tensor] = []
        self.scalars: list[float] = []
        self._numbers: dict[int, int] = {}
        self.ways: list[int] = []  # a hash of how each value is computed from predictions and plain tensors
        self.steps: list[Step] = []
        key: list[Any] = [has_place]
        for node in nodes:
            self._key: list[Any] = []
            self._way: list[int] = []
            self.steps.append(self._step(node))
            key.append(tuple(self._key))
            self.ways.append(hash(tuple(self._way)))
        self.key = tuple(key)

    def value(self, source: Source) -> torch.Tensor | None:
        """A launch's input, laid out as the plan was made for; None for one that is on its way."""
        if source.position is None:
            return self.tensors[source.index]
        node = self.nodes[source.position]
        if node.values is None:
            return None
        value = node.values[source.index]
        shape, strides, dtype = node.specs[source.index]
        if all(size == 1 or a == b for size, a, b in zip(shape, value.stride(), strides, strict=True)):
            return value
        return torch.empty_strided(shape, strides, dtype=dtype, device=value.device).copy_(value)

    def _step(self, node: Node) -> Step:
        self._note((node.op, *node.specs, node.device))
        numbers = node.op in BINARY
        args = tuple(self._operand(arg, numbers and i < 2) for i, arg in enumerate(node.args))
        kwargs = {name: self._operand(value, False) for name, value in node.kwargs.items()}
        self._note(tuple(kwargs))
        shape, strides, dtype = node.specs[0] if node.specs else ((), (), torch.uint8)
        op = node.op
        if op is aten.stack.default and len(args[0]) == 1:  # in a program, where nothing is copied
            op, args = aten.unsqueeze.default, (args[0][0], *(args[1:] or (kwargs.pop("dim", 0),)))
        return Step(op, args, kwargs, shape, strides, dtype, node.device == self.device)

    def _operand(self, obj: Any, may_be_number: bool) -> Any:
        if isinstance(obj, Ref):
            if obj.node in self.position:
                position = self.position[obj.node]
                self._note((position, obj.index), (self.ways[position], obj.index))
                return obj
            obj = obj.node.values[obj.index]  # type: ignore[index]
        if isinstance(obj, torch.Tensor):
            if may_be_number and obj.dim() == 0 and obj.device.type == "cpu" and not obj.is_complex():
                return self._number(obj.item(), True)
            return self._leaf(obj)
        if isinstance(obj, (tuple, list)):
            self._note(len(obj))
            return type(obj)(self._operand(item, False) for item in obj)
        if may_be_number and type(obj) in (int, float):
            return self._number(obj, False)
        self._note(obj.hex() if isinstance(obj, float) else (type(obj), obj))
        return obj

    def _note(self, part: Any, way: Any = None) -> None:
        """A part of the structure; `way` is what of it does not depend on the rest of the recording."""
        self._key.append(part)
        self._way.append(part if way is None else way)

    def _number(self, value: float, is_tensor: bool) -> Scalar:
        self._note((Scalar, is_tensor))
        self.scalars.append(float(value))
        return Scalar(len(self.scalars) - 1, is_tensor)

    def _leaf(self, tensor: torch.Tensor) -> Leaf:
        index = self._numbers.setdefault(id(tensor), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(tensor)
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        readable = plain and tensor.device == self.device and not tensor.is_neg() and not tensor.is_conj()
        strides = tensor.stride() if plain else ()
        leaf = Leaf(index, tuple(tensor.shape), strides, tensor.dtype, readable)
        self._note(leaf, (leaf.shape, leaf.strides, leaf.dtype))
        return leaf


class _Planner:
    """Decides for each op whether a program computes it, and in which stage: between two stages PyTorch runs ops."""

    def __init__(self, recorded: _Recorded, exact: bool, on_gpu: bool, with_norm: bool) -> None:
        self._nodes = recorded.nodes
        self._steps = recorded.steps
        self._position = recorded.position
        self._exact, self._on_gpu, self._with_norm = exact, on_gpu, with_norm
        self._has_place = recorded.has_place
        self._by_torch: set[int] = set()
        self._computed: list[bool] = []
        self._stage: list[int] = []
        self._sums: list[bool] = []  # standard deviations, which a program of their own computes
        self._again: list[bool] = []  # computed by every program that needs it
        self.borrowed: frozenset[int] = frozenset()

    def plan(self, wanted: frozenset[int]) -> tuple[list[int | Launch], list[int]]:
        while True:
            self._classify(wanted)
            required = self._required(wanted)
            # A view or a norm is part of a program only on the way to something else.
            unfit = {i for i in required if self._steps[i].op in VIEWS or self._steps[i].op is NORM}
            if not unfit:
                break
            self._by_torch |= unfit
        actions: list[int | Launch] = []
        for stage in range(max(self._stage) + 1):
            members = [i for i in range(len(self._steps)) if self._stage[i] == stage]
            actions += [i for i in members if not self._computed[i]]
            together: dict[Any, list[int]] = {}
            for i in members:
                if i in required:
                    step = self._steps[i]
                    kind = (step.shape, step.kwargs.get("correction")) if self._sums[i] else None
                    shape = shape_of(step.args[0]) if self._sums[i] else step.shape
                    together.setdefault((tuple(size for size in shape if size != 1), kind), []).append(i)
            for (shape, _), outputs in together.items():
                actions += self._launches(shape, outputs, stage)
        self.borrowed = self._borrowed(actions)
        return actions, [i for i, computed in enumerate(self._computed) if computed and i not in required]

    def _classify(self, wanted: frozenset[int]) -> None:
        self._computed, self._stage, self._sums = [], [], []
        for i, step in enumerate(self._steps):
            operands = [self._position[ref.node] for ref in step.refs()]
            computed = i not in self._by_torch and self._can_compute(step)
            self._computed.append(computed)
            self._sums.append(computed and step.op is STD)
            waits = [self._stage[p] + ((self._computed[p] and not computed) or self._sums[p]) for p in operands]
            self._stage.append(max(waits, default=0))
        # As late as its readers allow: what one program computes for the next need not be stored.
        readers: dict[int, list[int]] = {}
        for i, step in enumerate(self._steps):
            for ref in step.refs():
                readers.setdefault(self._position[ref.node], []).append(i)
        for i in reversed(range(len(self._steps))):
            mine = readers.get(i, [])
            if self._computed[i] and mine and i not in wanted and all(self._computed[reader] for reader in mine):
                self._stage[i] = min(self._stage[reader] for reader in mine) - self._sums[i]
        # Beside sums over samples, what comes of predictions alone is computed again and not stored: it would have to
        # be read like they are.
        self._again = [False] * len(self._steps)
        for i, step in enumerate(self._steps):
            operands = [self._position[ref.node] for ref in step.refs()]
            elementwise = self._computed[i] and not self._sums[i] and any(self._sums)
            self._again[i] = elementwise and all(self._nodes[p].op is None or self._again[p] for p in operands)

    def _can_compute(self, step: Step) -> bool:
        if step.op in VIEWS:
            base = step.args[0]
            on_computed = isinstance(base, Ref) and self._computed[self._position[base.node]]
            return on_computed and view_dims(step, base.spec[0]) is not None
        if step.op is STD:
            return self._on_gpu and is_sample_std(step, self._exact)
        if step.op is NORM:
            return self._with_norm and self._on_gpu and is_row_norm(step, self._exact)
        return is_elementwise(step, self._exact, self._on_gpu)

    def _borrowed(self, actions: Sequence[int | Launch]) -> frozenset[int]:
        """Of each launch the last call that it alone reads, once: a kernel waits for one."""
        launches = [action for action in actions if isinstance(action, Launch)]
        reads = [position for launch in launches for position in launch.positions]
        for action in actions:
            if isinstance(action, int):
                reads += 2 * [self._position[ref.node] for ref in self._steps[action].refs()]
        chosen = set()
        for launch in launches:
            if launch.program.correction is not None:
                continue  # its kernel has nothing to wait with
            calls = [p for p in launch.positions if self._nodes[p].op is None and reads.count(p) == 1]
            chosen.update(calls[-1:])
        return frozenset(chosen)

    def _required(self, wanted: frozenset[int]) -> set[int]:
        """The computed ops whose values something other than their own stage's programs needs."""
        required = {i for i in (*wanted, len(self._steps) - 1) if self._computed[i]}
        for i, step in enumerate(self._steps):
            for ref in step.refs():
                p = self._position[ref.node]
                later = self._stage[i] > self._stage[p] and not self._again[p]
                if self._computed[p] and (not self._computed[i] or later):
                    required.add(p)
        return required

    def _launches(self, shape: tuple[int, ...], outputs: list[int], stage: int) -> list[int | Launch]:
        if 0 in shape:
            raise Unfusable("there is no element to compute")
        try:
            launch = self._lower(shape, outputs, stage)
        except Unfusable:
            if len(outputs) == 1:
                raise
            return [action for output in outputs for action in self._launches(shape, [output], stage)]
        alone = len(launch.program.code) < 2 and len(outputs) == 1 and not (self._has_place or self._sums[outputs[0]])
        reads = [self._position[ref.node] for ref in self._steps[outputs[0]].refs()]
        if alone and not any(self._again[p] or (self._computed[p] and self._stage[p] == stage) for p in reads):
            return [outputs[0]]  # PyTorch's own kernel does as well
        return [launch]

    def _lower(self, shape: tuple[int, ...], outputs: list[int], stage: int) -> Launch:
        def computed(i: int) -> bool:
            return self._computed[i] and (self._stage[i] == stage or self._again[i]) and not self._sums[i]

        lowering = Lowering(self._steps, self._position, computed, shape, self._exact, self._on_gpu)
        return lowering.standard_deviations(outputs) if self._sums[outputs[0]] else lowering.launch(outputs)
