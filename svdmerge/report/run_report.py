"""What a run did: counts, seconds and bytes by stage. In the store, it outlives a cluster."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from svdmerge.core.kinship import Kinship


@dataclass(slots=True, kw_only=True)
class StageReport:
    """One stage of a run."""

    name: str
    num_units: int
    seconds: float
    num_matrices: int = 0
    bytes_read: int = 0
    bytes_stored: int = 0
    peak_worker_rss_bytes: int = 0
    """Largest resident size of a worker so far, Python and torch included."""
    num_reused: int = 0
    """Matrices that the store, or an earlier try, held already."""
    flops: float = 0.0
    """Of solvers, by their formulas."""
    unit_seconds: float = 0.0
    """Of all workers together, in units that were done."""
    step_seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Wall time of the steps that went through workers; the rest of `seconds` is the driver's."""
    retries: dict[str, int] = field(default_factory=dict[str, int])
    """Units tried again, by why they did not come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress:
    """How far a step is: units done, of all."""

    name: str
    done: int
    total: int


@dataclass(slots=True, kw_only=True)
class RunReport:
    """A run, as `run.json` holds it and `--json` prints it."""

    plan_hash: str
    out: str
    store: str
    status: str = "running"
    progress: StageProgress | None = None
    """Of the last step that began: where a run is, or where it ended."""
    stages: list[StageReport] = field(default_factory=list[StageReport])
    kept: dict[str, int] = field(default_factory=dict[str, int])
    """Components kept of each source."""
    kinship: dict[str, Kinship | None] = field(default_factory=dict[str, Kinship | None])
    """How far each source lies from the base; None of adapters, which are not judged by it."""
    unlike: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """By source, its tensors that are not just the base's with other values: what they are and
    what stands for them."""
    warnings: list[str] = field(default_factory=list[str])
    ranking: Any = None
    """A `Ranking`, where sources were ranked for a target."""
    adaptation: Any = None
    """An `Adaptation`, where the target's examples chose sources or strength."""
    tune: Any = None
    """A `TuneResult`, where the recipe asks for tuning."""

    def to_json(self) -> str:
        """The report as JSON."""
        plain = {n: _plain(getattr(self, n)) for n in ("ranking", "adaptation", "tune")}
        return json.dumps(asdict(self) | plain, indent=1, default=str)


def _plain(part: Any) -> Any:
    return None if part is None else json.loads(part.to_json())
