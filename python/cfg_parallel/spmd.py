"""Under torchrun the ranks play leader and follower: no process is started, they find each other by the store."""

from __future__ import annotations

import os
import secrets
import tempfile
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cfg_parallel.errors import CfgParallelError, ConfigurationError
from cfg_parallel.follower import Follower
from cfg_parallel.link import Link
from cfg_parallel.remote import RemoteFollower

_rounds = 0  # enable_cfg_parallel is called equally often on every rank, so this counts alike


def rank() -> int | None:
    """This process's rank under torchrun with more than one process, else None."""
    if not dist.is_available():
        return None
    if dist.is_initialized():
        return dist.get_rank() if dist.get_world_size() > 1 else None
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return int(os.environ["RANK"])
    return None


class ServingRank:
    """A rank that answers the leader's calls inside its own `pipe(...)`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._follower: Follower | None = None

    def prepare(self, modules: dict[str, torch.nn.Module]) -> None:
        """Connect the transport and take over the leader's weights, so that every rank has the same."""
        self._follower = Follower(self._link, modules)
        self._follower.greet()
        self._follower.serve()

    def serve(self) -> Any:
        if self._follower is None:
            raise CfgParallelError("This rank was not prepared.")
        return self._follower.serve()

    def close(self) -> None:
        self._link.close()


def connect(devices: list[torch.device], rank: int, timeout: float) -> list[RemoteFollower] | ServingRank:
    """On rank 0 its followers, on the others the side that serves. All ranks must be on one host."""
    global _rounds
    _rounds += 1
    store, world_size = _store()
    if world_size != len(devices):
        raise ConfigurationError(
            f"Expected as many processes as cfg_parallel_size={len(devices)}, but torchrun started {world_size}; use "
            f"torchrun --nproc-per-node={len(devices)}."
        )
    store = dist.PrefixStore(f"cfg_parallel/{_rounds}", store)
    if rank == 0:
        return _accept(store, devices, timeout)
    address, key = store.get(f"{rank}/address").decode(), bytes.fromhex(store.get(f"{rank}/key").decode())
    if not Path(address).exists():
        raise ConfigurationError("Rank 0 is on another host; cfg-parallel works on one host under torchrun so far.")
    return ServingRank(Link(Client(address, family="AF_UNIX", authkey=key), devices[rank]))


def _store() -> tuple[Any, int]:
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store(), dist.get_world_size()
    store, _, world_size = next(iter(dist.rendezvous("env://")))
    return store, world_size


def _accept(store: Any, devices: list[torch.device], timeout: float) -> list[RemoteFollower]:
    remotes = []
    with tempfile.TemporaryDirectory(prefix="cfg-parallel-") as folder:  # mode 0700
        for rank, device in enumerate(devices[1:], start=1):
            key = secrets.token_bytes(32)
            address = str(Path(folder, str(rank)))
            with Listener(address, family="AF_UNIX", authkey=key) as listener:
                store.set(f"{rank}/key", key.hex())
                store.set(f"{rank}/address", address)
                remotes.append(RemoteFollower(listener.accept(), devices[0], device, timeout))  # type: ignore[arg-type]
    return remotes
