"""The recipe: what to merge, how, and where to; validated whole before anything starts."""

from svdmerge.recipe.merge import (
    HELD_OUT,
    HubQuery,
    Parameters,
    Recipe,
    SourceModel,
    load_recipe,
    parse_recipe,
)
from svdmerge.recipe.release import GateConfig
from svdmerge.recipe.sections import Section, load_mapping, parse_section
from svdmerge.recipe.tune import Target, TuneConfig
from svdmerge.recipe.values import Share, parse_bytes, parse_rows, parse_share

__all__ = [
    "HELD_OUT",
    "GateConfig",
    "HubQuery",
    "Parameters",
    "Recipe",
    "Section",
    "Share",
    "SourceModel",
    "Target",
    "TuneConfig",
    "load_mapping",
    "load_recipe",
    "parse_bytes",
    "parse_recipe",
    "parse_rows",
    "parse_section",
    "parse_share",
]
