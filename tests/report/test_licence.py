"""A merge claims the most restrictive licence of its models, and none that is not established."""

import pytest

from svdmerge.report.licence import combined


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["mit", "mit"], "mit"),
        (["mit", "apache-2.0"], "apache-2.0"),
        (["apache-2.0", "cc-by-4.0", "mit"], "cc-by-4.0"),
        (["mit", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["apache-2.0", "llama3.1", "llama3.1"], "llama3.1"),
        (["gpl-3.0", "cc-by-nc-4.0"], "unknown"),
        (["llama3.1", "gemma", "mit"], "unknown"),
        (["mit", None], "unknown"),
        (["", "mit"], "unknown"),
        (["other", "mit"], "other"),
    ],
)
def test_the_most_restrictive_licence_holds(licences: list[str | None], expected: str) -> None:
    named = {f"model-{i}": licence for i, licence in enumerate(licences)}
    assert combined(named)[0] == expected


def test_the_model_without_a_licence_is_named() -> None:
    licence, why = combined({"base": "mit", "b": None, "a": None})
    assert licence == "unknown"
    assert why == "a and 1 more states no licence"
