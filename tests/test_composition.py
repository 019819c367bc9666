"""Guidance and diffusers' own parallelism together: four ranks, two for each pass, two to share its forward."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from scripts import PREAMBLE, torchrun

pytestmark = pytest.mark.timeout(240)

# diffusers divides by the number of accelerators, and takes CPUs where it finds one.
SETUP = PREAMBLE.replace("qwen_image", "wan") + textwrap.dedent("""
    import torch.distributed as dist
    from diffusers import ContextParallelConfig
    torch.accelerator.device_count = lambda: 1
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("cfg", "ring", "ulysses"))
""")
CONTEXT = "ContextParallelConfig(ulysses_degree=2, mesh=mesh['ring', 'ulysses'])"


def test_two_passes_of_two_ranks_each(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        SETUP
        + textwrap.dedent(f"""
        one = generate(pipe, tiny.inputs())
        pipe.transformer.enable_parallelism(config={CONTEXT})
        expected = generate(pipe, tiny.inputs())  # all four ranks, two and two, both passes on each
        assert not torch.equal(one, expected) and torch.allclose(one, expected, rtol=1e-3, atol=1e-3)
        with cfg_parallel.enable_cfg_parallel(pipe) as handle:
            for _ in range(2):
                assert torch.equal(generate(pipe, tiny.inputs()), expected)
            if rank < 2:
                report = handle.report
                assert report.parallel_steps == report.steps == 3 and report.calls_shipped == 3, report
        open({str(tmp_path)!r} + f"/done{{rank}}", "w").close()
        dist.destroy_process_group()
        """)
    )
    result = torchrun(script, processes=4)
    assert result.returncode == 0, result.stderr[-4000:]
    assert all((tmp_path / f"done{rank}").exists() for rank in range(4))


def test_more_ranks_than_passes_need_something_to_share(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PREAMBLE + "cfg_parallel.enable_cfg_parallel(pipe)\n")
    result = torchrun(script, processes=4)
    assert result.returncode != 0
    assert "--nproc-per-node=2, or a multiple of it with enable_parallelism on the denoiser first" in result.stderr
