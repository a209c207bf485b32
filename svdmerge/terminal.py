"""What every command of the command line shares: options, results, errors, progress."""

import json
import logging
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from svdmerge.errors import RecipeError, SvdmergeError
from svdmerge.logs import is_json

if TYPE_CHECKING:
    from svdmerge.progress import Progress

logger = logging.getLogger(__name__)

Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable result.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks of errors.")]
Address = Annotated[
    str,
    typer.Option(help="Where tasks run: local (embedded Ray), none, auto, or a cluster's address."),
]


# 128 + SIGINT, as shells have it.
INTERRUPTED = 130


def progress() -> "Progress":
    """Bars, or lines, on standard error; nothing where the log tells it."""
    from svdmerge.progress import SILENT, TerminalProgress

    return SILENT if is_json() else TerminalProgress()


def show(as_json: bool, plain: Callable[[], object], tables: Callable[[], Iterable[Any]]) -> None:
    """The command's result on standard output: JSON, or tables."""
    if as_json:
        sys.stdout.write(json.dumps(plain(), indent=1, default=str) + "\n")
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for part in tables():
        console.print(part)


def guard(work: Callable[[], None], *, verbose: bool) -> None:
    """Tell errors in up to three lines: 2 for a wrong recipe or usage, 1 for a failed run."""
    try:
        work()
    except SvdmergeError as error:
        if verbose:
            raise
        # A line each, whatever other libraries' messages look like inside.
        lines = [" ".join(str(line).split()) for line in error.args if line]
        _fail("\n".join(lines), 2 if isinstance(error, RecipeError) else 1)
    except KeyboardInterrupt:
        _fail("interrupted; what is done is kept: the same command goes on from there", INTERRUPTED)


def _fail(message: str, code: int) -> NoReturn:
    if is_json():
        logger.error(message, extra={"exit_code": code})
    else:
        typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code) from None
