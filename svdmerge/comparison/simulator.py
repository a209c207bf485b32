"""Wall time of units over a cluster, by a discrete-event simulation: a driver that hands them out
one by one, workers, a store whose bandwidth they share, slow units, and workers that are lost."""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """What one unit takes: bytes from the store first, then seconds of one worker."""

    seconds: float
    read_bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Where units run. Infinite rates and no failures unless told."""

    num_workers: int
    driver_s: float = 0.0
    """Of the driver for each unit: to hand it out and to take its result."""
    store_bytes_per_s: float = math.inf
    """Of the store, shared equally by all that read."""
    worker_bytes_per_s: float = math.inf
    """The most that one worker reads."""
    straggler_share: float = 0.0
    """Of units that take longer."""
    straggler_factor: float = 1.0
    """How many times as long they compute."""
    mean_life_s: float = math.inf
    """Of a worker; lives are exponential. What it was doing is lost and done again."""
    recovery_s: float = 0.0
    """Until a lost worker is replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a simulation gave."""

    seconds: float
    """From the first unit handed out to the last one done."""
    busy_s: float
    """Of all workers together, what was lost included."""
    lost_s: float
    """Of these, in units that were lost with their worker."""
    num_lost: int


def simulate(units: Sequence[UnitCost], machines: Machines, *, seed: int = 0) -> Outcome:
    """What the units take on the machines, handed out in their order."""
    return _Simulation(units, machines, seed).run()


class _Simulation:
    """Events in the order of time: a unit is handed out, read, computed or lost; a worker is back.

    All that read share the store equally, so `_read` counts the bytes that a reader present since
    the start would have by now, and a unit is read when that count reaches what it stood at when
    the unit began plus its bytes: one queue in that order serves any number of readers.
    """

    def __init__(self, units: Sequence[UnitCost], machines: Machines, seed: int) -> None:
        self._machines, self._random = machines, random.Random(seed)
        slow = self._random.random
        self._costs = [
            UnitCost(
                read_bytes=u.read_bytes,
                seconds=u.seconds
                * (machines.straggler_factor if slow() < machines.straggler_share else 1.0),
            )
            for u in units
        ]
        self._now = self._read = 0.0
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, str, int]] = []
        self._reading: list[tuple[float, int]] = []
        self._running: dict[int, tuple[int, float]] = {}
        """By attempt: its unit, and when it began."""
        self._to_hand_out = deque(range(len(units)))
        self._handed_out = deque[int]()
        self._idle = machines.num_workers
        self._driver_is_free = True
        self._done = self._num_lost = 0
        self._busy_s = self._lost_s = 0.0

    def run(self) -> Outcome:
        """The outcome, once every unit is done."""
        while self._done < len(self._costs):
            self._hand_out()
            self._begin()
            self._advance()
        return Outcome(
            seconds=self._now, busy_s=self._busy_s, lost_s=self._lost_s, num_lost=self._num_lost
        )

    def _hand_out(self) -> None:
        # As the driver's window: so many units wait at workers that none idles for a round trip.
        waiting = len(self._handed_out) + len(self._running)
        if self._driver_is_free and self._to_hand_out and waiting < 2 * self._machines.num_workers:
            self._driver_is_free = False
            self._at(self._machines.driver_s, "handed out", self._to_hand_out.popleft())

    def _begin(self) -> None:
        while self._idle and self._handed_out:
            self._idle -= 1
            unit, attempt = self._handed_out.popleft(), next(self._numbers)
            self._running[attempt] = unit, self._now
            # Lives are exponential: what is left of one does not depend on how long it has been.
            if math.isfinite(self._machines.mean_life_s):
                life = self._random.expovariate(1.0 / self._machines.mean_life_s)
                self._at(life, "lost", attempt)
            if math.isinf(self._rate(1)) or not self._costs[unit].read_bytes:
                self._at(self._costs[unit].seconds, "computed", attempt)
            else:
                end = self._read + self._costs[unit].read_bytes
                heapq.heappush(self._reading, (end, attempt))

    def _rate(self, num_readers: int) -> float:
        return min(
            self._machines.worker_bytes_per_s, self._machines.store_bytes_per_s / num_readers
        )

    def _advance(self) -> None:
        """To the next event, and what it does."""
        read_at, rate = math.inf, 0.0
        if self._reading:
            rate = self._rate(len(self._reading))
            read_at = self._now + max(0.0, self._reading[0][0] - self._read) / rate
        if not self._events or read_at <= self._events[0][0]:
            self._read, attempt = heapq.heappop(self._reading)
            self._now = read_at
            self._at(self._costs[self._running[attempt][0]].seconds, "computed", attempt)
            return
        at, _, what, subject = heapq.heappop(self._events)
        self._read += (at - self._now) * rate
        self._now = at
        self._happen(what, subject)

    def _happen(self, what: str, subject: int) -> None:
        if what == "handed out":
            self._driver_is_free = True
            self._handed_out.append(subject)
        elif what == "back":
            self._idle += 1
        elif subject in self._running:  # else it was done before its worker was lost
            unit, since = self._running.pop(subject)
            self._busy_s += self._now - since
            if what == "computed":
                self._done += 1
                self._idle += 1
                return
            self._num_lost += 1
            self._lost_s += self._now - since
            self._reading = [r for r in self._reading if r[1] != subject]
            heapq.heapify(self._reading)
            self._to_hand_out.append(unit)
            self._at(self._machines.recovery_s, "back", subject)

    def _at(self, in_s: float, what: str, subject: int) -> None:
        heapq.heappush(self._events, (self._now + in_s, next(self._numbers), what, subject))
