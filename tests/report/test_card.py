"""The model card: conventions of the Hub, and sources' words that stay words."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from svdmerge.report.card import CardSource, escape, illustrated, licence_in, model_card


def source(name: str, **changes: object) -> CardSource:
    fields: dict[str, object] = {
        "name": name, "revision": "abcdef0123456789", "weight": 1.0, "kept": 12, "licence": "mit",
    }  # fmt: skip
    return CardSource(**(fields | changes))  # type: ignore[arg-type]


def card(**changes: object) -> str:
    fields: dict[str, object] = {
        "title": "merged", "base": "org/base", "base_licence": "mit",
        "sources": [source("org/ft-a"), source("b", weight=0.5, kept=3, licence="apache-2.0")],
        "recipe_yaml": "merge_method: axis\n", "summary": "An AXIS merge.",
    }  # fmt: skip
    return model_card(**(fields | changes))  # type: ignore[arg-type]


def test_the_front_matter_says_what_was_merged() -> None:
    front = yaml.safe_load(card().split("---")[1])
    assert front["base_model"] == ["org/base", "org/ft-a", "b"]
    assert front["base_model_relation"] == "merge"
    assert "svdmerge" in front["tags"]


def test_every_source_has_a_row_with_weight_and_components() -> None:
    assert "| org/ft-a | abcdef012345 | mit | 1 | 12 |" in card()
    assert "| b | abcdef012345 | apache-2.0 | 0.5 | 3 |" in card()
    assert "```yaml\nmerge_method: axis\n```" in card()


def test_a_sources_name_is_never_markup() -> None:
    hostile = "<script>alert(1)</script> | x | [click](http://evil)\n# Title `code`"
    made = card(sources=[source(hostile, licence=hostile)], title=hostile)
    body = made.split("---", 2)[2]
    assert "<script>" not in body
    assert "[click](" not in body
    assert "\n# Title" not in body
    assert yaml.safe_load(made.split("---\n")[1])["base_model"][1] == hostile


def test_a_recipe_cannot_close_its_own_block() -> None:
    made = card(recipe_yaml="out: '```'\n")
    assert made.count("```") == 2


def test_the_licence_is_that_of_the_models_together() -> None:
    front = yaml.safe_load(card().split("---")[1])
    assert front["license"] == "apache-2.0"
    unknown = yaml.safe_load(card(base_licence=None).split("---")[1])
    assert (unknown["license"], unknown["license_name"]) == ("other", "unknown")
    assert "org/base states no licence" in card(base_licence=None)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: MIT\n---\n# x", "mit"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\n[1, 2\n---\n", None),
        ("---\n- a\n---\n", None),
        ("# no front matter\nlicense: mit", None),
        ("", None),
    ],
)
def test_a_models_own_card_states_its_licence(text: str, licence: str | None) -> None:
    assert licence_in(text) == licence


def test_a_card_of_ours_states_its_licence_too() -> None:
    assert licence_in(card()) == "apache-2.0"


@given(st.text())
def test_escaped_text_has_no_bare_markup(text: str) -> None:
    made = escape(text)
    assert "\n" not in made
    plain = made.replace("\\\\", "")
    for mark in "`*_[]|<>#":
        assert all(plain[i - 1] == "\\" for i, c in enumerate(plain) if c == mark)


def test_pictures_stand_before_the_recipe_and_replace_those_that_were_there() -> None:
    plain = card()
    first = illustrated(plain, pictures={"figures/a.png": ("a", "<script>alert(1)</script>")})
    assert "![a](figures/a.png)\n\n\\<script\\>" in first
    assert first.index("figures/a.png") < first.index("## Recipe")
    second = illustrated(first, pictures={"figures/b.png": ("b", "b")})
    assert "figures/a.png" not in second
    assert illustrated(second, pictures={}) == plain
