"""`cfg-parallel serve`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from cfg_parallel.errors import ConfigurationError
from cfg_parallel.serving.app import Server
from cfg_parallel.serving.observability import set_up_logs, tell
from cfg_parallel.serving.settings import Settings

_PATIENCE = 10.0  # seconds for answers, once nothing runs
_LOCAL = frozenset(["127.0.0.1", "::1"])


class _Uvicorn(uvicorn.Server):
    """Ends with what runs, and refuses what waits."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._of = server

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's own, which raises the signal again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stop(self, number: signal.Signals) -> None:
        tell("stopping", signal=number.name, running=self._of.dispatcher.running)
        self._of.dispatcher.stop()
        self.handle_exit(number, None)
        self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        """A client that does not take its answer, or does not end its request, keeps the server for a while only."""
        while self._of.dispatcher.running:
            await asyncio.sleep(0.1)
        await asyncio.sleep(_PATIENCE)
        self.force_exit = True


def serve(settings: Settings, bound: socket.socket) -> int:
    """Until SIGTERM or SIGINT; then what runs is finished. Raises ConfigurationError for a model that does not load."""
    set_up_logs()
    host = bound.getsockname()[0]
    if host not in _LOCAL and settings.api_key is None:
        tell("everybody who reaches this host may use the server; --api-key keeps others out", "warning", host=host)
    return asyncio.run(_serve(settings, bound))


async def _serve(settings: Settings, bound: socket.socket) -> int:
    server = Server(settings)
    config = uvicorn.Config(server.app, log_config=None, access_log=False)
    running = _Uvicorn(config, server)
    task = asyncio.create_task(running.serve(sockets=[bound]))
    while not (running.started or task.done()):
        await asyncio.sleep(0.02)
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    tell("listening", address=address, model=settings.name, devices=list(settings.devices))
    try:
        loading: asyncio.Future[Any] = asyncio.gather(*(replica.loaded() for replica in server.replicas))
        await asyncio.wait([loading, task], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
        else:
            loading.result()  # raises what the first that failed has raised
        if not task.done():
            print(f"cfg-parallel: {settings.name} is ready at {address}", flush=True)
        await task
    finally:
        running.should_exit = True
        await task
        await server.dispatcher.close()  # which uvicorn leaves out when it does not wait for clients
    return 0


def bind(host: str, port: int) -> socket.socket:
    """Before anything is loaded. Raises ConfigurationError where somebody else listens already."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --host or --port."
        ) from error
    return bound
