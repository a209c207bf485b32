"""How a source's tensors stand for the base's: as they are, put together of others, or not at all.

From headers alone, and tokenizers where rows are matched by token.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from svdmerge.core.params import Action
from svdmerge.errors import MismatchError, RecipeError
from svdmerge.recipe import Recipe, SourceModel, parse_rows
from svdmerge.storage.checkpoint import FLOATING, Checkpoint, TensorRef
from svdmerge.storage.composed import Composed, Piece, compose
from svdmerge.storage.source import open_source
from svdmerge.storage.vocabulary import common_rows, read_vocabulary


class Kind(StrEnum):
    """In what a tensor of a source is unlike the base's."""

    MISSING = "missing"  # the source lacks it: no difference there
    MISMATCH = "mismatch"  # of another shape or type: no difference there
    EXTRA = "extra"  # the base lacks it: left out
    MAPPED = "mapped"  # put together as the recipe says
    TOKENS = "tokens"  # rows matched by token


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlike:
    """A tensor of a source that is not just the base's tensor with other values."""

    kind: Kind
    told: str
    """What it is, and what stands for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A source whose tensors are those of the base, as far as it has any."""

    checkpoint: Checkpoint
    unlike: Mapping[str, Unlike]
    """By tensor, in order."""


def fit(
    model: SourceModel, *, recipe: Recipe, base: Checkpoint, actions: Mapping[str, Action]
) -> Fitted:
    """A model of the recipe, fitted to the base as its policies say.

    Raises:
        RecipeError: `tensors` maps what there is not.
        CheckpointError: its files or headers are wrong, or a tokenizer that is needed is missing.
        MismatchError: a tensor is missing, of another shape, or extra, and no policy allows it.
    """
    source, unplaced = open_source(model.model, base=base)
    fitting = _Fitting(recipe, base=base, actions=actions, source=source)
    fitting.map_tensors(model)
    fitting.match_tokens()
    fitting.leave_extra(unplaced)
    fitting.stand_in()
    return fitting.fitted()


class _Fitting:
    """What is left of a source to fit, and what was found unlike."""

    def __init__(
        self, recipe: Recipe, *, base: Checkpoint, actions: Mapping[str, Action], source: Checkpoint
    ) -> None:
        self._recipe, self._base, self._actions, self._source = recipe, base, actions, source
        self._tensors = dict(source.tensors)
        self._unlike: dict[str, Unlike] = {}
        self._used: set[str] = set()
        """Tensors that others are put together from."""

    def map_tensors(self, model: SourceModel) -> None:
        """Put together what `tensors` maps."""
        for pattern, given in model.tensors.items():
            if self._source.is_partial or self._source.low_rank:
                raise RecipeError(
                    f"{model.model}: tensors: is an adapter",
                    "Only tensors of full models are put together of others.",
                    "Leave `tensors` out.",
                )
            found = re.compile(re.escape(pattern).replace(r"\*", "(.*)"))
            matches = [m for name in self._base.tensors if (m := found.fullmatch(name))]
            if not matches:
                raise RecipeError(
                    f"{model.model}: tensors: {pattern!r} matches no tensor of the base",
                    f"Expected a name such as {next(iter(self._base.tensors), '')}.",
                    "Name the base's tensors on the left, the source's on the right.",
                )
            for match in matches:
                names = [_filled(text, match.groups()) for text in given]
                self._map(match.string, [self._piece(text, match.string) for text in names], names)

    def _map(self, name: str, pieces: Sequence[Piece], names: Sequence[str]) -> None:
        self._tensors[name] = compose(name, pieces, model=self._source.reference)
        self._used |= {piece.ref.name for piece in pieces}
        self._unlike[name] = Unlike(kind=Kind.MAPPED, told=f"put together of {', '.join(names)}")

    def _piece(self, text: str, name: str) -> Piece:
        rows = parse_rows(text)
        ref = self._source.tensors.get(rows.tensor)
        if ref is None:
            raise MismatchError(
                f"{self._source.reference}: lacks {rows.tensor}",
                f"The recipe's `tensors` takes {name} from it.",
                f"Correct `tensors`; the source has {next(iter(self._source.tensors), 'nothing')}.",
            )
        end = ref.shape[0] if ref.shape else 0
        return Piece(ref=ref, first=rows.first, stop=end if rows.stop is None else rows.stop)

    def match_tokens(self) -> None:
        """Put rows of tokens where the base has them, where `mismatch: tokens` asks for it."""
        names = [
            name
            for name, action in self._actions.items()
            if action not in (Action.BASE, Action.EQUAL)
            and name in self._tensors
            and self._recipe.ruling("mismatch", name) == "tokens"
        ]
        if not names:
            return
        ours, theirs = (read_vocabulary(x.folder) for x in (self._base, self._source))
        for name in names:
            base, source = self._base.tensors[name], self._tensors[name]
            if not base.shape or base.shape[1:] != source.shape[1:]:
                continue  # told as the mismatch that it is
            runs = common_rows(
                ours, theirs, num_base=base.shape[0], num_source=source.shape[0]
            )  # fmt: skip
            if runs == [(True, 0, source.shape[0])]:
                continue
            pieces = [
                Piece(ref=source if known else base, first=first, stop=stop)
                for known, first, stop in runs
            ]
            self._tensors[name] = compose(name, pieces, model=self._source.reference)
            common = sum(stop - first for known, first, stop in runs if known)
            self._unlike[name] = Unlike(
                kind=Kind.TOKENS,
                told=f"{common} of {base.shape[0]} rows by token, the others the base's; "
                f"{source.shape[0] - common} of its {source.shape[0]} left out",
            )

    def leave_extra(self, unplaced: Sequence[str]) -> None:
        """Leave out what the base does not have."""
        extra = sorted({*unplaced, *(self._tensors.keys() - self._base.tensors.keys())})
        extra = [name for name in extra if name not in self._used]
        refused = [name for name in extra if self._recipe.ruling("extra", name) == "error"]
        if refused:
            raise MismatchError(
                f"{self._source.reference}: has {refused[0]}{_more(refused)}",
                f"The base {self._base.reference} lacks it, and the recipe says `extra: error`.",
                "Allow it with {match: ..., extra: ignore} before that, or remove the source.",
            )
        for name in extra:
            self._unlike[name] = Unlike(kind=Kind.EXTRA, told="the base lacks it: left out")

    def stand_in(self) -> None:
        """Let the base's tensors stand for those missing or unlike, where that is allowed."""
        missing = [] if self._source.is_partial else self._missing()
        unlike = [
            name
            for name, ref in self._base.tensors.items()
            if name in self._tensors and _form(self._tensors[name]) != _form(ref)
        ]
        self._refuse_missing([name for name in missing if self._is_refused("missing", name)])
        self._refuse_unlike([name for name in unlike if self._is_refused("mismatch", name)])
        for name in missing:
            told = "the source lacks it: the base's"
            self._unlike[name] = Unlike(kind=Kind.MISSING, told=told)
        for name in unlike:
            told = f"{_told(self._tensors.pop(name))} for {_told(self._base.tensors[name])}"
            self._unlike[name] = Unlike(kind=Kind.MISMATCH, told=f"{told}: the base's")

    def _missing(self) -> list[str]:
        return [name for name in self._base.tensors if name not in self._tensors]

    def _is_refused(self, what: Literal["missing", "mismatch"], name: str) -> bool:
        action = self._actions[name]
        # Integer buffers that newer libraries compute and no longer save differ in nothing.
        if action is Action.BASE or (action is Action.EQUAL and what == "missing"):
            return False
        return self._recipe.ruling(what, name) != "base"

    def _refuse_missing(self, names: Sequence[str]) -> None:
        if not names:
            return
        wanted = sum(action is not Action.BASE for action in self._actions.values())
        other = len(names) > wanted / 2
        raise MismatchError(
            f"{self._source.reference}: lacks {names[0]}{_more(names)}",
            f"It seems to come from another base than {self._base.reference}."
            if other
            else f"The base {self._base.reference} has it.",
            "Remove the source, or map its names (`tensors`)."
            if other
            else f"Add the policy {{match: {names[0]!r}, missing: base}} (no change by this "
            "source) or `policy: base` (by none), map it (`tensors`), or remove the source.",
        )

    def _refuse_unlike(self, names: Sequence[str]) -> None:
        if not names:
            return
        got, expected = self._tensors[names[0]], self._base.tensors[names[0]]
        raise MismatchError(
            f"{self._source.reference}: {names[0]} is {_told(got)}{_more(names)}",
            f"Expected {_told(expected)}, as in {self._base.reference}.",
            f"Add the policy {{match: {names[0]!r}, mismatch: base}} (no change by this source) "
            "or `policy: base` (by none), or remove the source.",
        )

    def fitted(self) -> Fitted:
        """The source as it goes on."""
        composed = {
            name: self._pieces(ref)
            for name, ref in sorted(self._tensors.items())
            if isinstance(ref, Composed)
        }
        revision = self._source.revision
        if composed:
            # Another source in the store: its numbers are of other tensors.
            told = f"{revision}\0{json.dumps(composed, sort_keys=True)}"
            revision = hashlib.sha256(told.encode()).hexdigest()[:32]
        tensors = {n: r for n, r in sorted(self._tensors.items()) if n in self._base.tensors}
        return Fitted(
            checkpoint=replace(self._source, tensors=tensors, revision=revision),
            unlike=dict(sorted(self._unlike.items())),
        )

    def _pieces(self, ref: Composed) -> list[object]:
        """Of what a tensor is put together: rows of the source's tensors (True) or the base's."""
        return [
            [
                piece.ref is not self._base.tensors.get(piece.ref.name),
                self._pieces(piece.ref) if isinstance(piece.ref, Composed) else piece.ref.name,
                piece.first,
                piece.stop,
            ]
            for piece in ref.pieces
        ]


def _filled(text: str, groups: Sequence[str]) -> str:
    """A pattern with what its stars stand for."""
    parts = iter(groups)
    return re.sub(r"\*", lambda _: next(parts), text)


def _form(ref: TensorRef) -> tuple[tuple[int, ...], str]:
    """Shape, and the dtype where it must be the same: integers are compared as bytes."""
    return ref.shape, "" if ref.dtype in FLOATING else ref.dtype


def _told(ref: TensorRef) -> str:
    return f"{ref.dtype} {list(ref.shape)}"


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
