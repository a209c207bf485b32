"""The gate's verdict from two measures."""

import math

import pytest

from svdmerge.gate import CANDIDATE, CURRENT, compare


@pytest.mark.parametrize(
    ("merit", "before", "holds"),
    [
        (0.9, None, True),
        (0.9, 0.9, True),
        (0.895, 0.9, True),
        (0.88, 0.9, False),
        (-2.005, -2.0, True),
        (-2.5, -2.0, False),
        (math.nan, None, False),
        (math.nan, 0.9, False),
        (-math.inf, -2.0, False),
        (0.1, math.nan, True),
    ],
)
def test_at_most_the_margin_worse_is_allowed(
    merit: float, before: float | None, holds: bool
) -> None:
    measures = {CANDIDATE: merit} | ({} if before is None else {CURRENT: before})
    verdict = compare(measures, margin=0.01)
    assert verdict.holds is holds
    assert verdict.measures == measures
    assert str(round(merit, 4)) in verdict.why
