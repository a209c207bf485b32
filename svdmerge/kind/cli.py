"""`svdmerge kind`: decomposable models from the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdmerge.terminal import Address, Json, Verbose, guard, progress, show

if TYPE_CHECKING:
    from svdmerge.kind.recipe import KindRecipe

kind_app = typer.Typer(
    help="Train decomposable models, take them apart, recombine and transfer them.",
    no_args_is_help=True,
)
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration in YAML.")]


@kind_app.command()
def train(
    config: Config, address: Address = "local", as_json: Json = False, verbose: Verbose = False
) -> None:
    """Train a model whose weights are components, switched by class. Resumes by itself."""

    def work() -> None:
        from svdmerge.kind import tables, workflow

        recipe, told = _load(config), progress()
        if recipe.draw is not None and recipe.train is None:
            drawn = workflow.draw(recipe, recipe.draw, address=address, progress=told)
            show(as_json, drawn.to_json, lambda: tables.draw_tables(drawn))
            return
        found = workflow.train(recipe, address=address, progress=told)
        show(as_json, found.to_json, lambda: tables.train_tables(found))

    guard(work, verbose=verbose)


@kind_app.command()
def split(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A configuration, or a merge recipe.")
    ],
    address: Address = "local",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Store a trained model's learngenes and tailors; or those found in a library of sources."""

    def work() -> None:
        from svdmerge.kind.tables import split_tables
        from svdmerge.kind.workflow import split as taken_apart

        found = taken_apart(_load(config), address=address, progress=progress())
        show(as_json, found.to_json, lambda: split_tables(found))

    guard(work, verbose=verbose)


@kind_app.command()
def recombine(config: Config, as_json: Json = False, verbose: Verbose = False) -> None:
    """Put together a smaller model for some classes and a budget, without training."""

    def work() -> None:
        from svdmerge.kind.tables import recombine_tables
        from svdmerge.kind.workflow import recombine as put_together

        found = put_together(_load(config))
        show(as_json, found.to_json, lambda: recombine_tables(found))

    guard(work, verbose=verbose)


@kind_app.command()
def transfer(
    config: Config, address: Address = "local", as_json: Json = False, verbose: Verbose = False
) -> None:
    """Train fresh tailors for new classes beside a trained model's learngenes."""

    def work() -> None:
        from svdmerge.kind.tables import train_tables
        from svdmerge.kind.workflow import transfer as transferred

        found = transferred(_load(config), address=address, progress=progress())
        show(as_json, found.to_json, lambda: train_tables(found))

    guard(work, verbose=verbose)


@kind_app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path(
        "svdmerge-kind-demo"
    ),
    address: Address = "local",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train, split, recombine and transfer on handwritten digits: first to read, then to draw."""

    def work() -> None:
        from svdmerge.engine.runtime import open_runtime
        from svdmerge.kind.demo import run_demo
        from svdmerge.kind.drawing_demo import run_drawing_demo
        from svdmerge.kind.tables import demo_tables, drawing_tables

        with open_runtime(address):  # one for all: each start of Ray takes seconds
            found = run_demo(out, address=address, progress=progress())
            drawn = run_drawing_demo(out / "drawing", address=address, progress=progress())
        show(
            as_json,
            lambda: {**found.to_json(), "drawing": drawn.to_json()},
            lambda: [*demo_tables(found), *drawing_tables(drawn)],
        )

    guard(work, verbose=verbose)


def _load(config: Path) -> "KindRecipe":
    from svdmerge.kind.recipe import load_kind_recipe

    return load_kind_recipe(config)
