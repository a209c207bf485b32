"""The model card: conventions of the Hub, and sources' words that stay words."""

import yaml
from hypothesis import given
from hypothesis import strategies as st

from svdmerge.report.card import escape, model_card


def card(**changes: object) -> str:
    fields: dict[str, object] = {
        "title": "merged", "base": "org/base", "sources": [("org/ft-a", 1.0, 12), ("b", 0.5, 3)],
        "recipe_yaml": "merge_method: axis\n", "summary": "An AXIS merge.",
    }  # fmt: skip
    return model_card(**(fields | changes))  # type: ignore[arg-type]


def test_the_front_matter_says_what_was_merged() -> None:
    front = yaml.safe_load(card().split("---")[1])
    assert front["base_model"] == ["org/base", "org/ft-a", "b"]
    assert front["base_model_relation"] == "merge"
    assert "svdmerge" in front["tags"]


def test_every_source_has_a_row_with_weight_and_components() -> None:
    assert "| org/ft-a | 1 | 12 |" in card()
    assert "| b | 0.5 | 3 |" in card()
    assert "```yaml\nmerge_method: axis\n```" in card()


def test_a_sources_name_is_never_markup() -> None:
    hostile = "<script>alert(1)</script> | x | [click](http://evil)\n# Title `code`"
    made = card(sources=[(hostile, 1.0, 1)], title=hostile)
    body = made.split("---", 2)[2]
    assert "<script>" not in body
    assert "[click](" not in body
    assert "\n# Title" not in body
    assert yaml.safe_load(made.split("---\n")[1])["base_model"][1] == hostile


def test_a_recipe_cannot_close_its_own_block() -> None:
    made = card(recipe_yaml="out: '```'\n")
    assert made.count("```") == 2


@given(st.text())
def test_escaped_text_has_no_bare_markup(text: str) -> None:
    made = escape(text)
    assert "\n" not in made
    plain = made.replace("\\\\", "")
    for mark in "`*_[]|<>#":
        assert all(plain[i - 1] == "\\" for i, c in enumerate(plain) if c == mark)
