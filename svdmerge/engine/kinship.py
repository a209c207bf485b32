"""Whether the sources come from the recipe's base: by what is stored of them, or by a sample.

Adapters are not judged: their difference is that of their own factors, whatever the base, and a
head that they save whole starts anew.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from svdmerge.core.kinship import Kinship, Norms, kinship_of, strangers
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.inventory import Inventory, Sidecar, take_inventory
from svdmerge.engine.plan import Plan, Source
from svdmerge.engine.runtime import InProcess, Runtime
from svdmerge.errors import MismatchError
from svdmerge.progress import SILENT, Progress
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import read_sidecar

if TYPE_CHECKING:
    import torch

    from svdmerge.storage.checkpoint import TensorRef

# A source's sidecars, decoded one at a time.
KINSHIP_BYTES = 256 << 20
# What is read of a source of which nothing is stored: the first rows of matrices spread over the
# model. So many entries tell a norm to a few thousandths, and cost a megabyte each in float32.
SAMPLE_MATRICES, SAMPLE_ENTRIES = 8, 1 << 18

# Refused sources whose numbers an error gives.
TOLD = 3

Kinships = Mapping[str, Kinship | None]
"""By the sources' names; None of a source that is not judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormsUnit:
    """A source whose sidecars are read."""

    name: str
    memory_bytes: int
    threads: int
    store: Folder
    sidecars: tuple[Sidecar, ...]
    parameters: tuple[Parameter, ...]


def stored_norms(unit: NormsUnit) -> list[Norms]:
    """Of each matrix whose base was read. Raises: StoreError, if a sidecar is damaged."""
    wanted = {p.source_id: p for p in unit.parameters}
    found: dict[str, Norms] = {}
    for sidecar in unit.sidecars:
        for x in read_sidecar(unit.store, sidecar.entry):
            p = wanted.get(x.parameter)
            if p is not None and x.first == 0 and x.base_fro is not None:
                listed = p.action is Action.DECOMPOSE and len(x.s) > 0
                found[p.id] = Norms(
                    fro=x.fro, base_fro=x.base_fro, largest=float(x.s[0]) if listed else None,
                    rank=min(p.m, p.n),
                )  # fmt: skip
    return list(found.values())


def stored_kinships(
    plan: Plan, inventory: Inventory, *, runtime: Runtime, progress: Progress
) -> Kinships:
    """Every source's kinship, by the matrices that the store holds of it."""
    parameters = _matrices(plan)
    judged = _judged(plan)
    units = [
        NormsUnit(
            name=f"kinship {s.reference}", memory_bytes=KINSHIP_BYTES, threads=1, store=plan.store,
            sidecars=inventory.sidecars([s.revision], parameters), parameters=parameters,
        )
        for s in judged
    ]  # fmt: skip
    found = runtime.map(stored_norms, units, stage="kinship", progress=progress)
    told = {s.reference: kinship_of(x) for s, x in zip(judged, found, strict=True)}
    return {s.reference: told.get(s.reference) for s in plan.sources}


def judge(plan: Plan, found: Kinships) -> list[str]:
    """A line for each source that only the recipe's `admit` lets pass.

    Raises:
        MismatchError: sources seem to come from another base, and are not admitted.
    """
    told = strangers({name: kinship for name, kinship in found.items() if kinship is not None})
    admitted = {s.reference for s in plan.sources if s.admit}
    refused = {name: why for name, why in told.items() if name not in admitted}
    if refused:
        names = list(refused)
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        remove = "Check base_model" if len(names) > len(found) / 2 else "Remove it"
        raise MismatchError(
            f"{names[0]}{more}: not fine-tuned from {plan.base.reference}, it seems",
            "; ".join(f"{name}: {refused[name]}" for name in names[:TOLD]) + ".",
            f"{remove}, or admit it by name: {{model: {names[0]}, admit: true}}.",
        )
    return [f"{name}: is admitted, though {why}" for name, why in told.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepPlan:
    """What a plan tells of its sources' weights, and what looking at them took."""

    kinships: Kinships
    from_store: tuple[str, ...]
    """Sources judged by all that is stored of them; the others by a sample."""
    read_bytes: int
    """Of weights."""
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def deep_plan(plan: Plan) -> DeepPlan:
    """Every source's kinship: by the store where it holds the source, else by a sample.

    Raises:
        ContentError: NaN or Inf in what was read.
    """
    start = time.perf_counter()
    inventory = take_inventory(plan, runtime=InProcess(), progress=SILENT)
    parameters = _matrices(plan)
    stored = stored_kinships(plan, inventory, runtime=InProcess(), progress=SILENT)
    known = {
        s.reference
        for s in plan.sources
        if all(inventory.is_known(s.revision, p) for p in parameters if p.rank)
    }
    new = [s for s in _judged(plan) if s.reference not in known]
    sampled = _Sample(plan, parameters)
    found = {s.reference: kinship_of(sampled.norms(s)) for s in new}
    return DeepPlan(
        kinships={**stored, **found},
        from_store=tuple(s.reference for s in plan.sources if s.reference in known),
        read_bytes=sampled.read_bytes,
        seconds=time.perf_counter() - start,
    )


def _judged(plan: Plan) -> list[Source]:
    return [s for s in plan.sources if not s.checkpoint.is_partial]


def _matrices(plan: Plan) -> tuple[Parameter, ...]:
    return tuple(p for p in plan.parameters if p.is_factored)


class _Sample:
    """The first rows of some matrices, the base's read once."""

    def __init__(self, plan: Plan, parameters: Sequence[Parameter]) -> None:
        there = [p for p in parameters if p.numel]
        num = min(SAMPLE_MATRICES, len(there))
        self._parameters = [there[i * len(there) // num] for i in range(num)]
        self._plan = plan
        self._of_base: dict[str, torch.Tensor] = {}
        self.read_bytes = 0

    def norms(self, source: Source) -> Iterator[Norms]:
        """Of the rows read of each matrix."""
        import torch

        from svdmerge.core.delta import delta
        from svdmerge.engine.differences import norm_of

        for p in self._parameters:
            ref = source.checkpoint.tensors.get(p.tensor)
            if ref is None:
                continue
            if p.id not in self._of_base:
                self._of_base[p.id] = self._read(self._plan.base.tensors[p.tensor], p)
            base = self._of_base[p.id]
            difference = delta(self._read(ref, p), base=base)
            if (low_rank := source.checkpoint.low_rank.get(p.tensor)) is not None:
                up, down, _ = low_rank.read(p.start // p.numel)
                difference = difference + (up @ down)[: len(base)]
                self.read_bytes += low_rank.nbytes
            yield Norms(
                fro=norm_of(difference), base_fro=norm_of(base), rank=min(base.shape),
                largest=float(torch.linalg.matrix_norm(difference, ord=2)),
            )  # fmt: skip

    def _read(self, ref: "TensorRef", p: Parameter) -> "torch.Tensor":
        from svdmerge.engine.differences import check_finite

        rows = min(p.m, max(1, SAMPLE_ENTRIES // p.n))
        data = ref.read_bytes(start=p.start, count=rows * p.n)
        self.read_bytes += len(data)
        tensor = ref.decode(data, start=p.start)
        check_finite(tensor, ref)
        return tensor.reshape(rows, p.n)
