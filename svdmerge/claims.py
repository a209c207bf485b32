"""A claim of an output, and what came of checking it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from svdmerge.errors import SvdmergeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim: whether it held, and the figure or the fault."""

    claim: str
    held: bool | None
    """None: it was not checked, for the reason told."""
    detail: str

    def to_json(self) -> dict[str, object]:
        """The check as plain values."""
        return asdict(self)


class Unchecked(Exception):
    """What a check needs is not there; the message says what."""


def checked(claim: str, check: Callable[[], str]) -> Check:
    """The outcome of a check that returns a figure, or raises."""
    try:
        return Check(claim=claim, held=True, detail=check())
    except Unchecked as reason:
        return Check(claim=claim, held=None, detail=str(reason))
    except SvdmergeError as error:
        return Check(claim=claim, held=False, detail=str(error.args[0]))
