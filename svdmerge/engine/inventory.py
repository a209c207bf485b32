"""What the store holds of a plan's sources: how deep, and in which sidecars the values lie."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from svdmerge.core.params import Parameter
from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import Runtime
from svdmerge.progress import Progress
from svdmerge.storage import layout
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Covered, Entry, depth_of, load_coverage

# A source's listing and records, parsed one commit at a time.
INVENTORY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """A source's sidecar."""

    revision: str
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What is held of one source: per matrix, how many components and which sidecars list it."""

    depths: Mapping[str, int]
    sidecars: tuple[Sidecar, ...]
    listed_in: Mapping[str, tuple[int, ...]]
    """Positions of a matrix's sidecars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What is held of every source, by revision. What is stored later is not in it."""

    holdings: Mapping[str, Holding]

    def depth(self, revision: str, parameter: Parameter) -> int:
        """Components of a source's matrix that are stored without a gap from the first on."""
        return self.holdings[revision].depths.get(parameter.source_id, 0)

    def is_known(self, revision: str, parameter: Parameter) -> bool:
        """Whether anything is stored of a source's matrix."""
        return parameter.source_id in self.holdings[revision].depths

    def sidecars(
        self, revisions: Iterable[str], parameters: Sequence[Parameter]
    ) -> tuple[Sidecar, ...]:
        """All that list any of these matrices of these sources."""
        found: list[Sidecar] = []
        for holding in (self.holdings[r] for r in revisions):
            wanted = {i for p in parameters for i in holding.listed_in.get(p.source_id, ())}
            found += [holding.sidecars[i] for i in sorted(wanted)]
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryUnit:
    """A source whose records are read."""

    name: str
    memory_bytes: int
    threads: int
    store: Folder
    base_key: str
    revision: str


def holding(unit: InventoryUnit) -> Holding:
    """What is held of one source. Raises: StoreError, if a record is malformed."""
    covered: dict[str, list[Covered]] = defaultdict(list)
    listed_in: dict[str, list[int]] = defaultdict(list)
    sidecars: list[Sidecar] = []
    for commit in load_coverage(
        unit.store,
        commits=layout.commits_path(unit.base_key, unit.revision),
        data=layout.components_path(unit.base_key, unit.revision),
    ):
        for part in commit.covered:
            covered[part.parameter].append(part)
            if commit.spectrum is not None:
                listed_in[part.parameter].append(len(sidecars))
        if commit.spectrum is not None:
            sidecars.append(Sidecar(revision=unit.revision, entry=commit.spectrum))
    return Holding(
        depths={
            name: depth_of(sorted(parts, key=lambda part: part.first))
            for name, parts in covered.items()
        },
        sidecars=tuple(sidecars),
        listed_in={name: tuple(found) for name, found in listed_in.items()},
    )


def take_inventory(plan: Plan, *, runtime: Runtime, progress: Progress) -> Inventory:
    """What the store holds now, each source's records read by one task."""
    units = [
        InventoryUnit(
            name=f"inventory {source.reference}", memory_bytes=INVENTORY_BYTES, threads=1,
            store=plan.store, base_key=plan.base_key, revision=source.revision,
        )
        for source in plan.sources
    ]  # fmt: skip
    found = runtime.map(holding, units, stage="inventory", progress=progress)
    return Inventory(
        holdings={s.revision: held for s, held in zip(plan.sources, found, strict=True)}
    )
