"""What a plan will cost, from shapes alone: bytes, flops, memory, time."""

from collections import Counter
from dataclasses import asdict, dataclass

from svdmerge.core.params import Action, Parameter
from svdmerge.engine.fitting import Unlike
from svdmerge.engine.flops import block_flops, merge_flops, svd_flops, write_flops
from svdmerge.engine.plan import Plan, peak_bytes, stored_bytes, write_bytes

# Times that a matrix which no task may hold is read for its first block: norms, eight steps, three
# for the bound, the values in float64.
PASSES = 13
# For the estimate of time: one core's float64 SVD and reading from a near disk. Measured on two
# cores of a cloud machine (384 to 1536 wide); a guess elsewhere, and said to be one.
SVD_FLOPS_PER_S = 2e10
READ_BYTES_PER_S = 4e8


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLine:
    """What happens to one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: str
    k: int | None
    """Components kept per matrix, where it is decomposed; at most, if all share one budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A plan's outcome for every tensor, and its costs."""

    plan_hash: str
    scope: str
    num_sources: int
    tensors: tuple[TensorLine, ...]
    actions: dict[str, int]
    unlike: dict[str, dict[str, Unlike]]
    """By source, its tensors that are not just the base's with other values."""
    num_units: int
    read_bytes: int
    store_bytes: int
    output_bytes: int
    flops: float
    peak_task_bytes: int
    cpu_seconds: float

    def to_json(self) -> dict[str, object]:
        """The estimate as plain values."""
        return asdict(self)


def estimate(plan: Plan) -> Estimate:
    """The plan's lines and costs, as if nothing were stored yet."""
    num = len(plan.sources)
    bytes_of = {p.id: p.numel * _item_bytes(plan, p) for p in plan.parameters}
    passes = {p.id: 1 if plan.block_rows(p) is None else PASSES for p in plan.parameters}
    read = 2 * num * sum(passes[name] * size for name, size in bytes_of.items())
    decomposed = [p for p in plan.parameters if p.action is Action.DECOMPOSE]
    flops = num * sum(decompose_flops(plan, p) for p in decomposed) + sum(
        merge_flops(p, k=plan.num_given(p)) + write_flops(p, k=plan.merged_depth(p))
        for p in plan.parameters
    )
    return Estimate(
        plan_hash=plan.hash,
        scope=plan.recipe.parameters.scope,
        num_sources=num,
        tensors=tuple(_line(plan, name) for name in plan.base.tensors),
        actions=dict(Counter(str(a) for a in plan.actions.values())),
        unlike=unlike(plan),
        num_units=num * len(plan.groups),
        read_bytes=read,
        store_bytes=num * sum(stored_bytes(p, depth=plan.depth(p)) for p in plan.parameters),
        output_bytes=plan.base.nbytes,
        flops=flops,
        peak_task_bytes=max(
            [0, *(peak_bytes(plan, g) for g in plan.groups), *write_bytes(plan).values()]
        ),
        cpu_seconds=flops / SVD_FLOPS_PER_S + read / READ_BYTES_PER_S,
    )


def unlike(plan: Plan) -> dict[str, dict[str, Unlike]]:
    """Each source's tensors that are not just the base's with other values, if it has any."""
    return {s.reference: dict(s.unlike) for s in plan.sources if s.unlike}


def decompose_flops(plan: Plan, parameter: Parameter) -> float:
    """Of one source: its first block and certificate where the selection decides how much more."""
    if plan.recipe.parameters.svd == "exact" or not plan.is_shared:
        return svd_flops(parameter)
    return block_flops(parameter)


def _item_bytes(plan: Plan, parameter: Parameter) -> int:
    ref = plan.base.tensors[parameter.tensor]
    return ref.nbytes // max(1, ref.numel)


def _line(plan: Plan, name: str) -> TensorLine:
    ref, action = plan.base.tensors[name], plan.actions[name]
    k = None
    if action is Action.DECOMPOSE:
        most = plan.num_given if plan.is_global else plan.budget
        k = next(most(p) for p in plan.parameters if p.tensor == name)
    return TensorLine(name=name, shape=ref.shape, dtype=ref.dtype, action=str(action), k=k)
