"""How tensors travel between the leader and a follower. The control socket says which tensors; a transport moves them.

A transport has `name`, `reads_later` (tensors must keep their values after `push` returns), and these methods:
  stage(flats) -> descriptor    called before the header is sent; the descriptor travels in the header
  push(flats, conn)             called after the header is sent
  accept(descriptor, conn)      called right after a header is read
  pull(descriptor, flats)       fills `flats`, in the order in which the messages were sent
  release(messages)             the peer has pulled that many of our messages, all told
  check()                       raises FollowerLostError when what was pulled is known to be incomplete
  abort()                       wakes up every wait; nothing works afterwards
  close()
`flats` are 1-D uint8 tensors, at least one; a header without tensors passes no transport. There are `host` (shared
memory), `nccl`, and `peer` (CUDA IPC), which can also lend a message to a kernel that reads it where it lies.
"""

from __future__ import annotations

import itertools

import torch

from cfg_parallel.errors import ConfigurationError

TRANSPORTS = ("auto", "host", "nccl", "peer")
ASKED_FOR = "asked for"


def resolve(name: str, devices: list[torch.device]) -> tuple[str, str]:
    """The transport to use between `devices`, and why. Raises ConfigurationError when `name` cannot work there.

    Whether `peer` works shows only when two processes try it: with "auto", the caller goes on to `nccl` then."""
    if name not in TRANSPORTS:
        raise ConfigurationError(f"Expected transport to be one of {', '.join(TRANSPORTS)}, but got {name!r}.")
    on_gpus = all(device.type == "cuda" for device in devices)
    if name in ("nccl", "peer") and not on_gpus:
        raise ConfigurationError(f"transport={name!r} needs GPUs, but got devices {_join(devices)}; use 'auto'.")
    if name in ("host", "nccl"):
        return name, ASKED_FOR
    if not on_gpus:
        return "host", "not all devices are GPUs"
    if len(devices) == 1:
        return "host", "there is one device, so nothing travels"
    from cfg_parallel import extension

    missing = extension.missing_reason()
    if missing is not None:
        if name == "peer":
            raise ConfigurationError(f"transport='peer' needs the compiled extension: {missing}")
        return "host", f"peer and nccl need the compiled extension: {missing}"
    without = _pair_without_access(devices)
    if without is not None:
        reason = f"no peer access between {without}"
        if name == "peer":
            raise ConfigurationError(f"transport='peer' cannot work: {reason} (`nvidia-smi topo -p2p w`); use 'nccl'.")
        return "nccl", reason
    return "peer", ASKED_FOR if name == "peer" else f"peer access between {_join(devices, ' and ')}"


def _pair_without_access(devices: list[torch.device]) -> str | None:
    """The leader and each follower write into each other's memory."""
    for pair in ((devices[0], follower) for follower in devices[1:]):
        for device, peer in itertools.permutations(pair):
            if not torch.cuda.can_device_access_peer(device, peer):
                return _join(list(pair), " and ")
    return None


def _join(devices: list[torch.device], separator: str = ", ") -> str:
    return separator.join(str(device) for device in devices)
