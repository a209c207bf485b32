"""What happens to a failed unit: decisions alone, no cluster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdmerge.engine.retry import Failure, GiveUp, Retry, RetryPolicy

GIB = 1 << 30


def decide(failure: Failure, times: int, memory: int = GIB, limit: int = 64 * GIB) -> object:
    return RetryPolicy().decide(failure, times=times, memory_bytes=memory, memory_limit_bytes=limit)


def test_an_error_that_no_second_try_cures_is_told_at_once() -> None:
    assert decide(Failure.FATAL, 1) == GiveUp()


def test_out_of_memory_doubles_the_reservation_three_times() -> None:
    memory = GIB
    for times in (1, 2, 3):
        decision = decide(Failure.OUT_OF_MEMORY, times, memory)
        assert decision == Retry(memory_bytes=2 * memory, pause_s=0.0)
        memory *= 2
    assert decide(Failure.OUT_OF_MEMORY, 4, memory) == GiveUp()


def test_the_memory_ladder_ends_at_the_largest_machine() -> None:
    assert decide(Failure.OUT_OF_MEMORY, 1, 3 * GIB, 4 * GIB) == Retry(
        memory_bytes=4 * GIB, pause_s=0.0
    )
    assert decide(Failure.OUT_OF_MEMORY, 2, 4 * GIB, 4 * GIB) == GiveUp()


def test_a_lost_worker_is_replaced_at_once_and_with_the_same_memory() -> None:
    for times in range(1, 6):
        assert decide(Failure.LOST, times) == Retry(memory_bytes=GIB, pause_s=0.0)
    assert decide(Failure.LOST, 6) == GiveUp()


def test_retryable_errors_wait_twice_as_long_each_time() -> None:
    pauses = []
    for times in range(1, 6):
        decision = decide(Failure.RETRYABLE, times)
        assert isinstance(decision, Retry)
        pauses.append(decision.pause_s)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert decide(Failure.RETRYABLE, 6) == GiveUp()


@given(
    failure=st.sampled_from(list(Failure)),
    times=st.integers(1, 50),
    memory=st.integers(1, 100 * GIB),
    limit=st.integers(1, 100 * GIB),
)
def test_every_unit_is_given_up_in_the_end_and_never_asks_for_more_than_there_is(
    failure: Failure, times: int, memory: int, limit: int
) -> None:
    decision = decide(failure, times, min(memory, limit), limit)
    if times > 5:
        assert decision == GiveUp()
    if isinstance(decision, Retry):
        assert decision.memory_bytes <= limit
        assert decision.pause_s >= 0


def test_a_policy_may_try_less_often() -> None:
    policy = RetryPolicy(retryable=0, lost=1)
    again = policy.decide(Failure.LOST, times=1, memory_bytes=1, memory_limit_bytes=1)
    assert isinstance(again, Retry)
    for failure in (Failure.RETRYABLE, Failure.FATAL):
        end = policy.decide(failure, times=1, memory_bytes=1, memory_limit_bytes=1)
        assert end == GiveUp()


@pytest.mark.parametrize("failure", list(Failure))
def test_a_failure_says_what_it_was(failure: Failure) -> None:
    assert str(failure) == failure.value
    assert failure.value
