"""Where each denoiser call of a generation runs.

Every call returns pending predictions, so what the pipeline does next tells what the call was:
  another call that does not depend on it   a branch of the same step: from the next step on the first calls are shipped
  its rows are taken apart (`chunk(2)`)     a batch of branches: split by rows, the first shipped, the last run here
  anything else                             a step with one branch: run here
A guess that turns out wrong costs time, never bits: the call is run again the way one device would have run it.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from cfg_parallel import numerics
from cfg_parallel.caches import BATCH
from cfg_parallel.calls import Branch, Call, Denoiser, Split, deal
from cfg_parallel.changes import Hooks, left_something, traces
from cfg_parallel.codec import TensorSpec, UnshippableError, decode, encode_plain, is_dense, map_tensors, tensors_in
from cfg_parallel.compiling import is_compiled
from cfg_parallel.errors import FollowerLostError
from cfg_parallel.fusion import Fusion
from cfg_parallel.graphs import GraphMode, Graphs
from cfg_parallel.launch import executor, prepare
from cfg_parallel.pending import (
    Node,
    PendingPrediction,
    RecordingError,
    cat_rows,
    forget_unsettled,
    is_unsettled,
    join,
    pending_outputs,
    settle,
    settled_outputs,
)
from cfg_parallel.recording import ancestors
from cfg_parallel.remote import RemoteCall, RemoteCallError, RemoteFollower, Sent
from cfg_parallel.timesteps import HostKnown, plain
from cfg_parallel.timing import Mark, mark
from cfg_parallel.transports.peer import Arrival

OnLoss = Literal["recompute", "raise"]

INCOMPLETE = "A prediction received from it just before may be incomplete."
_LEARNED_LIMIT = 4096  # signatures; a server with prompts of every length must not grow
# A split by rows runs other kernels, which round otherwise; a wrong split changes the result. Relative 2-norms.
_SPLIT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class Template:
    """What a call's output looks like: its structure as bytes, and its tensors' shapes."""

    body: bytes
    specs: list[TensorSpec]


@dataclass(slots=True)
class Step:
    branches: int = 0
    shipped: int = 0
    nodes: list[Node] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)  # when the last one was over


@dataclass(slots=True)
class Generation:
    """What happened since the pipeline was called: for placing calls, and for the report."""

    started: float = field(default_factory=time.perf_counter)
    step: Step = field(default_factory=Step)
    steps: list[Step] = field(default_factory=list)
    local_calls: int = 0
    forwards: list[tuple[Mark, Mark]] = field(default_factory=list)  # around each local forward
    notes: dict[str, int] = field(default_factory=dict)  # reason -> how often
    fused: dict[str, int] = field(default_factory=dict)  # rule and backend -> steps
    replayed: dict[str, int] = field(default_factory=dict)  # reason -> steps
    branches: dict[tuple[str, str], Branch] = field(default_factory=dict)  # by denoiser with a cache, and context
    given_up: set[int] = field(default_factory=set)  # followers that failed, or are not there
    has_warned: bool = False
    seconds: float = 0.0

    def note(self, reason: str) -> None:
        self.notes[reason] = self.notes.get(reason, 0) + 1


class Leader:
    def __init__(
        self,
        device: torch.device,
        remotes: list[RemoteFollower],
        exact: bool = True,
        graphs: GraphMode = False,
        on_loss: OnLoss = "recompute",
    ) -> None:
        self.device = device
        self.on_loss = on_loss
        self.remotes = remotes
        # Where a replay has the same bits, nobody waits for a compiler.
        self.fusion = Fusion(device, *executor(device, wait=not exact), exact)
        if device.type == "cuda":
            self.fusion.prepare = prepare
        self.graphs = Graphs(device, graphs)
        self.generation: Generation | None = None
        self.before_step: Callable[[], None] | None = None
        self._expected = 1  # calls in a step, as the last step had them
        self._templates: dict[Any, Template] = {}
        self._splits: dict[Any, Split] = {}  # by signature: the branches in the batch
        self._whole: dict[Any, str] = {}  # signature -> why its rows cannot be split
        self._hooks: dict[str, Hooks] = {}
        self._looked: set[str] = set()  # denoisers of which a forward was run here, and looked at
        self._alone: dict[str, str] = {}  # denoiser -> why all its calls run here
        self._leave: set[str] = set()  # denoisers that were seen to leave something behind, whatever they are now

    def forget(self, denoiser: str) -> None:
        """What was learned of a denoiser's calls, when it has changed."""
        for learned in (self._templates, self._splits, self._whole):
            for signature in [signature for signature in learned if signature[0] == denoiser]:
                del learned[signature]  # type: ignore[attr-defined]
        self._alone.pop(denoiser, None)
        self._looked.discard(denoiser)
        self._expected = 1  # its first call runs here, to be looked at, and the second beside it
        self.graphs.forget(denoiser)

    def know_hooks(self, denoiser: Denoiser) -> None:
        """Those that its replicas have, too. A guider may put others on it for one pass, and take them off again."""
        self._hooks[denoiser.name] = Hooks(denoiser.module)

    def is_hooked(self, denoiser: Denoiser) -> bool:
        hooks = self._hooks.get(denoiser.name) if self.remotes or self.graphs.on else None
        return hooks is not None and hooks.changed()

    def begin(self, alone: str | None = None) -> Generation:
        """Followers that are lost take no part, and none does in a generation that is to run here, for the reason that
        `alone` gives."""
        self.generation = None
        forget_unsettled()
        for learned in (self._templates, self._splits, self._whole):
            if len(learned) > _LEARNED_LIMIT:
                learned.clear()  # type: ignore[attr-defined]
        settings = numerics.capture()
        self.graphs.begin(settings)
        self.generation = Generation()
        if alone is not None:
            self.generation.note(alone)
        for follower, remote in enumerate(self.remotes):
            if remote.lost is None:
                try:
                    remote.begin(settings, self.graphs.mode)
                except FollowerLostError as error:
                    self._give_up(self.generation, follower, error)
            elif remote.process is None:  # a rank, which nobody replaces
                raise FollowerLostError(remote.lost)
            else:
                remote.sent = Sent()
                self.generation.note(remote.lost)
            if remote.lost is not None or alone is not None:
                self.generation.given_up.add(follower)
        self.fusion.install()
        return self.generation

    def end(self) -> Generation:
        generation = self.generation
        assert generation is not None
        self.fusion.remove()
        self.graphs.end()
        self._end_step(generation)
        generation.fused, generation.replayed = dict(self.fusion.fused), dict(self.fusion.replayed)
        guided = sum(step.branches > 1 for step in generation.steps)
        rest = guided - sum(generation.fused.values()) - sum(generation.replayed.values())
        if rest > 0:
            generation.replayed["a prediction was asked for before it was combined"] = rest
        generation.seconds = time.perf_counter() - generation.started
        self.generation = None
        for follower, remote in enumerate(self.remotes):
            if remote.lost is None:
                try:
                    remote.end()
                except FollowerLostError as error:  # after everything was computed, if `died` does not say otherwise
                    self._warn_of_loss(generation, follower, error)
        return generation

    def reset(self, denoiser: Denoiser) -> None:
        """The caches of `denoiser` are empty here, so they are to be everywhere."""
        if self.generation is not None:
            for key in [key for key in self.generation.branches if key[0] == denoiser.name]:
                del self.generation.branches[key]
        if denoiser.cache is not None and denoiser.cache.by_context:
            for remote in self.remotes:
                with contextlib.suppress(FollowerLostError):  # which the next call says
                    remote.reset(denoiser.name)

    def dispatch(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `denoiser(*args, **kwargs)` gives, as pending predictions where that helps."""
        generation = self.generation
        if torch.is_grad_enabled():  # the arguments as they are: what is pending may be differentiated too
            if generation is not None:
                generation.note("gradients were enabled, and a prediction from another process has none")
                branch = self._branch(generation, denoiser, denoiser.context, None)
                self._bring_home(generation, branch, "Gradients are enabled.")
                self._end_step(generation)
                generation.step.branches += 1
                generation.local_calls += 1
                self._end_step(generation)
            return denoiser.module(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if any(isinstance(tensor, HostKnown) for tensor in tensors):
            args, kwargs = map_tensors(args, plain), map_tensors(kwargs, plain)
        pendings = [t for t in tensors if isinstance(t, PendingPrediction)]
        depends = generation is not None and _depends(pendings, generation.step.nodes)
        if pendings:
            args, kwargs = map_tensors(args, settle), map_tensors(kwargs, settle)
        if generation is None:
            return denoiser.module(*args, **kwargs)
        if depends or any(map(_was_read, generation.step.nodes)):
            self._end_step(generation)
        step = generation.step
        if self.before_step is not None and not step.nodes:
            self.before_step()
        call = Call.of(denoiser, args, kwargs, self.device)
        signature = call.signature()
        if self.is_hooked(denoiser):
            generation.note("the pipeline changes the denoiser's hooks or attention processors while it runs")
            return self._run_here(generation, call, signature, hooked=True)
        split = self._splits.get(signature)
        if split is not None and not step.nodes and signature in self._templates:
            return self._split(generation, call, signature, split)
        index = len(step.nodes)
        follower = self._place(generation, call, index)
        if follower is not None:
            output = self._ship(generation, call, signature, index, follower)
            if output is not None:
                return output
        return self._run_here(generation, call, signature)

    def _place(self, generation: Generation, call: Call, index: int) -> int | None:
        """The follower that is to run the call, which is number `index` of its step; None for the leader."""
        cache, alone = call.denoiser.cache, self._alone.get(call.denoiser.name)
        if alone is not None:
            if index and self.remotes:
                generation.note(alone)
            return None
        if cache is None:
            return self._deal(self._expected, index) if call.denoiser.name in self._looked else None
        if not cache.by_context or call.context is None:
            if index and self.remotes:
                generation.note(cache.why_alone)
            return None
        # As if of two, so that the first is beside the second from the first step on.
        follower = None if call.context[0] == BATCH else self._deal(max(2, self._expected), index)
        call.branch = self._branch(generation, call.denoiser, call.context, follower)
        return call.branch.follower

    def _branch(self, generation: Generation, denoiser: Denoiser, context: Any, follower: int | None) -> Branch:
        """The branch that a call is of, which is on `follower` if it is new."""
        key = denoiser.name, context[0] if context else ""
        branch = generation.branches.setdefault(key, Branch(key, follower))
        branch.calls += 1
        return branch

    def _deal(self, expected: int, index: int) -> int | None:
        """As `_place`, in a step of so many calls."""
        _, followers = deal(max(expected, index + 1), len(self.remotes) + 1)
        if index < len(followers):
            return followers[index]
        # One more than the last step had: the others run here already, so it is launched beside them.
        is_extra = bool(self.remotes) and expected <= index
        return index % len(self.remotes) if is_extra else None

    def _bring_home(self, generation: Generation, branch: Branch | None, why: str) -> None:
        """A branch runs here from now on. Its cache stays behind, so it cannot after its first call."""
        if branch is None or branch.follower is None:
            return
        if branch.calls > 1 or generation.branches.get(branch.key) is not branch:
            raise FollowerLostError(
                f"{why} The cache of the branch {branch.key[1]!r} is there, and the result needs it."
            )
        branch.follower = None

    def _end_step(self, generation: Generation) -> None:
        if generation.step.branches:
            self._expected = max(1, len(generation.step.nodes))
            generation.step.nodes = []
            generation.steps.append(generation.step)
            generation.step = Step()

    def _run(self, generation: Generation, call: Call, *, graphs: Graphs | None = None, **how: bool) -> Any:
        start = mark(self.device)
        output = call.run(self.device, graphs, **how)
        generation.forwards.append((start, mark(self.device)))
        generation.local_calls += 1
        return output

    # One call, run here.

    def _run_here(self, generation: Generation, call: Call, signature: Any, hooked: bool = False) -> Any:
        rows = call.rows()
        # To compile for a batch that is about to be taken apart would take as long as for its parts, and to compile
        # here for a first call as long as on the follower, where those after it run.
        is_new = bool(self.remotes) and signature not in self._templates and not hooked
        may_run_again = is_new and call.denoiser.cache is None and call.denoiser.name not in self._leave
        to_look = call.denoiser.name not in self._looked and not generation.step.nodes and rows == 1
        eagerly = may_run_again and (rows > 1 or to_look) and is_compiled(call.denoiser.module)
        with call.denoiser.uncompiled() if eagerly else contextlib.nullcontext():
            output = self._run_as_given(generation, call, signature, hooked or eagerly)
        step = generation.step
        try:
            body, tensors = encode_plain(output)
        except UnshippableError as error:
            step.branches += 1
            generation.note(f"the output cannot be followed: {error}")
            self._end_step(generation)
            return output
        values = [t if is_dense(t) else t.clone() for t in cast("list[torch.Tensor]", tensors)]
        specs = [TensorSpec.of(tensor, self.device) for tensor in values]
        self._templates[signature] = Template(body, specs)
        if eagerly and to_look and call.denoiser.name not in self._alone:
            self._expected = max(2, self._expected)
            shipped = self._ship(generation, call, signature, 0, 0)
            if shipped is not None:
                return shipped
        step.branches += 1
        cache = call.denoiser.cache
        listed = call.is_listed()
        by_rows = len(specs) == rows if listed else all(spec.shape[:1] == (rows,) for spec in specs)
        may_split = bool(self.remotes) and rows > 1 and by_rows and not hooked
        node: Node

        def force() -> Sequence[torch.Tensor]:
            if may_split and len(node.row_splits) == 1:
                why = self._alone.get(call.denoiser.name, self._whole.get(signature))
                why = cache.why_alone if cache is not None else why
                if why is None:
                    joined = self._try_split(
                        generation, step, call, signature, next(iter(node.row_splits)), values, eagerly
                    )
                    if joined is not None:
                        return joined
                else:
                    generation.note(why)
                    step.branches += next(iter(node.row_splits)) - 1
            if eagerly and call.denoiser.name not in self._leave and self._is_as_it_was(call):
                return self._run_again(generation, call)
            if eagerly:
                generation.note("one call ran without compiled code, as it could not be run twice")
            return values

        node, pendings = self._pending(force, specs, rows if may_split else 0, listed)
        step.nodes.append(node)
        return decode(body, pendings)

    def _run_as_given(self, generation: Generation, call: Call, signature: Any, hooked: bool) -> Any:
        """The first run of a call. A denoiser that leaves something behind can only run where the pipeline looks."""
        name, module = call.denoiser.name, call.denoiser.module
        looks = bool(self.remotes) and (signature not in self._templates or name not in self._looked)
        before, given = (traces(module), list(tensors_in(call.given))) if looks else ({}, [])
        graphs = None if hooked or name in self._alone else self.graphs
        output = self._run(generation, call, as_given=True, graphs=graphs)
        if looks and left_something(before, traces(module)):
            self._alone[name] = "a forward leaves something behind in an object that the denoiser holds"
            self._leave.add(name)
        elif looks and not set(map(id, tensors_in(call.given))) <= set(map(id, given)):
            self._alone[name] = "a forward keeps something in one of its arguments"
            self._leave.add(name)
        self._looked.add(name)
        call.given = None
        return output

    # One call, shipped.

    def _ship(self, generation: Generation, call: Call, signature: Any, branch: int, follower: int) -> Any:
        """The call's output as pending predictions, or None when it has to run here."""
        remote_call = self._send(generation, call, branch, follower)
        if remote_call is None:
            return None
        template = self._templates.get(signature)
        if template is None:
            try:
                template = Template(*remote_call.wait())
            except (RemoteCallError, FollowerLostError) as error:
                self._give_up(generation, follower, error, call)
                return None
            self._templates[signature] = template
        step = generation.step
        node, pendings = self._pending(
            lambda: self._collect(generation, step, call, follower, remote_call, template), template.specs
        )
        node.borrow = lambda: _borrow(remote_call, template)
        step.branches += 1
        step.shipped += 1
        step.nodes.append(node)
        return decode(template.body, pendings)

    def _send(self, generation: Generation, call: Call, branch: int, follower: int) -> RemoteCall | None:
        remote = self.remotes[follower]
        if follower in generation.given_up:
            self._bring_home(generation, call.branch, remote.lost or "A follower was given up.")
            return None
        try:
            return remote.call(call.denoiser.name, branch, call.args, call.kwargs, call.context, call.autocast)
        except UnshippableError as error:
            self._bring_home(generation, call.branch, f"{error}.")
            generation.note(str(error))
        except FollowerLostError as error:
            self._give_up(generation, follower, error, call)
        return None

    def _collect(
        self,
        generation: Generation,
        step: Step,
        call: Call,
        follower: int,
        remote_call: RemoteCall,
        template: Template,
    ) -> Sequence[torch.Tensor]:
        try:
            _, specs = remote_call.wait()
            if [spec.shape for spec in specs] != [spec.shape for spec in template.specs]:
                raise RuntimeError(
                    f"The follower's prediction has shapes {[spec.shape for spec in specs]}, but a call with the same "
                    f"signature gave {[spec.shape for spec in template.specs]} before; please report this model."
                )
            return remote_call.values()
        except (RemoteCallError, FollowerLostError) as error:
            self._give_up(generation, follower, error, call)
            step.shipped -= 1
            try:
                return self._run_again(generation, call)
            except RecordingError as again:
                raise FollowerLostError(f"{error} {again}") from error

    # A batch of branches, split by rows.

    def _split(self, generation: Generation, call: Call, signature: Any, split: Split) -> Any:
        """The first rows shipped, the last run here; put together again when the pipeline takes the rows apart."""
        step = generation.step
        parts, template = self._split_rows(generation, step, call, split)
        rows, branches, listed = call.rows(), split.branches, call.is_listed()
        whole = self._templates[signature]
        specs = whole.specs if listed else [_stacked(spec, branches) for spec in template.specs]
        node: Node

        def force() -> Sequence[torch.Tensor]:
            if branches in node.row_splits:
                return join(parts, listed)
            del self._splits[signature]  # the rows stayed together, so they are no branches: run it as one device would
            generation.note("a batch was split that the pipeline then used whole; it was run again")
            return self._run_again(generation, call)

        node, pendings = self._pending(force, specs, rows, listed)
        node.parts = parts
        step.branches += branches
        step.nodes.append(node)
        return decode(whole.body, pendings)

    def _split_rows(
        self, generation: Generation, step: Step, call: Call, split: Split
    ) -> tuple[list[list[PendingPrediction]], Template]:
        _, followers = deal(split.branches, len(self.remotes) + 1)
        calls = call.split(*split)
        sent = [self._send(generation, c, i, f) for i, (c, f) in enumerate(zip(calls, followers, strict=False))]
        outputs = [encode_plain(self._run(generation, c, graphs=self.graphs)) for c in calls[len(sent) :]]
        body, last = outputs[-1]
        template = Template(body, [TensorSpec.of(tensor, self.device) for tensor in last])  # type: ignore[arg-type]
        parts: list[list[PendingPrediction]] = []
        for part, follower, remote_call in zip(calls, followers, sent, strict=False):
            if remote_call is None:
                output = self._run(generation, part, graphs=self.graphs)
                parts.append(settled_outputs(encode_plain(output)[1]))  # type: ignore[arg-type]
                continue
            step.shipped += 1

            def force(
                part: Call = part, follower: int = follower, remote_call: RemoteCall = remote_call
            ) -> Sequence[torch.Tensor]:
                return self._collect(generation, step, part, follower, remote_call, template)

            node, pendings = self._pending(force, template.specs)
            node.borrow = lambda remote_call=remote_call: _borrow(remote_call, template)  # type: ignore[misc]
            parts.append(pendings)
        parts.extend(settled_outputs(tensors) for _, tensors in outputs)  # type: ignore[arg-type]
        return parts, template

    def _run_again(self, generation: Generation, call: Call) -> Sequence[torch.Tensor]:
        """A call that was shipped, or split, run here as one device would have run it."""
        if not call.unchanged():
            raise RecordingError(
                "An argument of a call was overwritten before its result was used, so that it cannot be run again here."
            )
        if self.is_hooked(call.denoiser):
            raise RecordingError("The denoiser has other hooks by now than in a call that is to be run again here.")
        return encode_plain(self._run(generation, call, graphs=self.graphs, for_good=True))[1]  # type: ignore[return-value]

    def _try_split(
        self,
        generation: Generation,
        step: Step,
        call: Call,
        signature: Any,
        branches: int,
        whole: Sequence[torch.Tensor],
        eagerly: bool,
    ) -> Sequence[torch.Tensor] | None:
        """The first time that a batch shows itself as one: are its rows independent? Costs an extra forward. None when
        they are not. `eagerly`: `whole` was not computed by compiled code, so its parts are to be compared without."""
        if not self._is_as_it_was(call):
            return None
        step.branches += branches - 1
        shipped = step.shipped
        reasons: list[str] = []
        for manner in call.manners():
            split = Split(branches, manner)
            try:
                if eagerly:
                    joined = join(self._eager_parts(generation, call, split), call.is_listed())
                else:
                    joined = join(self._split_rows(generation, step, call, split)[0], call.is_listed())
                reason = _difference(whole, joined)
            except (torch.OutOfMemoryError, RecordingError, FollowerLostError):
                raise
            except Exception as error:  # whatever a model says to a batch of another size
                reason = f"one branch alone raised {type(error).__name__}: {error}"
            if reason is None:
                self._splits[signature] = split
                if eagerly:
                    joined = join(self._split_rows(generation, step, call, split)[0], call.is_listed())
                return joined
            reasons.append(reason)
            step.shipped = shipped
        self._whole[signature] = f"the rows of a batch cannot be computed apart ({reasons[0]})"
        generation.note(self._whole[signature])
        return None

    def _eager_parts(self, generation: Generation, call: Call, split: Split) -> list[list[PendingPrediction]]:
        """The parts of a batch, one after the other on this device, without compiled code."""
        with call.denoiser.uncompiled():
            outputs = [encode_plain(self._run(generation, part)) for part in call.split(*split)]
        return [settled_outputs(tensors) for _, tensors in outputs]  # type: ignore[arg-type]

    def _is_as_it_was(self, call: Call) -> bool:
        """Whether the call can be run again."""
        return call.unchanged() and not self.is_hooked(call.denoiser)

    # Shared.

    def _pending(
        self, force: Any, specs: Sequence[TensorSpec], rows: int = 0, listed: bool = False
    ) -> tuple[Node, list[PendingPrediction]]:
        cpu = torch.device("cpu")
        metas = [(s.shape, s.stride, s.dtype, self.device if s.on_device else cpu) for s in specs]
        return pending_outputs(force, metas, rows, listed)

    def _give_up(self, generation: Generation, follower: int, error: Exception, call: Call | None = None) -> None:
        """What a follower owes, and would have got in this generation, is run here. Raises FollowerLostError where that
        cannot save it, or is not wanted."""
        remote = self.remotes[follower]
        remote.announced |= remote.lost is not None
        if self.on_loss == "raise":
            raise FollowerLostError(str(error)) from error
        if remote.died:
            raise FollowerLostError(f"{error} {INCOMPLETE}") from error
        if call is not None:
            self._bring_home(generation, call.branch, str(error))
        self._warn_of_loss(generation, follower, error)

    def _warn_of_loss(self, generation: Generation, follower: int, error: Exception) -> None:
        """Once for each follower and generation."""
        self.remotes[follower].announced |= self.remotes[follower].lost is not None
        if follower not in generation.given_up:
            generation.given_up.add(follower)
            generation.has_warned = True
            generation.note(str(error))
            warnings.warn(f"{error} Its calls of this generation are run on {self.device}.", stacklevel=2)


def _borrow(remote_call: RemoteCall, template: Template) -> Arrival | None:
    """None when the call's values are to be had in another way, which also deals with what went wrong."""
    try:
        _, specs = remote_call.wait()
        return remote_call.borrow() if len(specs) == 1 and specs == template.specs else None
    except (RemoteCallError, FollowerLostError):
        return None


def _depends(pendings: Sequence[PendingPrediction], calls: Sequence[Node]) -> bool:
    """Whether any of `pendings` is still to be computed from one of `calls`."""
    sources = {*calls, *(part[0]._node for call in calls for part in call.parts if part)}
    return any(node in sources for p in pendings if is_unsettled(p) for node in ancestors(p._node))


def _was_read(node: Node) -> bool:
    """Whether the pipeline has asked for the values of a call, so that what it calls next may depend on them."""
    taken_apart = node.row_splits and node.parts
    return node.values is not None or (
        bool(taken_apart) and not any(is_unsettled(p) for part in node.parts for p in part)
    )


def _stacked(spec: TensorSpec, parts: int) -> TensorSpec:
    """What `cat_rows` of so many equal parts gives."""
    part = torch.empty_strided(spec.shape, spec.stride, device="meta")
    whole = cat_rows([part] * parts)
    return TensorSpec(tuple(whole.shape), tuple(whole.stride()), spec.dtype, spec.on_device)


def _difference(whole: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> str | None:
    """None when the two agree up to the rounding of other kernels. Waits for the device: once a signature."""
    for a, b in zip(whole, parts, strict=True):
        if a.shape != b.shape:
            return f"shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        error = (a.double() - b.double()).norm() / a.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
        tolerance = _SPLIT_TOLERANCE.get(a.dtype, 0.0)
        if not float(error) <= tolerance:
            return f"they differ by {float(error):.1e} of their norm, more than {tolerance:.0e}"
    return None
