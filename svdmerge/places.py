"""Places of a run that must not overlap: outputs are replaced whole, inputs and stores never."""

from collections.abc import Iterator

from svdmerge.engine.plan import Plan
from svdmerge.errors import RecipeError
from svdmerge.storage.filesystem import Folder

# What a store holds below its root.
STORE_FOLDERS = ("components", "commits", "runs", "rank", "releases")


def check_places(plan: Plan) -> None:
    """Raise RecipeError if an output would replace, or lie inside, what the run needs."""
    inputs = list(_inputs(plan))
    for key, out in _outputs(plan):
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


def _outputs(plan: Plan) -> Iterator[tuple[str, Folder]]:
    yield "out", Folder.at(plan.recipe.out)
    if plan.recipe.tune is not None and plan.recipe.tune.out is not None:
        yield "tune.out", Folder.at(plan.recipe.tune.out)


def _inputs(plan: Plan) -> Iterator[tuple[str, Folder]]:
    yield "the store", plan.store
    yield "base_model", plan.base.folder
    for source in plan.sources:
        yield f"the source {source.reference}", source.checkpoint.folder
    if (tune := plan.recipe.tune) is not None:
        yield from ((f"tune.{k}", Folder.at(v)) for k, v in _examples(tune.train, tune.test))
        if tune.out is not None and _contains(Folder.at(tune.out), Folder.at(plan.recipe.out)):
            raise RecipeError(
                f"tune.out: {tune.out} is, or holds, `out`",
                "The merged model would be lost.",
                "Give another `tune.out`.",
            )


def _examples(train: str, test: str) -> Iterator[tuple[str, str]]:
    if train:
        yield "train", train
    if test:
        yield "test", test


def _contains(outer: Folder, inner: Folder) -> bool:
    return inner.uri == outer.uri or inner.uri.startswith(f"{outer.uri}/")
