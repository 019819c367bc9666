"""What the report says to a person: why there was, or was not, a speed-up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfg_parallel import report as report_module
from cfg_parallel.report import Report, median, of_each_step

NORMAL: dict[str, Any] = {
    "devices": ["cuda:0", "cuda:1"],
    "transport": "nccl",
    "transport_reason": "all devices are GPUs",
    "seconds": 12.0,
    "steps": 50,
    "guided_steps": 50,
    "parallel_steps": 49,
    "calls_shipped": 49,
    "calls_local": 51,
    "bytes_to_followers": 3 << 20,
    "bytes_from_followers": 1 << 20,
    "ship_ms": 4.0,
    "leader_forward_ms": 200.0,
    "follower_forward_ms": 205.0,
    "leader_busy_ms": 10_000.0,
    "follower_busy_ms": 9_800.0,
    "guidance": {"true_cfg_scale": 4.0, "negative_prompt": "blurry"},
}


def report(**changes: Any) -> Report:
    return Report(**(NORMAL | changes))


def off(**guidance: Any) -> str:
    return report(
        guided_steps=0, parallel_steps=0, follower_forward_ms=None, follower_busy_ms=0.0, guidance=guidance
    ).why


def test_normal() -> None:
    why = report().why
    assert why.startswith("in parallel: in 49 of 50 steps") and why.endswith(".")
    assert "2 devices" in why and "9.80 s" in why and "10.00 s" in why and "waits" not in why


@pytest.mark.parametrize(("leader", "follower", "slow"), [(200.0, 300.0, "follower"), (300.0, 200.0, "leader")])
def test_imbalance(leader: float, follower: float, slow: str) -> None:
    why = report(leader_forward_ms=leader, follower_forward_ms=follower).why
    assert why.startswith("in parallel") and f"a forward takes 1.50 times as long on the {slow} as on the" in why
    assert "waits 100 ms a step" in why and "1.33 times as fast" in why and why.endswith("would make it 2.00.")
    assert "waits" not in report(leader_forward_ms=leader, follower_forward_ms=leader * 1.1).why


def test_gpus_that_differ_are_named() -> None:
    names = {"gpus": ["NVIDIA RTX 4090", "NVIDIA RTX 3090"]}
    assert (
        "on the follower (NVIDIA RTX 3090) as on the leader (NVIDIA RTX 4090)"
        in report(follower_forward_ms=300.0, **names).why
    )
    assert "on the follower (NVIDIA RTX 3090) as on the leader" in report(follower_forward_ms=900.0, **names).why
    assert "NVIDIA" not in report(follower_forward_ms=300.0, gpus=["NVIDIA L4"] * 2).why
    assert "NVIDIA" not in report(**names).why  # a difference that does not show


def test_a_slower_leader_that_has_less_to_do() -> None:
    """Three passes on two devices: the follower runs two of them, and nobody waits for the leader."""
    three = {"calls_shipped": 98, "calls_local": 52, "follower_forward_ms": 200.0}
    assert "waits" not in report(leader_forward_ms=300.0, **three).why
    assert "waits 100 ms a step" in report(leader_forward_ms=500.0, **three).why


def test_a_follower_too_slow_to_help() -> None:
    why = report(follower_forward_ms=900.0).why
    assert why.startswith("no speed-up: in 49 of 50 steps") and "4.5 times as long on the follower" in why


def test_imbalance_without_times() -> None:
    for times in ((None, 1.0), (1.0, None), (0.0, 1.0), (None, None)):
        assert report(leader_forward_ms=times[0], follower_forward_ms=times[1]).why.startswith("in parallel")


def test_lost() -> None:
    why = report(lost=["The follower on cuda:1 was lost: the process ended. Its last words: out of memory"]).why
    assert why.startswith("no speed-up for part of the run:") and "out of memory" in why
    assert "no speed-up" in report(lost=["x"], parallel_steps=0, calls_shipped=0).why


def test_no_denoiser_call() -> None:
    assert "did not call its denoiser" in Report(["cpu", "cpu"], "host", "asked for").why


def test_guidance_off_by_scale() -> None:
    why = off(guidance_scale=1.0, negative_prompt="blurry")
    assert why == (
        "no speed-up: guidance was off in 50 of 50 steps: guidance_scale=1.0; a guidance_scale above 1 turns it on "
        "(a distilled model has none)."
    )
    assert "a guidance_scale above 1" in off(guidance_scale=0)
    assert "a guidance_scale above 1" in off(guidance_scale=1.0, image_guidance_scale=1.5)  # InstructPix2Pix


def test_guidance_off_by_the_missing_negative_prompt() -> None:
    why = off(true_cfg_scale=4.0, negative_prompt=None)
    assert "guidance was off in 50 of 50 steps: true_cfg_scale=4.0; a negative prompt is needed (' ' will do)." in why
    assert "negative prompt" not in off(true_cfg_scale=1.0, negative_prompt="")  # empty is one, to diffusers


def test_guidance_off_by_both() -> None:
    why = off(true_cfg_scale=1.0, negative_prompt=None)
    assert "a negative prompt is needed" in why and "a true_cfg_scale above 1" in why


def test_true_guidance_is_not_hidden_by_distilled_guidance() -> None:
    """Flux as it comes: `guidance_scale` is an input of the model there, `true_cfg_scale` is what turns guidance on."""
    why = off(true_cfg_scale=1.0, guidance_scale=3.5, negative_prompt="blurry")
    assert "true_cfg_scale=1.0" in why and "a true_cfg_scale above 1" in why
    assert "guidance_scale is an input of a distilled model and adds no pass" in why
    why = off(true_cfg_scale=4.0, guidance_scale=1.0, negative_prompt=None)
    assert "a negative prompt is needed" in why and "above 1" not in why
    assert "distilled" not in off(true_cfg_scale=1.0, guidance_scale=None, negative_prompt="blurry")


def test_guidance_on_and_not_recognised() -> None:
    report = Report(["cpu"] * 2, "host", "", steps=4, guidance={"guidance_scale": 7.5, "negative_prompt": None})
    assert report.why == (
        "no speed-up: no second pass was recognised in 4 of 4 steps: guidance_scale=7.5; a distilled model runs one "
        "pass at any scale; `cfg-parallel models` lists what is recognised."
    )
    assert "no second pass was recognised" in off(true_cfg_scale=4.0, negative_prompt="blurry")


def test_guidance_off_for_reasons_unknown() -> None:
    assert off() == (
        "no speed-up: guidance was off in 50 of 50 steps; a model without guidance runs one pass a step, which no "
        "second device can share."
    )
    assert off(guidance_scale=None, negative_prompt=None).startswith("no speed-up: guidance was off in 50 of 50 steps")
    assert off(guidance_scale=[3.0, 1.0]).endswith(".")
    assert "needed" not in off(guidance_scale=7.5, negative_prompt=None)


def test_one_device() -> None:
    """Whether a batch has two passes is not found out there, so nothing is said of guidance."""
    for guided in (0, 50):
        why = report(devices=["cuda:0"], guided_steps=guided, parallel_steps=0).why
        assert why == "no speed-up: cuda:0 ran every pass, alone; cfg_parallel_size=2 takes a second device."


@pytest.mark.parametrize(
    ("transport", "reason", "fix", "slowest"),
    [
        ("peer", "peer access between cuda:0 and cuda:1", None, False),
        ("peer", "asked for", None, False),
        ("nccl", "asked for", "transport='auto' takes the fastest", False),
        ("host", "asked for", "transport='auto' takes the fastest", True),
        ("nccl", "no peer access between cuda:0 and cuda:1", "`nvidia-smi topo -p2p w`", False),
        ("nccl", "peer does not work here: invalid argument", "--ipc=host", False),
    ],
)
def test_a_slower_transport_names_the_fix(transport: str, reason: str, fix: str | None, slowest: bool) -> None:
    made = report(transport=transport, transport_reason=reason)
    line = next(line for line in str(made).splitlines() if line.lstrip().startswith("transport"))
    assert f"{transport} ({reason}" in line
    assert line.endswith(f"({reason})") if fix is None else fix in line
    assert ("the slowest way" in made.why) is slowest
    on_cpus = report(devices=["cpu", "cpu"], transport="host", transport_reason=reason)
    assert "slowest" not in on_cpus.why and "'auto'" not in str(on_cpus)


def test_an_eager_forward_names_the_fix() -> None:
    eager = {"the forward cannot be captured: a forward hook would no longer be called": 4, "who knows": 2}
    rows = [row.strip() for row in str(report(eager_forwards=eager)).splitlines()]
    hook = (
        "eager  4 forwards: the forward cannot be captured: a forward hook would no longer be called; remove the hook"
    )
    assert hook in rows and "eager  2 forwards: who knows" in rows


def test_every_fix_is_of_a_reason_that_is_given() -> None:
    package = Path(report_module.__file__).parent
    text = "".join((package / name).read_text() for name in ("graphs.py", "enable.py", "transports/__init__.py"))
    assert not [part for part in report_module._FIXES if part not in text]


def test_the_prompt_is_not_in_the_report() -> None:
    changes = {"guided_steps": 0, "parallel_steps": 0, "guidance": {"true_cfg_scale": 1.0, "negative_prompt": "secret"}}
    assert "secret" not in str(report(**changes)) and "secret" not in report(**changes).why


def test_guidance_on_but_not_parallel() -> None:
    assert "no second pass could run elsewhere" in report(parallel_steps=0).why
    why = report(parallel_steps=0, notes={"gradients were enabled": 50, "another": 1}).why
    assert why == "no speed-up: guidance was on in 50 of 50 steps, but gradients were enabled."


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guided_steps": 0, "parallel_steps": 0},
        {"lost": ["x"], "notes": {"a": 3}},
        {"steps": 0},
        {"leader_forward_ms": None, "follower_forward_ms": None},
    ],
)
def test_text_and_dict(changes: dict[str, Any]) -> None:
    made = report(**changes)
    text = str(made)
    assert made.why in text and len({line.index("  ", 8) for line in text.splitlines()}) == 1
    for expected in ("cuda:0 + cuda:1", "nccl (all devices are GPUs)", "49 shipped, 51 local", "3.00 MiB"):
        assert expected in text
    assert all(f"{reason} ({count}x)" in text for reason, count in made.notes.items())
    values = json.loads(json.dumps(made.to_dict()))
    assert values["why"] == made.why and values["steps"] == made.steps and "follower_wait_ms" in values


def test_median() -> None:
    assert median([]) is None and median([3.0, 1.0, 2.0]) == 2.0


def test_forwards_of_each_step() -> None:
    assert of_each_step([[1.0, 2.0], [3.0, 1.0]], 2) == [3.0, 2.0]
    assert of_each_step([[1.0, 2.0, 3.0, 4.0]], 2) == [3.0, 7.0]
    assert of_each_step([[1.0, 2.0, 3.0], [1.0, 2.0]], 2) == of_each_step([[1.0], []], 1) == of_each_step([[]], 0) == []
