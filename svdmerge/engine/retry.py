"""What to do when a unit fails: a pure decision, tested without a cluster."""

from dataclasses import dataclass
from enum import StrEnum


class Failure(StrEnum):
    """Why a unit of work did not come back."""

    OUT_OF_MEMORY = "out of memory"
    LOST = "worker or node lost"
    RETRYABLE = "retryable error"
    FATAL = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Submit the unit again, after a pause, reserving this much memory."""

    memory_bytes: int
    pause_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Fail the run, naming the unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a unit is tried again, by kind of failure."""

    # Each step of the ladder doubles what the unit reserves: 8x the estimate, then it is a bug.
    out_of_memory: int = 3
    # Spot machines go; five losses of one unit point at the unit.
    lost: int = 5
    retryable: int = 5
    first_pause_s: float = 0.5

    def decide(
        self, failure: Failure, *, times: int, memory_bytes: int, memory_limit_bytes: int
    ) -> Retry | GiveUp:
        """The decision after the `times`-th failure of this kind (1 is the first)."""
        allowed = {
            Failure.OUT_OF_MEMORY: self.out_of_memory,
            Failure.LOST: self.lost,
            Failure.RETRYABLE: self.retryable,
        }.get(failure, 0)
        if times > allowed:
            return GiveUp()
        if failure is Failure.OUT_OF_MEMORY:
            if memory_bytes >= memory_limit_bytes:
                return GiveUp()
            return Retry(memory_bytes=min(2 * memory_bytes, memory_limit_bytes), pause_s=0.0)
        pause = self.first_pause_s * 2 ** (times - 1) if failure is Failure.RETRYABLE else 0.0
        return Retry(memory_bytes=memory_bytes, pause_s=pause)
