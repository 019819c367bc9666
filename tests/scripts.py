"""Scripts in processes of their own, as users run them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

PREAMBLE = f"""
import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch; torch.set_num_threads(1)
import cfg_parallel
from tiny import TINY, generate
tiny = TINY["qwen_image"]
pipe = tiny.build()
"""


def run(command: list[str], script: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=script, capture_output=True, text=True, timeout=timeout)


def torchrun(script: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return run([*command, str(script)], timeout=150)


def kill_a_leader(device: str) -> None:
    """`kill -9` of a leader in the middle of its work leaves no follower 2 s later."""
    script = f"""{PREAMBLE}
pipe.to({device!r})
handle = cfg_parallel.enable_cfg_parallel(pipe)
print(handle._leader.remotes[0].process.pid, flush=True)
while True:
    generate(pipe, tiny.inputs())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        follower = psutil.Process(int(leader.stdout.readline()))
        time.sleep(1)
        assert follower.is_running()
        leader.kill()
        leader.wait(5)
        psutil.wait_procs([follower], timeout=2)
        assert not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE
