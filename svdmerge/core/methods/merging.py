"""One matrix merged by any method: sources' parts in, the merged difference as components out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from svdmerge.core import svd
from svdmerge.core.components import RankOneComponents, flat, none
from svdmerge.core.methods.average import average
from svdmerge.core.methods.axis import axis
from svdmerge.core.methods.core_space import core_space
from svdmerge.core.methods.dare import dare, seed_of
from svdmerge.core.methods.iso_c import iso_c
from svdmerge.core.methods.knots import knots
from svdmerge.core.methods.svc import svc
from svdmerge.core.methods.task_arithmetic import task_arithmetic
from svdmerge.core.methods.ties import ties
from svdmerge.core.methods.tsv_m import tsv_m
from svdmerge.core.params import Action, Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is taken of one source in one matrix; read when asked for, as often as asked for."""

    weight: float
    content: str
    """sha256 of the source's bytes of the matrix."""
    read: Callable[[], RankOneComponents]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merging:
    """A method and its settings."""

    method: str
    num_sources: int
    scale: float
    density: float

    def rule(self, parameter: Parameter) -> str:
        """The method that a tensor is merged by."""
        return "average" if parameter.action is Action.AVERAGE else self.method

    def of(self, parameter: Parameter) -> "Merging":
        """These settings as far as they matter for a tensor, so that equal ones give equal bits."""
        rule = self.rule(parameter)
        return replace(self, method=rule, num_sources=self.num_sources if rule in COUNTING else 0)

    def merge(self, parameter: Parameter, parts: Sequence[Part]) -> RankOneComponents:
        """The merged difference: an SVD of a matrix, one flat component of anything else.

        `parts` are in an order that depends on the sources' content alone, and so does the sum's.
        """
        if parameter.action is Action.DECOMPOSE:
            if not parts:
                return none(parameter.m, parameter.n)
            read, weights = [p.read() for p in parts], [p.weight for p in parts]
            return FROM_COMPONENTS[self.method](self, read, weights)
        merged = FROM_DIFFERENCES[self.rule(parameter)](self, parameter, parts)
        if parameter.action is not Action.WHOLE:
            return flat(merged)
        matrix = merged.reshape(parameter.m, parameter.n)
        return iso_c(matrix) if self.method == "iso_c" else svd.factors(matrix)


# Rules whose outcome depends on the number of all sources, not only on what is taken of some.
COUNTING = ("average", "svc")


def _each(parts: Sequence[Part]) -> Iterator[tuple[Tensor, float]]:
    """The whole differences and weights, one in memory at a time."""
    return ((p.read().vh, p.weight) for p in parts)


FROM_COMPONENTS: Mapping[
    str, Callable[[Merging, list[RankOneComponents], list[float]], RankOneComponents]
] = {
    "axis": lambda m, c, w: axis(c, weights=w, scale=m.scale),
    "svc": lambda m, c, w: svc(c, weights=w, num_sources=m.num_sources, scale=m.scale),
    "tsv_m": lambda m, c, w: tsv_m(c, weights=w, scale=m.scale),
    "knots": lambda m, c, w: knots(c, weights=w, density=m.density, scale=m.scale),
    "core_space": lambda m, c, w: core_space(c, weights=w, density=m.density, scale=m.scale),
}

FROM_DIFFERENCES: Mapping[str, Callable[[Merging, Parameter, Sequence[Part]], Tensor]] = {
    "average": lambda m, _, c: average(_each(c), num_sources=m.num_sources, scale=m.scale),
    "task_arithmetic": lambda m, _, c: task_arithmetic(_each(c), scale=m.scale),
    "iso_c": lambda m, _, c: task_arithmetic(_each(c), scale=m.scale),
    "ties": lambda m, _, c: ties(lambda: _each(c), density=m.density, scale=m.scale),
    "dare": lambda m, p, c: dare(
        _each(c),
        seeds=[seed_of(p.id, content=part.content) for part in c],
        density=m.density,
        scale=m.scale,
    ),
}
