"""Places of a run that must not overlap: outputs are replaced whole, inputs and stores never."""

import os
from collections.abc import Iterator

from svdmerge.engine.plan import Plan
from svdmerge.errors import RecipeError
from svdmerge.recipe import Recipe, TuneConfig
from svdmerge.storage.filesystem import Folder

# What a store holds below its root.
STORE_FOLDERS = ("components", "commits", "runs", "rank", "releases", "scratch")


def check_places(plan: Plan) -> None:
    """Raise RecipeError if an output would replace, or lie inside, what the run needs."""
    merged, tuned = Folder.at(plan.recipe.out), list(_tuned(plan.recipe))
    inputs = list(_inputs(plan))
    for key, out in [("out", merged), *tuned]:
        for what, place in inputs:
            if _contains(out, place):
                raise RecipeError(
                    f"{key}: {out.uri} is, or holds, {what}",
                    "An output is replaced whole: it would be lost.",
                    f"Give another `{key}`.",
                )
        if any(_contains(plan.store.child(name), out) for name in STORE_FOLDERS):
            raise RecipeError(
                f"{key}: {out.uri} lies among the store's own folders", "", f"Give another `{key}`."
            )
    for key, out in tuned:
        if _contains(out, merged) or _contains(merged, out):
            raise RecipeError(
                f"{key}: {out.uri} and `out` lie in each other",
                "Each is replaced whole: the other would be lost.",
                f"Give another `{key}`.",
            )


def _inputs(plan: Plan) -> Iterator[tuple[str, Folder]]:
    yield "the store", plan.store
    yield "base_model", plan.base.folder
    for source in plan.sources:
        yield f"the source {source.reference}", source.checkpoint.folder
    for _, config in _targets(plan.recipe):
        yield "tune.train", Folder.at(config.train)
        yield "tune.test", Folder.at(config.test)


def _tuned(recipe: Recipe) -> Iterator[tuple[str, Folder]]:
    """Where tuned models go, by default too."""
    for name, config in _targets(recipe):
        from svdmerge.training.targets import default_out

        yield "tune.out", Folder.at(config.out or f"{default_out(recipe)}/{name}")


def _targets(recipe: Recipe) -> list[tuple[str, TuneConfig]]:
    """Every target's name, none for a single one, and its settings."""
    if recipe.tune is None:
        return []
    many = [(target.name, recipe.tune.of(target)) for target in recipe.tune.targets]
    return many or [("", recipe.tune)]


def _contains(outer: Folder, inner: Folder) -> bool:
    """Whether a folder is another, or holds it, however both are written."""
    (kind, above), (other, below) = _resolved(outer), _resolved(inner)
    return kind == other and (below == above or below.startswith(f"{above}/"))


def _resolved(folder: Folder) -> tuple[str, str]:
    if folder.is_local:
        return "file", os.path.realpath(folder.path())  # file:// and links lead to the same place
    return folder.uri.split("://", 1)[0], folder.path()
