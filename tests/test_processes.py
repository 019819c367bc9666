"""Scripts as users run them: plain, read from standard input, under torchrun, and killed."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from scripts import PREAMBLE, kill_a_leader, run, torchrun

pytestmark = pytest.mark.timeout(180)


def test_script_without_main_guard_and_with_its_own_classes() -> None:
    """Read from standard input, as a notebook's cells are: no file to import `Scaled` from on the follower."""
    script = PREAMBLE + textwrap.dedent("""
        class Scaled(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner
            def forward(self, x):
                return self.inner(x) * 0.5

        pipe.transformer.img_in = Scaled(pipe.transformer.img_in)
        expected = generate(pipe, tiny.inputs())
        handle = cfg_parallel.enable_cfg_parallel(pipe)
        print("equal", torch.equal(generate(pipe, tiny.inputs()), expected), handle.report.calls_shipped)
    """)
    result = run([sys.executable, "-"], script)
    assert result.returncode == 0, result.stderr
    assert "equal True 3" in result.stdout


def test_killed_leader_leaves_no_follower() -> None:
    kill_a_leader("cpu")


@pytest.mark.parametrize(
    "end",
    [
        "raise RuntimeError('on purpose')",
        *(pytest.param(end, marks=pytest.mark.thorough) for end in ("", "sys.exit(3)", "os._exit(4)")),
    ],
)
def test_ended_leader_leaves_no_follower(end: str) -> None:
    script = PREAMBLE + textwrap.dedent(f"""
        import os
        handle = cfg_parallel.enable_cfg_parallel(pipe)
        generate(pipe, tiny.inputs())
        print(handle._leader.remotes[0].process.pid, flush=True)
        {end}
    """)
    result = run([sys.executable, "-c", script])
    pid = int(result.stdout)
    deadline = time.monotonic() + 2
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


def test_torchrun(tmp_path: Path) -> None:
    """An SPMD script with no `if rank == 0`: every rank gets rank 0's image, equal to one device's."""
    script = tmp_path / "script.py"
    script.write_text(
        PREAMBLE
        + textwrap.dedent(f"""
        import os
        from diffusers.hooks import FirstBlockCacheConfig
        rank = int(os.environ["RANK"])
        expected = generate(pipe, tiny.inputs())
        cache = FirstBlockCacheConfig(threshold=1e9)
        pipe.transformer.enable_cache(cache)
        cached = generate(pipe, tiny.inputs())
        pipe.transformer.disable_cache()
        assert not torch.equal(cached, expected)
        if rank:  # rank 0's weights are what counts
            with torch.no_grad():
                pipe.transformer.img_in.weight.zero_()
        with cfg_parallel.enable_cfg_parallel(pipe) as handle:
            for _ in range(2):
                got = generate(pipe, tiny.inputs())
                assert torch.equal(got, expected)
            images = pipe(**tiny.inputs(output_type="pil")).images
            assert images[0].size == (32, 32)
            try:
                pipe(**tiny.inputs(output_type="pil", num_inference_steps=0))
            except Exception as error:
                open({str(tmp_path)!r} + f"/failed{{rank}}", "w").write(str(error))
            assert torch.equal(generate(pipe, tiny.inputs()), expected)
            if rank == 0:
                assert handle.report.parallel_steps == 3, handle.report
            pipe.transformer.enable_cache(cache)
            assert torch.equal(generate(pipe, tiny.inputs()), cached)
            if rank == 0:
                assert handle.report.parallel_steps == 3, handle.report
        open({str(tmp_path)!r} + f"/done{{rank}}", "w").write("yes")
        """)
    )
    result = torchrun(script)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
    assert (tmp_path / "failed0").exists() and (tmp_path / "failed1").exists()


@pytest.mark.thorough
def test_torchrun_with_the_wrong_number_of_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PREAMBLE + "cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size=3)\n")
    result = torchrun(script)
    assert result.returncode != 0
    assert "--nproc-per-node=3" in result.stderr


def test_import_needs_nothing() -> None:
    """`import cfg_parallel` and the command line load neither torch nor Triton nor the compiled module."""
    code = "import cfg_parallel, cfg_parallel.cli, sys; print([m for m in ('torch', 'triton') if m in sys.modules])"
    result = run([sys.executable, "-c", code])
    assert result.stdout.strip() == "[]", result.stderr
