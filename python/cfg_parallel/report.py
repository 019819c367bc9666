"""What happened in the last generation, and in a sentence why it was or was not faster than one device."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any


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
        if self.parallel_steps:
            ran = f"in {self.parallel_steps} of {self.steps} steps the passes ran on {len(self.devices)} devices"
            slow, fast = self._slower()
            if slow == "follower" and self._imbalance() > 2:
                return (
                    f"no speed-up: {ran}, but a forward takes {self._imbalance():.1f} times as long on the "
                    f"{self._named(slow)} as on the {self._named(fast)}."
                )
            there, here = self.follower_busy_ms / 1e3, self.leader_busy_ms / 1e3
            return f"in parallel: {ran}, {there:.2f} s of forwards there beside {here:.2f} s here{self._cost()}."
        if self.guided_steps == 0:
            hint = self._guidance_hint()
            scale = self.guidance.get("true_cfg_scale", self.guidance.get("guidance_scale"))
            unseen = isinstance(scale, (int, float)) and scale > 1 and ";" not in hint
            what = "no second pass was recognised" if unseen else "guidance was off"
            return f"no speed-up: {what} in {self.steps} of {self.steps} steps{hint}."
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

    def _guidance_hint(self) -> str:
        if not self.guidance:
            return ""
        given = ", ".join(f"{name}={value}" for name, value in self.guidance.items() if name != "negative_prompt")
        hint = f": {given}" if given else ""
        if self.guidance.get("negative_prompt", "") is None:
            hint += "; a negative prompt is needed" if "true_cfg_scale" in self.guidance else ""
        # Beside `true_cfg_scale`, `guidance_scale` is an input of a distilled model.
        names = ["true_cfg_scale"] if "true_cfg_scale" in self.guidance else [n for n in self.guidance if "scale" in n]
        scales = [self.guidance[name] for name in names if isinstance(self.guidance[name], (int, float))]
        if scales and max(scales) <= 1:
            hint += "; a scale above 1 turns it on"
        return hint

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"why": self.why}

    def __str__(self) -> str:
        rows = [
            ("devices", " + ".join(self.devices)),
            ("transport", f"{self.transport} ({self.transport_reason})"),
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
        rows += [("eager", f"{count} forwards: {reason}") for reason, count in self.eager_forwards.items()]
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
