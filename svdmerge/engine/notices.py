"""What a plan does otherwise than its recipe's words suggest: told, for nothing is silent."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from svdmerge.core.params import Action
from svdmerge.engine.fitting import Kind
from svdmerge.engine.plan import Plan


def notices(plan: Plan) -> list[str]:
    """A line each: tensors left out, a budget that is clamped, policies that fit nothing."""
    return [*_unlike(plan), *_left(plan), *_clamped(plan), *_unmatched(plan)]


_UNLIKE = {
    Kind.EXTRA: "tensors that the base lacks are left out",
    Kind.MISSING: "tensors that it lacks stay the base's in it",
    Kind.MISMATCH: "tensors of another shape stay the base's in it",
}


def _unlike(plan: Plan) -> Iterator[str]:
    for s in plan.sources:
        for kind, told in _UNLIKE.items():
            names = [name for name, x in s.unlike.items() if x.kind is kind]
            if names:
                yield f"{s.reference}: {len(names)} {told}, first {names[0]}"


def _left(plan: Plan) -> Iterator[str]:
    for s in plan.sources:
        names = [n for n in s.checkpoint.low_rank if plan.actions[n] is Action.BASE]
        if names:
            yield (
                f"{s.reference}: its changes of {len(names)} tensors that stay the base's are "
                f"left out, first {names[0]}"
            )


def _clamped(plan: Plan) -> Iterator[str]:
    k = plan.recipe.parameters.k
    if isinstance(k, float) or "k" not in plan.method.parameters:
        return  # a share is never more than the rank
    small = [p for p in plan.parameters if p.action is Action.DECOMPOSE and p.rank < k]
    if small:
        yield (
            f"parameters.k: {k} is more than the rank of {len(small)} matrices, "
            f"first {small[0].id} of rank {small[0].rank}: there the rank counts"
        )


def _unmatched(plan: Plan) -> Iterator[str]:
    for rule in plan.recipe.policies:
        extra = {name for s in plan.sources for name in s.unlike if rule.extra}
        if not any(fnmatchcase(name, rule.match) for name in {*plan.actions, *extra}):
            yield f"policies: {rule.match!r} matches no tensor of the base"
