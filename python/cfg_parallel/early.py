"""Followers that are started before their pipeline is loaded: to import what they need takes them seconds, too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch

from cfg_parallel.errors import FollowerLostError
from cfg_parallel.remote import FOLLOWER_TIMEOUT, RemoteFollower

_coming: ContextVar[list[RemoteFollower] | None] = ContextVar("followers that nobody has taken yet", default=None)


@contextlib.contextmanager
def followers_coming(
    devices: Sequence[str], modules: Sequence[str], timeout: float = FOLLOWER_TIMEOUT
) -> Iterator[None]:
    """Starts a follower for each of `devices` but the first, the leader's, and has them import `modules`.
    `enable_cfg_parallel` takes them inside the block; at its end those that are left are ended."""
    leader, *others = map(torch.device, devices)
    coming: list[RemoteFollower] = []
    token = _coming.set(coming)
    try:
        for device in others:
            coming.append(RemoteFollower.start(leader, device, timeout))
            with contextlib.suppress(FollowerLostError):  # whoever takes it will know
                coming[-1].prepare(modules)
        yield
    finally:
        _coming.reset(token)
        with contextlib.ExitStack() as left:
            for follower in coming:
                left.callback(follower.close)


def take_or_start(leader: torch.device, device: torch.device, timeout: float) -> RemoteFollower:
    """The follower on `device` that is coming, or else a new one."""
    coming = _coming.get() or []
    for follower in coming:
        if (follower.device, follower.link.device) == (device, leader) and follower.check() is None:
            coming.remove(follower)
            return follower
    return RemoteFollower.start(leader, device, timeout)
