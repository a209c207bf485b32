"""Results of `svdmerge kind` as tables for a terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from svdmerge.tables import table

if TYPE_CHECKING:
    from svdmerge.kind.demo import DemoResult
    from svdmerge.kind.diffusion import DiffusionResult
    from svdmerge.kind.drawing_demo import DrawingResult
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


def draw_tables(found: "DiffusionResult") -> list[Any]:
    """What training to draw came to."""
    rows = [
        ("parameters", f"{found.num_parameters:,}"),
        ("trained", f"{found.num_trained:,}"),
        ("steps", f"{found.steps:,}"),
        ("seconds", f"{found.seconds:.1f}"),
        *((name.replace("_", " "), f"{value:.4f}") for name, value in _last(found.curve).items()),
    ]
    return [table("Trained to draw", columns=("", ""), rows=rows), f"done: {found.out}"]


def _last(curve: list[dict[str, float]]) -> dict[str, float]:
    """The last of each measurement along a curve."""
    found = {name: value for point in curve for name, value in point.items()}
    return {name: value for name, value in found.items() if name != "step"}


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


def drawing_tables(found: "DrawingResult") -> Iterable[Any]:
    """What models draw, and how well it is read."""
    yield table(
        "Drawing digits",
        columns=("", "digits", "parameters", "held-out loss", "read as meant", "FLOPs", "ms"),
        rows=[
            (
                row.name,
                row.digits,
                f"{row.parameters:,}",
                f"{row.held_out_loss:.4f}",
                f"{row.accuracy:.0%}",
                "" if row.flops is None else f"{row.flops:,}",
                "" if row.latency_ms is None else f"{row.latency_ms:.2f}",
            )
            for row in found.rows
        ],
    )
    yield f"the classifier reads {found.classifier_accuracy:.0%} of real test images rightly"
    yield f"recombined outputs differ by {found.max_difference:.2g} at most"
    yield from (f"drawn: {picture}" for picture in found.pictures)
    yield f"{found.seconds:.0f} seconds"


def _cost(name: str, cost: "Cost") -> tuple[str, str, str, str]:
    return name, f"{cost.parameters:,}", f"{cost.flops:,}", f"{cost.latency_ms:.2f}"
