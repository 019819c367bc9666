"""Followers forked from this process, which has imported everything already: two hundred starts cost nothing.

Another process all the same, with the main loop of a follower. How one is started is tested
elsewhere.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import tempfile
import traceback
from multiprocessing.connection import Connection
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
        follower.greet()
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
    """Inside this context `enable_cfg_parallel` forks its followers. For CPUs only."""
    return mock.patch.object(RemoteFollower, "start", staticmethod(_start))
