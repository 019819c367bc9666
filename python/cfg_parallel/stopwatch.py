"""How long a generation took, how much of it was denoising, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Clock:
    """Points in time of a generation, in seconds, and its denoising steps."""

    start: float = 0.0
    begun: float = 0.0
    denoised: float = 0.0
    end: float = 0.0
    steps: int = 0


@contextmanager
def stopwatch(pipe: Any, device: str, on_step: Callable[[int, int], None] | None = None) -> Iterator[Clock]:
    """Times a generation without changing it. Denoising is from the progress bar's start to the first decoding by the
    VAE, where the latents are waited for: with cfg-parallel the last may still be on their way when the bar ends.

    `on_step(step, steps)` is called after each denoising step, and may end the generation by raising. The host is then
    at most two steps ahead of a GPU, so that the call says where the generation is, not how far it was launched."""
    import torch

    ahead: list[Any] = []

    def reached(step: int, steps: int) -> None:
        assert on_step is not None
        if device != "cpu":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            ahead.append(event)
            if len(ahead) > 1:
                ahead.pop(0).synchronize()
        on_step(step, steps)

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    clock = Clock()
    progress_bar = pipe.progress_bar
    vae: Any = getattr(pipe, "vae", None)
    decode: Any = getattr(vae, "decode", None)

    def timed_progress_bar(*args: Any, **kwargs: Any) -> Any:
        bar = progress_bar(*args, **kwargs)
        close = bar.close

        def timed_close() -> None:
            bar.close = close  # tqdm closes again when it is collected
            close()
            clock.steps += done
            clock.denoised = now()

        done = 0  # a bar that is not shown does not count
        update = bar.update

        def counted_update(n: int = 1) -> Any:
            nonlocal done
            done += n
            shown = update(n)
            if on_step is not None:
                reached(done, bar.total or done)
            return shown

        bar.close, bar.update = timed_close, counted_update
        if not clock.steps:
            clock.begun = now()
        return bar

    def timed_decode(latents: Any, *args: Any, **kwargs: Any) -> Any:
        if not decoding:
            decoding.append(True)
            latents.reshape(-1)[0].item()
            clock.denoised = now()
        return decode(latents, *args, **kwargs)

    decoding: list[bool] = []
    pipe.progress_bar = timed_progress_bar
    if decode is not None:
        vae.decode = timed_decode
    clock.start = clock.begun = now()
    try:
        yield clock
    finally:
        clock.end = now()
        del pipe.progress_bar
        if decode is not None:
            del vae.decode
