"""Guidance and diffusers' own parallelism together: one or two pairs of ranks, each of which shares its forwards."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from forked import forked_ranks
from scripts import PREAMBLE, torchrun

pytestmark = pytest.mark.timeout(240)

FOUR_GPUS = pytest.mark.gpu(count=4)
# diffusers divides by the number of accelerators, takes CPUs where it finds one, and keeps tensors on GPUs.
START = {
    "cpu": textwrap.dedent("""
        import torch.distributed as dist
        from diffusers.hooks import tensor_parallel
        torch.accelerator.device_count = lambda: 1
        tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    """),
    "cuda": textwrap.dedent("""
        import torch.distributed as dist
        rank = int(os.environ["RANK"])
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl")
        pipe.to(f"cuda:{rank}")
    """),
}


GENERATED = """
def generated():
    return generate(pipe, tiny.inputs()).cpu()
"""


def run(tmp_path: Path, device: str, model: str, pairs: int, script: str) -> None:
    """The script on two ranks for each pair: it has `pipe`, `generated()` and `rank`."""
    file = tmp_path / "script.py"
    end = f"\nopen({str(tmp_path)!r} + f'/done{{rank}}', 'w').close()\ndist.destroy_process_group()\n"
    file.write_text(PREAMBLE.replace("qwen_image", model) + START[device] + GENERATED + textwrap.dedent(script) + end)
    if device == "cpu":
        status, output = forked_ranks(file, 2 * pairs)
    else:
        result = torchrun(file, 2 * pairs)
        status, output = result.returncode, result.stderr
    assert status == 0, output[-4000:]
    assert all((tmp_path / f"done{rank}").exists() for rank in range(2 * pairs))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=FOUR_GPUS)])
def test_context_parallelism(tmp_path: Path, device: str) -> None:
    script = f"""
        from diffusers import ContextParallelConfig
        one = generated()
        names = ("cfg", "ring", "ulysses")
        mesh = dist.device_mesh.init_device_mesh({device!r}, (2, 1, 2), mesh_dim_names=names)
        config = ContextParallelConfig(ulysses_degree=2, mesh=mesh["ring", "ulysses"])
        pipe.transformer.enable_parallelism(config=config)
        expected = generated()  # all four ranks, two and two, both passes on each
        assert not torch.equal(one, expected) and torch.allclose(one, expected, rtol=1e-3, atol=1e-3)
        with cfg_parallel.enable_cfg_parallel(pipe) as handle:
            for _ in range(2):
                assert torch.equal(generated(), expected)
            if rank < 2:
                report = handle.report
                assert report.parallel_steps == report.steps == 3 and report.calls_shipped == 3, report
    """
    run(tmp_path, device, "wan", 2, script)


@pytest.mark.parametrize(
    ("device", "pairs"),
    [
        ("cpu", 1),
        ("cpu", 2),
        pytest.param("cuda", 1, marks=pytest.mark.gpu(count=2)),
        pytest.param("cuda", 2, marks=FOUR_GPUS),
    ],
)
def test_tensor_parallelism(tmp_path: Path, device: str, pairs: int) -> None:
    script = f"""
        from diffusers import TensorParallelConfig
        one = generated()
        mesh = dist.device_mesh.init_device_mesh({device!r}, ({pairs}, 2), mesh_dim_names=("cfg", "tp"))
        pipe.transformer.enable_parallelism(config=TensorParallelConfig(mesh=mesh["tp"]))
        shard, whole = pipe.transformer.transformer_blocks[0].attn.to_q.weight, pipe.transformer.img_in.weight
        assert 2 * shard.to_local().numel() == shard.numel()
        expected = generated()  # each pair, both passes
        assert torch.allclose(one, expected, rtol=1e-3, atol=1e-3)
        if rank >= 2:  # the weights of the ranks that lead count
            with torch.no_grad():
                shard.to_local().zero_()
                whole.zero_()
        with cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size={pairs}) as handle:
            for _ in range(2):
                assert torch.equal(generated(), expected)
            if rank < 2:
                report = handle.report
                assert report.guided_steps == report.steps == 3 and report.graph_forwards == 0, report
                shipped = 3 if {pairs} == 2 else 0
                assert report.parallel_steps == report.calls_shipped == shipped, report
            if rank < 2:  # a change is noticed, and shipped
                with torch.no_grad():
                    shard.to_local().mul_(1.5)
            changed = generated()
        assert not torch.equal(changed, expected)
        assert torch.equal(generated(), changed)
    """
    run(tmp_path, device, "qwen_image", pairs, script)


def test_more_ranks_than_passes_need_something_to_share(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PREAMBLE + "cfg_parallel.enable_cfg_parallel(pipe)\n")
    status, output = forked_ranks(script, 4)
    assert status != 0
    assert "--nproc-per-node=2, or a multiple of it with enable_parallelism on the denoiser first" in output
