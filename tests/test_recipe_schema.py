"""The recipe's JSON Schema: the file that is shipped, and what it accepts."""

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from test_readme import README
from typer.testing import CliRunner

from svdmerge.cli import app
from svdmerge.recipe_schema import recipe_schema

SHIPPED = (files("svdmerge") / "recipe.schema.json").read_text(encoding="utf-8")


def faults(recipe: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(recipe_schema()).iter_errors(recipe)]


def test_the_file_that_is_shipped_is_what_the_command_prints_and_the_recipe_says() -> None:
    printed = CliRunner().invoke(app, ["schema"]).stdout
    # After a change of the recipe: `svdmerge schema > svdmerge/recipe.schema.json`.
    assert printed == SHIPPED
    assert json.loads(printed) == recipe_schema()


def test_the_readmes_recipe_is_valid() -> None:
    import yaml

    Draft202012Validator.check_schema(recipe_schema())
    assert faults(yaml.safe_load(README.split("```yaml")[1].split("```")[0])) == []


@pytest.mark.parametrize(
    "change",
    [
        {"paramters": {}},
        {"parameters": {"k": "ten"}},
        {"parameters": {"salience": "size"}},
        {"models": []},
        {"resources": {"memory": "much"}},
        {"tune": {"epochs": 0}},
    ],
)
def test_what_is_wrong_is_seen(change: dict[str, Any]) -> None:
    recipe = {"base_model": "base", "models": ["a", {"model": "b", "quota": "50%"}]}
    assert faults(recipe) == []
    assert faults(recipe | change)


def test_every_key_is_explained() -> None:
    def keys(part: Any, at: str) -> Iterator[str]:
        for name, field in part.get("properties", {}).items():
            if "description" not in field:
                yield f"{at}.{name}"

    schema = recipe_schema()
    sections = {"recipe": schema} | schema["$defs"]
    assert [key for at, part in sections.items() for key in keys(part, at)] == []
