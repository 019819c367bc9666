"""What happened in the last generation, and in a sentence why it was or was not faster than one device."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from cfg_parallel.transports import ASKED_FOR

# What a reason for a slower transport, or an eager forward, has in it -> what to do about it.
_FIXES = {
    "no peer access": "`nvidia-smi topo -p2p w` shows which GPUs have it",
    "peer does not work here": "in a container try --ipc=host; PCIe ACS or an IOMMU can be in the way too",
    "the GPU is the limit": "cuda_graphs=True captures all the same",
    "too few for a graph to pay": "calls of one kind have one picture size and one prompt length",
    "its cache decides": "denoiser.disable_cache() makes graphs possible",
    "it changes the denoiser's weights": "it can be a graph without those",
    "a forward hook": "remove the hook",
    "it is compiled with CUDA graphs": "which are as good",
    "is in host memory": "pass it on the GPU",
    "the forward cannot be captured": "compile=True, if it is off, makes launching quicker without a graph",
}


def with_fix(reason: str) -> str:
    """The reason, and what to do about it where that is known."""
    fix = next((fix for part, fix in _FIXES.items() if part in reason), None)
    return reason if fix is None else f"{reason}; {fix}"


@dataclass(slots=True)
class Report:
    """Times are in milliseconds unless a name says seconds, sizes in bytes.

    `leader_wait_ms` is the time in which the leader's device had nothing to do but wait for the followers' predictions,
    `follower_wait_ms` the time between a follower's forwards, `launch_wait_ms` the time in which the leader's host
    waited for a follower to launch. `leader_busy_ms` and `follower_busy_ms` add up the forwards. `step_forward_ms`
    has, for each step, what the forwards took on the device that was busy longest; it is empty where a device did not
    run as many in each step.

    `gpus` are the devices' names, and empty when they have none.

    `fused` and `replayed` tell what became of the predictions of the steps with guidance: combined by fused kernels
    (rule and backend -> steps), or op by op as PyTorch does it (reason -> steps).

    `graph_forwards` counts the forwards, on all devices, that were replays of a CUDA graph, and `eager_forwards` the
    others (reason -> forwards); both are 0 and empty with cuda_graphs=False. `compile_seconds` and, of the slowest
    follower, `follower_compile_seconds` were spent in torch.compile, on all devices at the same time."""

    devices: list[str]
    transport: str
    transport_reason: str
    gpus: list[str] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    guided_steps: int = 0
    parallel_steps: int = 0
    calls_shipped: int = 0
    calls_local: int = 0
    bytes_to_followers: int = 0
    bytes_from_followers: int = 0
    ship_ms: float = 0.0
    launch_wait_ms: float = 0.0
    leader_wait_ms: float = 0.0
    follower_wait_ms: float = 0.0
    leader_forward_ms: float | None = None
    follower_forward_ms: float | None = None
    leader_busy_ms: float = 0.0
    follower_busy_ms: float = 0.0
    step_forward_ms: list[float] = field(default_factory=list)
    follower_peak_bytes: int | None = None
    replica_bytes: int = 0
    replica_seconds: float = 0.0
    guidance: dict[str, Any] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    replayed: dict[str, int] = field(default_factory=dict)
    graph_forwards: int = 0
    graphs_captured: int = 0
    eager_forwards: dict[str, int] = field(default_factory=dict)
    compile_seconds: float = 0.0
    follower_compile_seconds: float = 0.0
    notes: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    @property
    def why(self) -> str:
        """One sentence: why there was, or was not, a speed-up."""
        if self.steps == 0:
            return "no speed-up: the pipeline did not call its denoiser."
        if self.lost:
            return f"no speed-up for part of the run: {self.lost[0]}"
        if len(self.devices) == 1:
            return f"no speed-up: {self.devices[0]} ran every pass, alone; cfg_parallel_size=2 takes a second device."
        if self.parallel_steps:
            ran = f"in {self.parallel_steps} of {self.steps} steps the passes ran on {len(self.devices)} devices"
            slow, fast = self._slower()
            if slow == "follower" and self._imbalance() > 2:
                return (
                    f"no speed-up: {ran}, but a forward takes {self._imbalance():.1f} times as long on the "
                    f"{self._named(slow)} as on the {self._named(fast)}{self._detour()}."
                )
            there, here = self.follower_busy_ms / 1e3, self.leader_busy_ms / 1e3
            extra = self._cost() + self._detour()
            return f"in parallel: {ran}, {there:.2f} s of forwards there beside {here:.2f} s here{extra}."
        if self.guided_steps == 0:
            return f"no speed-up: {self._one_pass()}."
        reason = next(iter(self.notes), "no second pass could run elsewhere")
        return f"no speed-up: guidance was on in {self.guided_steps} of {self.steps} steps, but {reason}."

    def _imbalance(self) -> float:
        a, b = self.leader_forward_ms, self.follower_forward_ms
        return max(a, b) / min(a, b) if a and b else 1.0

    def _slower(self) -> tuple[str, str]:
        """The slower side, and the other."""
        follower_is = (self.follower_forward_ms or 0) > (self.leader_forward_ms or 0)
        return ("follower", "leader") if follower_is else ("leader", "follower")

    def _named(self, side: str) -> str:
        gpus = {"leader": self.gpus[:1], "follower": self.gpus[1:2]}
        return f"{side} ({gpus[side][0]})" if len(set(self.gpus)) > 1 else side

    def _cost(self) -> str:
        """What a difference in speed costs in a step, and what the speed-up could be."""
        here, there = self.leader_forward_ms, self.follower_forward_ms
        if not here or not there or self._imbalance() <= 1.15:
            return ""
        followers = len(self.devices) - 1
        shipped = max(1, round(self.calls_shipped / self.parallel_steps / followers))  # in a step, to each
        local = max(1, round(self.calls_local / self.steps))
        step, even = max(here * local, there * shipped), min(here, there) * max(local, shipped)
        if step <= even:  # the slower side had less to do
            return ""
        forwards = local + shipped * followers
        slow, fast = self._slower()
        return (
            f"; a forward takes {self._imbalance():.2f} times as long on the {self._named(slow)} as on the "
            f"{self._named(fast)}, which waits {step - even:.0f} ms a step for it: the forwards of a step are "
            f"{forwards * min(here, there) / step:.2f} times as fast as on the faster device alone, where equal ones "
            f"would make it {forwards * min(here, there) / even:.2f}"
        )

    def _detour(self) -> str:
        on_gpus = self.devices[0] != "cpu"
        return "; tensors went through host memory, the slowest way" if on_gpus and self.transport == "host" else ""

    def _transport(self) -> str:
        reason = with_fix(self.transport_reason)
        if reason == ASKED_FOR and self.transport != "peer" and self.devices[0] != "cpu":
            reason += "; transport='auto' takes the fastest that works here"
        return f"{self.transport} ({reason})"

    def _one_pass(self) -> str:
        """That no step had a second pass, and what would give it one."""
        given = {name: value for name, value in self.guidance.items() if value is not None}
        numbers = {name: value for name, value in given.items() if isinstance(value, (int, float))}
        is_true = "true_cfg_scale" in self.guidance  # beside it, `guidance_scale` is an input of a distilled model
        # The first of several is the one that counts.
        scale = next((name for name in numbers if name == "true_cfg_scale" or not is_true), None)
        what, hints = "guidance was off", []
        if is_true and self.guidance.get("negative_prompt", "") is None:
            hints.append("a negative prompt is needed (' ' will do)")
        if scale is not None and numbers[scale] <= 1:
            hints.append(f"a {scale} above 1 turns it on" + ("" if is_true else " (a distilled model has none)"))
        if scale is None:
            hints.append("a model without guidance runs one pass a step, which no second device can share")
        elif not hints:
            what = "no second pass was recognised"
            hints.append("a distilled model runs one pass at any scale; `cfg-parallel models` lists what is recognised")
        if is_true and "guidance_scale" in numbers:
            hints.append("guidance_scale is an input of a distilled model and adds no pass")
        said = ", ".join(f"{name}={value}" for name, value in given.items() if name != "negative_prompt")
        return "; ".join([f"{what} in {self.steps} of {self.steps} steps" + (f": {said}" if said else ""), *hints])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"why": self.why}

    def __str__(self) -> str:
        rows = [
            ("devices", " + ".join(self.devices)),
            ("transport", self._transport()),
            ("steps", f"{self.steps}, {self.guided_steps} with guidance, {self.parallel_steps} on all devices"),
            ("calls", f"{self.calls_shipped} shipped, {self.calls_local} local"),
            (
                "shipped",
                f"{_mib(self.bytes_to_followers)} in {self.ship_ms:.1f} ms; back {_mib(self.bytes_from_followers)}",
            ),
            ("forward", f"leader {_ms(self.leader_forward_ms)}, follower {_ms(self.follower_forward_ms)} (median)"),
            ("waited", f"leader {self.leader_wait_ms:.1f} ms, follower {self.follower_wait_ms:.1f} ms"),
            ("total", f"{self.seconds:.2f} s"),
            ("replica", f"{self.replica_bytes / 1e9:.2f} GB shipped in {self.replica_seconds:.2f} s, before"),
        ]
        rows += [("fused", f"{count} steps: {what}") for what, count in self.fused.items()]
        rows += [("replayed", f"{count} steps: {reason}") for reason, count in self.replayed.items()]
        if self.graph_forwards or self.graphs_captured:
            rows.append(("graphs", f"{self.graph_forwards} forwards, {self.graphs_captured} graphs captured"))
        rows += [("eager", f"{count} forwards: {with_fix(reason)}") for reason, count in self.eager_forwards.items()]
        if self.compile_seconds or self.follower_compile_seconds:
            here, there = self.compile_seconds, self.follower_compile_seconds
            rows.append(("compiled", f"in {here:.1f} s here, {there:.1f} s on followers"))
        rows += [("note", f"{reason} ({count}x)") for reason, count in self.notes.items()]
        rows.append(("result", self.why))
        return "\n".join(f"{name:>10}  {text}" for name, text in rows)


def of_each_step(forwards: list[list[float]], steps: int) -> list[float]:
    """`Report.step_forward_ms` of the forwards of each device."""
    if steps == 0 or any(not mine or len(mine) % steps for mine in forwards):
        return []
    counts = [len(mine) // steps for mine in forwards]
    return [max(sum(mine[i * n : (i + 1) * n]) for mine, n in zip(forwards, counts, strict=True)) for i in range(steps)]


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB"
