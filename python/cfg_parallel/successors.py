"""Followers that are being started in the place of lost ones: beside the generations, later and later, then no more."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from cfg_parallel.remote import RemoteFollower

MOST_TRIES = 5  # in a row, without a generation that went well
_FIRST_WAIT = 2.0  # seconds between the first try and the second; twice as long each time


class Successors:
    """By the place of the follower that was lost."""

    def __init__(self) -> None:
        self._starting: dict[int, RemoteFollower] = {}
        self._tries: Counter[int] = Counter()
        self._not_before: dict[int, float] = {}

    def get(self, place: int, start: Callable[[], RemoteFollower]) -> RemoteFollower | None:
        """The process that is coming up, by `start` if there is none; None when it is too early for the next try, or
        there were enough."""
        known = self._starting.get(place)
        if known is None and self._tries[place] < MOST_TRIES and time.monotonic() >= self._not_before.get(place, 0.0):
            self._tries[place] += 1
            self._not_before[place] = time.monotonic() + _FIRST_WAIT * 2 ** (self._tries[place] - 1)
            known = self._starting[place] = start()
        return known

    def take(self, place: int) -> RemoteFollower:
        """The process, which is up and has all it needs."""
        return self._starting.pop(place)

    def failed(self, place: int) -> str:
        """A process did not come up; what happens next."""
        self._end(place)
        return self.next_try()

    def drop(self, place: int) -> None:
        """Somebody did not want to wait for it: that was no try."""
        self._end(place)
        self.worked(place)

    def _end(self, place: int) -> None:
        fresh = self._starting.pop(place, None)
        if fresh is not None:
            fresh.lost = fresh.lost or "it did not come up"
            fresh.close()

    def next_try(self) -> str:
        """When the next one is started."""
        if max(self._tries.values(), default=0) >= MOST_TRIES:
            return f"After {MOST_TRIES} tries no further one is started: call disable_cfg_parallel and enable it again."
        wait = max(0.0, max(self._not_before.values(), default=0.0) - time.monotonic())
        return f"The next one is started in {wait:.0f} s at the earliest."

    @property
    def gave_up(self) -> bool:
        """Whether some place stays empty."""
        return any(tries >= MOST_TRIES and place not in self._starting for place, tries in self._tries.items())

    def worked(self, place: int) -> None:
        """A generation went well with the follower at `place`."""
        self._tries.pop(place, None)
        self._not_before.pop(place, None)

    def close(self) -> None:
        while self._starting:
            self._starting.popitem()[1].close()
