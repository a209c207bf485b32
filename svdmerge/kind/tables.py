"""Results of `svdmerge kind` as tables for a terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from svdmerge.tables import table

if TYPE_CHECKING:
    from svdmerge.kind.demo import DemoResult
    from svdmerge.kind.recombine import Cost, RecombineResult
    from svdmerge.kind.split import SplitResult
    from svdmerge.kind.train import TrainResult


def train_tables(found: "TrainResult") -> list[Any]:
    """What training came to."""
    rows = [
        ("parameters", f"{found.num_parameters:,}"),
        ("trained", f"{found.num_trained:,}"),
        ("steps", f"{found.steps:,}"),
        ("seconds", f"{found.seconds:.1f}"),
        ("test accuracy, superclass known", f"{found.test_accuracy:.1%}"),
        ("test loss", f"{found.test_loss:.4f}"),
    ]
    return [table("Trained", columns=("", ""), rows=rows), *found.notes, f"done: {found.out}"]


def split_tables(found: "SplitResult") -> list[Any]:
    """What was stored."""
    rows: list[tuple[str, str]] = [
        ("layers", f"{found.num_layers:,}"),
        ("learngenes", f"{found.num_learngenes:,}"),
        ("tailors", f"{found.num_tailors:,}"),
    ]
    return [
        table("Stored", columns=("", ""), rows=rows),
        *found.notes,
        f"done: {found.store}, source {found.source}",
    ]


def recombine_tables(found: "RecombineResult") -> list[Any]:
    """The recombined model beside the full one."""
    needs = "needs a class at inference" if found.gated else "needs no class at inference"
    dropped = f"{found.tailors_dropped:,} tailors dropped for the budget"
    return [
        table(
            f"Recombined for {', '.join(found.classes)}",
            columns=("", "parameters", "FLOPs", "ms"),
            rows=[_cost("full", found.full), _cost("recombined", found.recombined)],
        ),
        f"{needs}; {dropped}; outputs differ by {found.max_difference:.2g} at most",
        f"done: {found.out}",
    ]


def demo_tables(found: "DemoResult") -> Iterable[Any]:
    """Every stage's table."""
    yield from train_tables(found.trained)
    yield from split_tables(found.split)
    yield from recombine_tables(found.recombined)
    yield from train_tables(found.transferred)
    yield f"{found.seconds:.0f} seconds"


def _cost(name: str, cost: "Cost") -> tuple[str, str, str, str]:
    return name, f"{cost.parameters:,}", f"{cost.flops:,}", f"{cost.latency_ms:.2f}"
