"""The work of each `svdmerge kind` command: configuration in, result out."""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence

from torch import Tensor

from svdmerge.engine.runtime import open_runtime
from svdmerge.errors import RecipeError
from svdmerge.kind import folder
from svdmerge.kind import recombine as recombining
from svdmerge.kind import split as splitting
from svdmerge.kind import train as training
from svdmerge.kind.diffusion import DiffusionResult, diffusion_of, train_diffusion
from svdmerge.kind.recipe import Drawing, KindRecipe, Pace, Recombine
from svdmerge.kind.recombine import Parts, RecombineResult
from svdmerge.kind.split import SplitResult
from svdmerge.kind.train import Learngenes, TrainResult
from svdmerge.progress import SILENT, Progress
from svdmerge.storage.filesystem import Folder


def train(recipe: KindRecipe, *, address: str, progress: Progress = SILENT) -> TrainResult:
    """Train the model of the `train` section into `model`. Raises: as `kind.train.train`."""
    if recipe.train is None:
        raise _lacks("train", "base_model, train, test and groups")
    out, store = Folder.at(recipe.model), Folder.at(recipe.store)
    folder.check_free(out)
    with _steps(recipe.train, progress, "train") as on_step, open_runtime(address):
        return training.train(
            recipe.train, out=out, store=store, use_ray=address != "none", on_step=on_step
        )


def draw(
    recipe: KindRecipe, config: Drawing, *, address: str, progress: Progress = SILENT
) -> DiffusionResult:
    """Train the model of a `draw` section into `model`. Raises: as `train_diffusion`."""
    out, store = Folder.at(recipe.model), Folder.at(recipe.store)
    folder.check_free(out)
    learngenes = None
    if config.learngenes_of is not None:
        place = Folder.at(config.learngenes_of)
        if place == out:
            raise RecipeError(
                f"draw.learngenes_of: {out.uri} is `model`",
                "It would be replaced by what is made of it.",
                "Give another `model`.",
            )
        model = folder.read(place)
        splitting.split(store, model)
        learngenes = Learngenes(store=store, place=splitting.place_of(model))
    with _steps(config, progress, "draw") as on_step, open_runtime(address):
        return train_diffusion(
            diffusion_of(config),
            settings=training.settings_of(config),
            names=list(config.classes),
            out=out,
            store=store,
            use_ray=address != "none",
            on_step=on_step,
            learngenes=learngenes,
        )


def split(recipe: KindRecipe, *, address: str, progress: Progress = SILENT) -> SplitResult:
    """Put the trained model's components, or those of a library, into the store."""
    if recipe.library is not None:
        from svdmerge.kind.library import split_library

        return split_library(recipe.library, address=address, progress=progress).result
    return splitting.split(Folder.at(recipe.store), _model(recipe))


def recombine(recipe: KindRecipe) -> RecombineResult:
    """Write the model of the `recombine` section, measured beside the full one.

    Raises:
        RecipeError: a class is unknown, or the budget is below the learngenes alone.
    """
    wanted = recipe.recombine
    if wanted is None:
        raise _lacks("recombine", "classes")
    out = _other(wanted.out, recipe)
    if recipe.library is not None:
        from svdmerge.kind.library import example_inputs, library_parts

        parts = library_parts(recipe.library, chosen=wanted.classes, together=wanted.together)
        example = folder.as_example(example_inputs(parts.blueprint.config["config"]))
        return _recombined(parts, parts.classes, wanted=wanted, example=example, out=out)
    if wanted.together:
        raise RecipeError(
            "recombine.together: there is no `library`",
            "A trained model's classes are never on together: its gate tells them apart.",
            "Remove it, or name a library.",
        )
    model = _model(recipe)
    stored = splitting.stored(Folder.at(recipe.store), model)
    return _recombined(stored, wanted.classes, wanted=wanted, example=model.example, out=out)


def _recombined(
    parts: Parts,
    classes: Sequence[str],
    *,
    wanted: Recombine,
    example: Mapping[str, Tensor],
    out: Folder,
) -> RecombineResult:
    blueprint, small, chosen = recombining.recombined(parts, classes=classes, budget=wanted.budget)
    names = chosen.gate.classes
    full, own, difference = recombining.compared(
        recombining.whole(parts), small, example=example, classes=names
    )
    result = RecombineResult(
        out=out.uri,
        classes=names,
        gated=recombining.is_gated(small),
        full=full,
        recombined=own,
        tailors_dropped=chosen.num_dropped,
        max_difference=difference,
    )
    at_rest = folder.Model(blueprint=blueprint, state=small.state_dict(), example=example)
    folder.write(out, at_rest, result=result.to_json())
    return result


def transfer(recipe: KindRecipe, *, address: str, progress: Progress = SILENT) -> TrainResult:
    """Train the `transfer` section's fresh tailors beside the learngenes of `model`."""
    if recipe.transfer is None:
        raise _lacks("transfer", "base_model, train, test and groups")
    store, out = Folder.at(recipe.store), _other(recipe.transfer.out, recipe)
    model = _model(recipe)
    splitting.split(store, model)
    learngenes = Learngenes(store=store, place=splitting.place_of(model))
    with _steps(recipe.transfer, progress, "transfer") as on_step, open_runtime(address):
        return training.train(
            recipe.transfer,
            out=out,
            store=store,
            use_ray=address != "none",
            on_step=on_step,
            learngenes=learngenes,
        )


@contextlib.contextmanager
def _steps(config: Pace, progress: Progress, name: str) -> Generator[Callable[[int], None]]:
    """A bar over training steps, advanced to the step that is told."""
    with progress.stage(name, config.steps) as bar:
        done = 0

        def on_step(step: int) -> None:
            nonlocal done
            bar.advance(step - done)
            done = step

        yield on_step


def _model(recipe: KindRecipe) -> folder.Model:
    sections = (recipe.train, recipe.transfer)
    trusted = [section.backbone for section in sections if section is not None]
    return folder.read(Folder.at(recipe.model), trusted=trusted)


def _other(out: str, recipe: KindRecipe) -> Folder:
    """The folder to write, which is not that of the model it is made of."""
    found = Folder.at(out)
    if found == Folder.at(recipe.model):
        raise RecipeError(
            f"out: {found.uri} is `model`", "It would be replaced by what is made of it.",
            "Give another `out`.",
        )  # fmt: skip
    folder.check_free(found)
    return found


def _lacks(section: str, keys: str) -> RecipeError:
    return RecipeError(
        f"the configuration has no `{section}` section",
        f"It says what to {section}.",
        f"Add one, with {keys}.",
    )
