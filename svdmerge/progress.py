"""Progress as the library reports it, and how a terminal shows it."""

import contextlib
from collections.abc import Callable, Generator
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


class Recorded:
    """Progress that is shown, and told to a listener: the step's name, units done, units in all."""

    def __init__(self, shown: Progress, *, tell: Callable[[str, int, int], None]) -> None:
        self._shown, self._tell = shown, tell

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Generator[Stage]:
        """A step that is shown and told while the block runs."""
        with self._shown.stage(name, total) as bar:
            yield _Counted(bar, tell=lambda done: self._tell(name, done, total))


class _Counted:
    def __init__(self, bar: Stage, *, tell: Callable[[int], None]) -> None:
        self._bar, self._tell, self._done = bar, tell, 0
        tell(0)

    def advance(self, num: int = 1) -> None:
        """Count units done."""
        self._done += num
        self._bar.advance(num)
        self._tell(self._done)


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
