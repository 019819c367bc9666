"""How tensors travel between the leader and a follower. The control socket says which tensors; a transport moves them.

A transport has `name`, `reads_later` (tensors must keep their values after `push` returns), and these methods:
  stage(flats) -> descriptor    called before the header is sent; the descriptor travels in the header
  push(flats, conn)             called after the header is sent
  accept(descriptor, conn)      called right after a header is read
  pull(descriptor, flats)       fills `flats`, in the order in which the messages were sent
  release(messages)             the peer has pulled that many of our messages, all told
  abort()                       wakes up every wait; nothing works afterwards
  close()
`flats` are 1-D uint8 tensors, at least one; a header without tensors passes no transport. There are `host` (shared
memory) and `nccl`; `peer` (CUDA IPC) is to come and has its name reserved.
"""

from __future__ import annotations

import torch

from cfg_parallel.errors import ConfigurationError

TRANSPORTS = ("auto", "host", "nccl")


def resolve(name: str, devices: list[torch.device]) -> tuple[str, str]:
    """The transport to use between `devices`, and why. Raises ConfigurationError when `name` cannot work there."""
    if name == "peer":
        raise ConfigurationError("transport='peer' is not part of this version; use 'auto' or 'nccl'.")
    if name not in TRANSPORTS:
        raise ConfigurationError(f"Expected transport to be one of {', '.join(TRANSPORTS)}, but got {name!r}.")
    on_gpus = all(device.type == "cuda" for device in devices)
    if name == "nccl" and not on_gpus:
        raise ConfigurationError(f"transport='nccl' needs GPUs, but got devices {_join(devices)}; use 'auto'.")
    if name != "auto":
        return name, "asked for"
    if not on_gpus:
        return "host", "not all devices are GPUs"
    from cfg_parallel import extension

    missing = extension.missing_reason()
    if missing is not None:
        return "host", f"nccl needs the compiled extension: {missing}"
    return "nccl", "all devices are GPUs"


def _join(devices: list[torch.device]) -> str:
    return ", ".join(str(device) for device in devices)
