"""Under torchrun the ranks play leader and follower: no process is started, they find each other by the store."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cfg_parallel.errors import CfgParallelError, ConfigurationError
from cfg_parallel.follower import Follower
from cfg_parallel.link import Link
from cfg_parallel.remote import RemoteFollower
from cfg_parallel.replica import is_parallel

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


@dataclass(frozen=True, slots=True)
class Role:
    """Of a rank. With context or tensor parallelism `members` ranks share each forward: each of them has followers of
    its own, in the ranks after those, as in a device mesh whose first dimension is guidance."""

    place: int  # 0 leads
    member: int
    members: int

    def rank_of(self, place: int) -> int:
        return self.member + self.members * place


def role(size: int, modules: Iterable[torch.nn.Module]) -> Role | None:
    """None outside of torchrun. `size` is cfg_parallel_size."""
    own = rank()
    if own is None:
        return None
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    members = max(1, world_size // size)
    if world_size != size * members or (members > 1 and not any(map(is_parallel, modules))):
        raise ConfigurationError(
            f"Expected as many processes as cfg_parallel_size={size}, but torchrun started {world_size}; use "
            f"torchrun --nproc-per-node={size}, or a multiple of it with enable_parallelism on the denoiser first."
        )
    return Role(own // members, own % members, members)


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


def connect(devices: list[torch.device], role: Role, timeout: float) -> list[RemoteFollower] | ServingRank:
    """On a rank that leads its followers, on the others the side that serves. All ranks must be on one host."""
    global _rounds
    _rounds += 1
    store = dist.PrefixStore(f"cfg_parallel/{_rounds}/{role.member}", _store())
    place = role.place
    if place == 0:
        return _accept(store, devices, timeout)
    address, key = store.get(f"{place}/address").decode(), bytes.fromhex(store.get(f"{place}/key").decode())
    if not Path(address).exists():
        raise ConfigurationError("Rank 0 is on another host; cfg-parallel works on one host under torchrun so far.")
    return ServingRank(Link(Client(address, family="AF_UNIX", authkey=key), devices[place]))


def _store() -> Any:
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    store, _, _ = next(iter(dist.rendezvous("env://")))
    return store


def _accept(store: Any, devices: list[torch.device], timeout: float) -> list[RemoteFollower]:
    remotes = []
    with tempfile.TemporaryDirectory(prefix="cfg-parallel-") as folder:  # mode 0700
        for place, device in enumerate(devices[1:], start=1):
            key = secrets.token_bytes(32)
            address = str(Path(folder, str(place)))
            with Listener(address, family="AF_UNIX", authkey=key) as listener:
                store.set(f"{place}/key", key.hex())
                store.set(f"{place}/address", address)
                remotes.append(RemoteFollower(listener.accept(), devices[0], device, timeout))  # type: ignore[arg-type]
    return remotes
