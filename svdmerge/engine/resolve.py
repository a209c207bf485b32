"""A recipe's patterns and queries as the models that they stand for now."""

import re
from collections.abc import Iterator
from pathlib import Path

from svdmerge.errors import RecipeError
from svdmerge.recipe import HubQuery, Recipe, SourceModel
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.model_ref import is_hub_id, listed_on_hub

_MAGIC = re.compile(r"[*?\[]")


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with every model by name.

    What is named, or found before, is not taken once more: a model keeps its own `weight`. The base
    is no source of itself.

    Raises:
        RecipeError: a pattern or query matches nothing, which is what a store that is not mounted
            looks like too.
    """
    if not any(m.hub or _is_pattern(m.model) for m in recipe.models):
        return recipe
    names = [recipe.base_model, *(m.model for m in recipe.models if not _is_many(m))]
    taken = {*names, *(Folder.at(name).uri for name in names)}
    models: list[SourceModel] = []
    for model in recipe.models:
        if not _is_many(model):
            models.append(model)
            continue
        found = list(_found(model, recipe))
        if not found:
            raise RecipeError(
                f"models: {_told(model)} matches nothing",
                "Folders and .safetensors files would, or models that the hub lists.",
                "Correct it, or wait until there is one.",
            )
        for reference in found:
            if not {reference, reference.removeprefix("hf://")} & taken:
                taken.add(reference)
                models.append(model.model_copy(update={"model": reference, "hub": None}))
    if not models:
        raise RecipeError("models: nothing but the base matches", "", "Correct the patterns.")
    return recipe.model_copy(update={"models": tuple(models)})


def _is_many(model: SourceModel) -> bool:
    return model.hub is not None or _is_pattern(model.model)


def _is_pattern(text: str) -> bool:
    """Whether it has a sign of patterns and is no path as it stands."""
    return bool(_MAGIC.search(text)) and ("://" in text or not Path(text).expanduser().exists())


def _told(model: SourceModel) -> str:
    return model.model or f"the hub's list of {model.hub}"


def _found(model: SourceModel, recipe: Recipe) -> Iterator[str]:
    if model.hub is not None:
        yield from _on_hub(model.hub, recipe)
        return
    if model.model.startswith("hf://"):
        raise RecipeError(
            f"models: {model.model}: the hub takes no patterns", "", "Use `hub: {author: ...}`."
        )
    Folder.at(model.model)  # refused whole: the query of an address looks like a pattern
    parts = model.model.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    root = Folder.at("/".join(parts[:first]) or ("/" if first else "."))
    for name, is_folder in root.glob("/".join(parts[first:])).items():
        if is_folder or name.endswith(".safetensors"):
            yield root.child(name).uri


def _on_hub(query: HubQuery, recipe: Recipe) -> list[str]:
    base = (query.base or recipe.base_model).removeprefix("hf://").partition("@")[0]
    if query.base is None and not is_hub_id(base):
        raise RecipeError(
            f"models.hub: {recipe.base_model} is no model of the hub", "", "Name it: `base: org/x`."
        )
    return listed_on_hub(base, relation=query.relation, author=query.author, tags=query.tags)
