"""Followers and ranks forked from this process, which has imported everything already: their starts cost nothing.

Other processes all the same, with the main loop of a follower, or the script of a rank. How they are started is tested
elsewhere.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cfg_parallel.errors import FollowerLostError
from cfg_parallel.follower import Follower
from cfg_parallel.link import Link
from cfg_parallel.remote import RemoteFollower


class Process:
    """A forked process with the part of subprocess.Popen's face that RemoteFollower uses."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self._code: int | None = None
        self.pid = process.pid

    def poll(self) -> int | None:
        if self._code is None and self._process.exitcode is not None:
            self._code = self._process.exitcode
            self._process.close()  # two files, which would stay open for as long as this object is there
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            self._process.kill()

    def wait(self, timeout: float | None = None) -> None:
        if self.poll() is None:
            self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("follower", timeout or 0)


def _serve(connection: Connection, device: torch.device) -> None:
    follower = Follower(Link(connection, device))
    try:
        if follower.greet():
            follower.serve()
    except FollowerLostError:
        os._exit(1)  # the leader is gone
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _start(leader_device: torch.device, device: torch.device, timeout: float) -> RemoteFollower:
    ours, theirs = socket.socketpair()
    connection = Connection(theirs.detach())
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(connection, device), daemon=True)
    process.start()
    connection.close()
    remote = RemoteFollower(Connection(ours.detach()), leader_device, device, timeout)
    remote.process = Process(process)  # type: ignore[assignment]
    remote._stderr = tempfile.TemporaryFile()  # noqa: SIM115
    return remote


def forked_followers() -> Any:
    """Inside this context `enable_cfg_parallel` forks its followers, where there is no GPU."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    return mock.patch.object(RemoteFollower, "start", staticmethod(_start))


def _run_rank(script: Path, rank: int, processes: int, port: int, output: Any) -> None:
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def forked_ranks(script: Path, processes: int, timeout: float = 150) -> tuple[int, str]:
    """The script in so many ranks, as `torchrun` would run them on CPUs: the first exit status that is not 0, and what
    they wrote. When one fails, the others are ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryFile("w+") as output:
        ranks = [
            fork.Process(target=_run_rank, args=(script, rank, processes, port, output)) for rank in range(processes)
        ]
        end = time.monotonic() + timeout
        try:
            for rank in ranks:
                rank.start()
            while not any(rank.exitcode for rank in ranks) and any(rank.is_alive() for rank in ranks):
                assert time.monotonic() < end, f"the ranks were not done after {timeout} s"
                time.sleep(0.05)
            status = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()
        output.seek(0)
        return status, output.read()
