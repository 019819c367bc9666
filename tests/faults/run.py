"""One case, and what many come to."""

from __future__ import annotations

import datetime
import platform
import random
from collections.abc import Sequence
from typing import Any

import torch

from faults.kinds import KINDS
from faults.world import Outcome, World, belongings


def run_case(world: World, kind: str, rng: random.Random) -> Outcome:
    """A good generation, the fault, and a good one again: only then is it told what was left behind."""
    world.good(rng.randrange(1000))
    before = belongings(world.device)
    outcome = Outcome()
    KINDS[kind](world, rng, outcome)
    world.good(rng.randrange(1000))
    outcome.left_behind = world.left_behind(before)
    return outcome


def summarize(
    results: Sequence[tuple[str, Outcome]], device: str, followers: str, first_seed: int = 0
) -> list[dict[str, Any]]:
    """A row for each kind. `followers` were started as a user's are, or forked from a process that was ready."""
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in results):
        outcomes = [outcome for name, outcome in results if name == kind]
        rows.append(
            {
                "bench": "faults",
                "kind": kind,
                "cases": len(outcomes),
                "returned": all(outcome.returned for outcome in outcomes),
                "equal": all(outcome.equal for outcome in outcomes),
                "worst_seconds": round(max(outcome.seconds for outcome in outcomes), 2),
                "worst_late": round(max(outcome.late for outcome in outcomes), 2),
                "left_behind": sum(bool(outcome.left_behind) for outcome in outcomes),
                "device": device if device == "cpu" else f"2x {torch.cuda.get_device_name(0)}",
                "followers": followers,
                "first_seed": first_seed,
                "machine": platform.machine(),
                "torch": torch.__version__,
                "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
    return rows
