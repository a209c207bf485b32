"""What an exported adapter is of, and how much of the matrices' differences its rank leaves out."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from svdmerge.core.components import RankOneComponents
from svdmerge.core.truncate import Truncated
from svdmerge.errors import OutputError
from svdmerge.storage.filesystem import Folder

REPORT = "svdmerge_adapter.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftReport:
    """Of one adapter. Errors are relative, in Frobenius norm, before the cast to float32."""

    base: str
    """The model that it is put on."""
    merged: str
    model: str
    """The class that it is for, as `tune.model` names it."""
    tuned: bool
    """Whether it holds what tuning changed, besides the merge or alone."""
    rank: int | None
    """The most components of a matrix; None: as many as each has."""
    relative_error: float
    """Of all matrices that are LoRA layers together."""
    matrices: Mapping[str, Mapping[str, float]]
    """By module: its rank, and the relative error of it alone."""
    whole: tuple[str, ...]
    """Modules that are saved whole, and exact."""
    files: Mapping[str, str]
    """sha256 by name."""

    @property
    def told(self) -> str:
        """The error in a sentence."""
        if self.rank is None:
            return f"{len(self.matrices)} LoRA layers of full rank"
        return (
            f"{len(self.matrices)} LoRA layers of rank {self.rank} at most leave out "
            f"{self.relative_error:.2%} of the matrices' differences (Frobenius norm)"
        )

    def to_json(self) -> bytes:
        """The report's bytes."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def read_report(folder: Folder) -> PeftReport:
    """The report beside an exported adapter. Raises: OutputError, if it is malformed."""
    try:
        raw: dict[str, object] = json.loads(folder.read(REPORT))
        report = PeftReport(**cast(dict[str, Any], raw))
        texts = [raw[name] for name in ("base", "merged", "model")]
        if not isinstance(raw["files"], dict) or not all(isinstance(t, str) for t in texts):
            raise ValueError("files or models are not named")
    except (ValueError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{folder.uri}/{REPORT}: malformed", str(error), "Export the adapter again."
        ) from None
    return report


def rank_errors(
    lora: Mapping[str, RankOneComponents], cut: Mapping[str, Truncated]
) -> tuple[float, dict[str, dict[str, float]]]:
    """`relative_error` and `matrices` of a report; what is not in `cut` is whole."""
    total = math.hypot(*(c.norm for c in cut.values()))
    lost = math.hypot(*(c.lost for c in cut.values()))
    errors = {path: _ratio(c.lost, c.norm) for path, c in cut.items()}
    of_each = {
        path: {"rank": len(c), "relative_error": errors.get(path, 0.0)}
        for path, c in sorted(lora.items())
    }
    return _ratio(lost, total), of_each


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
