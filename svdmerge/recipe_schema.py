"""The recipe's JSON Schema: what editors check and complete a recipe by."""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from svdmerge.recipe import Recipe


class _Untitled(GenerateJsonSchema):
    """Without a title for each field, which would be its name once more."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def recipe_schema() -> dict[str, Any]:
    """The schema, as `recipe.schema.json` beside this file holds it.

    It says what may be written; what must fit together is checked when a recipe is loaded.
    """
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **Recipe.model_json_schema(schema_generator=_Untitled),
        "title": "svdmerge recipe",
    }
