"""`svdmerge store`: a component store from the command line."""

from typing import TYPE_CHECKING, Annotated

import typer

from svdmerge.errors import RecipeError
from svdmerge.terminal import Json, Verbose, guard, show

if TYPE_CHECKING:
    from svdmerge.storage.filesystem import Folder

store_app = typer.Typer(help="Look after a component store.", no_args_is_help=True)
StoreUri = Annotated[str, typer.Argument(metavar="STORE", help="A folder or fsspec URI.")]


@store_app.command("ls")
def ls(store: StoreUri, as_json: Json = False, verbose: Verbose = False) -> None:
    """List the sources a store holds."""

    def work() -> None:
        from dataclasses import asdict

        from svdmerge.storage.maintenance import list_sources
        from svdmerge.tables import store_table

        found = list_sources(_folder(store))
        show(as_json, lambda: [asdict(s) for s in found], lambda: [store_table(found)])

    guard(work, verbose=verbose)


@store_app.command("verify")
def verify(store: StoreUri, as_json: Json = False, verbose: Verbose = False) -> None:
    """Read every committed object whole and compare it with its commit."""

    def work() -> None:
        from svdmerge.storage.maintenance import verify as faults_of

        faults = faults_of(_folder(store))
        show(as_json, lambda: {"faults": faults}, lambda: faults or ["No faults."])
        if faults:
            raise typer.Exit(1)

    guard(work, verbose=verbose)


@store_app.command("gc")
def gc(
    store: StoreUri,
    older_than_hours: Annotated[float, typer.Option(min=0.0, help="Spare younger objects.")] = 24,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Remove objects that no commit names."""

    def work() -> None:
        from svdmerge.storage.maintenance import collect_garbage

        removed = collect_garbage(_folder(store), grace_s=older_than_hours * 3600)
        show(as_json, lambda: {"removed": removed}, lambda: [f"{len(removed)} objects removed."])

    guard(work, verbose=verbose)


def _folder(uri: str) -> "Folder":
    from svdmerge.storage.filesystem import Folder

    folder = Folder.at(uri)
    if not folder.exists():
        raise RecipeError(f"{uri}: does not exist", "", "Check the path of the store.")
    return folder
