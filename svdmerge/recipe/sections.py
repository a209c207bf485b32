"""Sections of YAML files, validated: every fault is told, with the nearest known key."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
)

from svdmerge.errors import RecipeError


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def load_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: RecipeError, if it cannot be read or is none."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or str(error)
        raise RecipeError(f"{path}: cannot be read ({why})", "", "Check the path.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML", str(error), "Correct the file.") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: holds {type(raw).__name__}", "A recipe is a mapping of keys.")
    return cast(dict[str, Any], raw)


AnySection = TypeVar("AnySection", bound=Section)


def parse_section(
    kind: type[AnySection],
    raw: dict[str, Any],
    *,
    origin: str,
    sections: Mapping[str, type[Section]],
) -> AnySection:
    """A mapping validated; `sections` tells which keys are known below each of its own.

    Raises:
        RecipeError: every fault is named, unknown keys with the nearest known one.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults = [explain(fault, kind, sections) for fault in error.errors()]
        raise RecipeError(f"{origin}: {faults[0]}", *["; ".join(faults[1:])]) from None


def explain(fault: Any, kind: type[Section], sections: Mapping[str, type[Section]]) -> str:
    """A fault of validation as a person is told it."""
    place = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("function-"))
    if fault["type"] != "extra_forbidden":
        text = fault["msg"].removeprefix("Value error, ")
        return f"{place}: {text}" if place else text
    loc, key = fault["loc"][:-1], str(fault["loc"][-1])
    named = [sections[str(part)] for part in loc if str(part) in sections]
    section = list((named[-1] if named else kind).model_fields)
    near = difflib.get_close_matches(key, section, n=1)
    known = f"the nearest is `{near[0]}`" if near else f"known keys: {', '.join(sorted(section))}"
    return f"{place}: unknown key; {known}"
