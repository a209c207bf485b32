"""What each tensor of a model is, and what happens to it. Headers only: imports no torch."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from svdmerge.errors import RecipeError


class Action(StrEnum):
    """What a merge does with a tensor."""

    BASE = "base"  # the base's bytes; sources are not read
    EQUAL = "equal"  # the base's bytes, and a source that differs is an error
    AVERAGE = "average"  # base + mean of the sources' differences
    DECOMPOSE = "decompose"  # a matrix: merged from sources' rank-one components
    WHOLE = "whole"  # a matrix: merged from sources' whole differences, then decomposed
    ELEMENTWISE = "elementwise"  # anything else: merged by the method's rule for entries


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One matrix of a model: a whole tensor, or one slice of a stack.

    `start` counts elements into the tensor; the matrix is `m * n` contiguous elements from there.
    """

    id: str
    tensor: str
    start: int
    m: int
    n: int
    action: Action

    @property
    def numel(self) -> int:
        """Elements of the matrix."""
        return self.m * self.n

    @property
    def rank(self) -> int:
        """Components a source can have; what travels as a whole difference is one."""
        return min(self.m, self.n) if self.action is Action.DECOMPOSE else 1

    @property
    def source_id(self) -> str:
        """Its id among sources' components: whole and decomposed, a store may hold it twice."""
        return f"{self.id}#flat" if self.action is Action.WHOLE else self.id

    @property
    def is_factored(self) -> bool:
        """Whether its merged difference is an SVD, whose singular values can be tuned."""
        return self.action in (Action.DECOMPOSE, Action.WHOLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A recipe's rule: tensors whose name matches the glob get the action; `error` refuses them."""

    match: str
    policy: str


# Parts of a dotted name. Whole words, so that a mixture's `shared_experts` is not T5's `shared`.
BASE_WORDS = frozenset({"wte", "wpe", "shared", "lm_head"})


def action_of(
    name: str,
    *,
    shape: Sequence[int],
    floating: bool,
    policies: Sequence[Policy],
    vocab_size: int | None,
    matrix_action: Action,
    vector_action: Action = Action.AVERAGE,
) -> Action:
    """The action for a tensor: the first matching policy, else the defaults in order.

    `matrix_action` is what the merge method does with matrices, `vector_action` with the rest.

    Raises:
        RecipeError: a policy refuses the tensor, or asks to merge integers.
    """
    for rule in policies:
        if fnmatchcase(name, rule.match):
            return _by_policy(name, rule=rule, floating=floating, matrix_action=matrix_action)
    if not floating:
        return Action.EQUAL
    words = name.split(".")
    # Parts by their beginning, so that `decomposition` is no position.
    parts = re.split(r"[._]", name.lower())
    if any(word in BASE_WORDS for word in words) or any(
        part.startswith("position") or "embed" in part for part in parts
    ):
        return Action.BASE
    if vocab_size is not None and vocab_size in shape:
        return Action.BASE
    if len(shape) in (2, 4) or (len(shape) == 3 and any("experts" in word for word in words)):
        return matrix_action
    return vector_action


def _by_policy(name: str, *, rule: Policy, floating: bool, matrix_action: Action) -> Action:
    if rule.policy == "error":
        raise RecipeError(
            f"{name}: refused by the policy {rule.match!r}",
            "The recipe says `policy: error` for this tensor.",
            "Exclude it with another policy before that one.",
        )
    action = Action(rule.policy)
    if action is not Action.BASE and not floating:
        raise RecipeError(
            f"{name}: policy {rule.match!r} would {rule.policy} an integer tensor",
            "Only floating-point tensors have a meaningful difference to the base.",
            "Use `policy: base` for it.",
        )
    return matrix_action if action is Action.DECOMPOSE else action


def matrices(name: str, *, shape: Sequence[int], action: Action) -> tuple[Parameter, ...]:
    """The matrices of a tensor, in order.

    Decomposed, before merging or after: 2-D as it is, a convolution kernel as (out, in*h*w), a 3-D
    stack slice by slice, a vector as (1, n). Everything else travels flat, as (1, numel).
    """
    numel = math.prod(shape)
    if action not in (Action.DECOMPOSE, Action.WHOLE):
        # Another id: a store may hold a matrix both decomposed and flat, for different methods.
        key = name if action in (Action.BASE, Action.EQUAL) else f"{name}#flat"
        return (Parameter(id=key, tensor=name, start=0, m=1, n=numel, action=action),)
    if len(shape) < 2:
        return (Parameter(id=name, tensor=name, start=0, m=1, n=numel, action=action),)
    if len(shape) == 3:
        stack, m, n = shape
        return tuple(
            Parameter(id=f"{name}[{i}]", tensor=name, start=i * m * n, m=m, n=n, action=action)
            for i in range(stack)
        )
    m = shape[0]
    n = numel // m if m else 0
    return (Parameter(id=name, tensor=name, start=0, m=m, n=n, action=action),)


def budget(k: int | float, *, rank: int) -> int:
    """Components kept of a matrix: an integer clamped to its rank, or floor(share * rank), >= 1.

    1e-9 is added before flooring so that 0.29 * 100 = 28.999999999999996 is 29.
    """
    if isinstance(k, float):
        return max(1, math.floor(k * rank + 1e-9))
    return min(k, rank)
