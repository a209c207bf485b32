"""Progress as the library reports it, and how a terminal shows it."""

import contextlib
from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import Protocol


class Stage(Protocol):
    """A step in progress."""

    def advance(self, num: int = 1) -> None:
        """Count units done."""
        ...


class Progress(Protocol):
    """Where steps announce themselves."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Stage]:
        """A step of `total` units, shown while the block runs."""
        ...


class _Silent:
    def advance(self, num: int = 1) -> None:
        """Show nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Generator[Stage]:
        """A step that shows nothing."""
        yield self


SILENT: Progress = _Silent()


class TerminalProgress:
    """Bars on standard error; plain lines where that is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Generator[Stage]:
        """A bar that is shown while the block runs."""
        from rich.progress import MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (*Bars.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
        live = self._console.is_terminal
        bars = Bars(*columns, TimeRemainingColumn(), console=self._console, disable=not live)
        with bars:
            task = bars.add_task(name, total=total)

            class Bar:
                def advance(self, num: int = 1) -> None:
                    bars.advance(task, num)

            yield Bar()
        if not live:
            self._console.print(f"{name}: {total} done", highlight=False)
