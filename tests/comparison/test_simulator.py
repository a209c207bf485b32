"""The simulator against closed forms."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdmerge.comparison.simulator import Machines, UnitCost, simulate

TOLERANCE = 1e-9
seconds = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=40)


def costs(*seconds: float, read_bytes: float = 0.0) -> list[UnitCost]:
    return [UnitCost(seconds=s, read_bytes=read_bytes) for s in seconds]


@given(seconds)
def test_one_worker_takes_the_sum(times: list[float]) -> None:
    found = simulate(costs(*times), Machines(num_workers=1))
    assert found.seconds == pytest.approx(sum(times), rel=TOLERANCE)
    assert found.busy_s == pytest.approx(sum(times), rel=TOLERANCE)
    assert (found.num_lost, found.lost_s) == (0, 0.0)


@given(seconds, st.integers(1, 8))
def test_many_workers_take_what_lists_allow(times: list[float], workers: int) -> None:
    """Graham's bounds of list scheduling (1966): at least the mean load and the largest unit, at
    most (2 - 1/workers) times the best."""
    found = simulate(costs(*times), Machines(num_workers=workers)).seconds
    floor = max(sum(times) / workers, max(times))
    assert floor * (1 - TOLERANCE) <= found
    assert found <= (sum(times) / workers + (1 - 1 / workers) * max(times)) * (1 + TOLERANCE)


@pytest.mark.parametrize("workers", [1, 3, 7])
def test_equal_units_take_whole_rounds(workers: int) -> None:
    found = simulate(costs(*[2.0] * 10), Machines(num_workers=workers))
    assert found.seconds == pytest.approx(2.0 * math.ceil(10 / workers))


def test_a_slow_driver_hands_out_one_unit_after_another() -> None:
    machines = Machines(num_workers=100, driver_s=0.5)
    assert simulate(costs(*[0.1] * 20), machines).seconds == pytest.approx(20 * 0.5 + 0.1)


def test_a_fast_driver_is_hidden_behind_the_units() -> None:
    machines = Machines(num_workers=2, driver_s=0.1)
    # The second worker starts 0.2 s in; each has ten units.
    assert simulate(costs(*[1.0] * 20), machines).seconds == pytest.approx(0.2 + 10.0)


def test_readers_share_the_store() -> None:
    """Four readers of 100 bytes at 40 bytes/s in all: 10 s, then 1 s of work each."""
    machines = Machines(num_workers=4, store_bytes_per_s=40.0)
    found = simulate(costs(*[1.0] * 4, read_bytes=100.0), machines)
    assert found.seconds == pytest.approx(11.0)
    assert found.busy_s == pytest.approx(44.0)


def test_a_worker_reads_no_faster_than_it_can() -> None:
    machines = Machines(num_workers=4, store_bytes_per_s=1000.0, worker_bytes_per_s=10.0)
    assert simulate(costs(1.0, 1.0, read_bytes=100.0), machines).seconds == pytest.approx(11.0)


def test_who_leaves_makes_room_for_who_reads_on() -> None:
    """30 and 90 bytes at 30 bytes/s: together until 2 s, then 60 bytes alone."""
    units = [UnitCost(seconds=0.0, read_bytes=b) for b in (30.0, 90.0)]
    found = simulate(units, Machines(num_workers=2, store_bytes_per_s=30.0))
    assert found.seconds == pytest.approx(4.0)
    assert found.busy_s == pytest.approx(2.0 + 4.0)


def test_equal_units_at_a_saturated_store_go_in_rounds() -> None:
    """Ten rounds of fifty: 500 bytes at 100 bytes/s, then half a second of work."""
    machines = Machines(num_workers=50, store_bytes_per_s=100.0)
    found = simulate(costs(*[0.5] * 500, read_bytes=10.0), machines)
    assert found.seconds == pytest.approx(10 * (5.0 + 0.5))


def test_stragglers_take_as_many_times_as_long() -> None:
    machines = Machines(num_workers=1, straggler_share=1.0, straggler_factor=3.0)
    assert simulate(costs(1.0, 2.0), machines).seconds == pytest.approx(9.0)
    some = Machines(num_workers=1, straggler_share=0.1, straggler_factor=5.0)
    found = simulate(costs(*[1.0] * 4000), some).seconds
    assert found == pytest.approx(4000 * (0.9 + 0.1 * 5), rel=0.03)


def test_lost_workers_cost_what_theory_says() -> None:
    """A unit of t seconds with exponential lives of mean m, done again from the start whenever its
    worker is lost, takes (m + r)(exp(t / m) - 1) on average, r to come back (Daly, 2006)."""
    t, mean, back = 1.0, 2.0, 0.5
    machines = Machines(num_workers=1, mean_life_s=mean, recovery_s=back)
    # One worker: each unit is tried at once again, after what waits.
    found = [simulate(costs(*[t] * 50), machines, seed=seed) for seed in range(60)]
    expected = 50 * (mean + back) * (math.exp(t / mean) - 1)
    assert statistics.mean(f.seconds for f in found) == pytest.approx(expected, rel=0.03)
    assert all(f.busy_s == pytest.approx(f.lost_s + 50 * t) for f in found)
    assert all(f.num_lost > 0 for f in found)


def test_the_same_seed_gives_the_same_outcome() -> None:
    machines = Machines(
        num_workers=5, mean_life_s=3.0, recovery_s=1.0, straggler_share=0.2, straggler_factor=4.0,
        store_bytes_per_s=50.0, driver_s=0.01,
    )  # fmt: skip
    units = costs(*[0.5] * 60, read_bytes=5.0)
    assert simulate(units, machines, seed=3) == simulate(units, machines, seed=3)


def test_no_units_take_no_time() -> None:
    assert simulate([], Machines(num_workers=2)).seconds == 0.0
