"""Reports for tests: of a synthetic merge of any size, with names that mean harm."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from svdmerge.report.contents import Contents, Inflation, MergedMatrix, MergedSource, Overlap

SCRIPT = "<script>alert(1)</script>"
KINDS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "mlp.in",
    "x.$y$",
)
HOSTILE = (SCRIPT, "n" * 300, "'\"><img src=x onerror=alert(2)>", "$\\frac{1}{0}$", "名前")


def synthetic(num_sources: int = 300, num_matrices: int = 560, **changes: Any) -> Contents:
    """A report of made-up figures."""
    draw = np.random.default_rng(0)
    names = (HOSTILE + tuple(f"org/model-{i:03d}" for i in range(num_sources)))[:num_sources]
    kept_by = draw.integers(0, 4, (num_sources, num_matrices))
    kept_in = tuple(f"layer.{i // len(KINDS)}.{KINDS[i % len(KINDS)]}" for i in range(num_matrices))
    compared = names[:32]
    fields = {
        "title": SCRIPT, "summary": "A merge.", "base": SCRIPT, "base_revision": "0" * 64,
        "base_licence": SCRIPT, "licence": "unknown", "version": "0", "plan_hash": "0" * 64,
        "status": "done", "recipe_yaml": SCRIPT, "warnings": (SCRIPT, "n" * 300), "missing": (),
        "actions": {"decomposed": num_matrices},
        "sources": tuple(
            MergedSource(name=n, revision="f" * 64, weight=1.0, licence=None, kept=int(kept))
            for n, kept in zip(names, kept_by.sum(axis=1), strict=True)
        ),
        "kept_by": kept_by, "kept_in": kept_in,
        "matrices": tuple(_matrix(name, i) for i, name in enumerate(kept_in)),
        "whatif": tuple(_outcome(k, names) for k in (0.01, 0.1, 0.2, 1.0)), "k": 0.1,
        "overlap": Overlap(
            names=compared, mean=np.full((len(compared),) * 2, 0.5), matrices=kept_in[:6]
        ),
        "inflation": tuple(Inflation(name=n, ratio=1.5) for n in kept_in[:64]),
        "stages": (STAGE | {"name": "decompose"}, STAGE | {"name": "merge"}),
        "ranking": {
            "num_examples": 9, "base_loss": 1.0, "verdict": SCRIPT,
            "sources": [
                {"name": n, "loss": 0.9, "gain": 0.1, "low": 0.05, "high": 0.15} for n in names
            ],
        },
        "tuned": ((SCRIPT, TUNED),), "failed": ((SCRIPT, SCRIPT),),
    }  # fmt: skip
    return Contents(**(fields | changes))  # pyright: ignore[reportArgumentType]


STAGE = {
    "seconds": 1.5, "num_units": 3, "num_matrices": 5, "bytes_read": 1 << 20,
    "bytes_stored": 1 << 10, "peak_worker_rss_bytes": 1 << 30,
}  # fmt: skip
TUNED = {
    "rows": [
        {"name": name, "accuracy": 0.5, "trained": 9, "seconds": 1.0, "nll": None}
        for name in ("base", SCRIPT)
    ],
    "curve": [
        {"loss": 1 / i, "accuracy": 0.5, "held_out_loss": 1.1 / i} for i in range(1, 6)
    ],
    "verdict": SCRIPT, "notes": [SCRIPT], "num_test": 7, "num_train": 8,
}  # fmt: skip


def _matrix(name: str, number: int) -> MergedMatrix:
    places = np.unique(np.geomspace(1, 300 * 16, 24).round().astype(int))
    values = (1 + number / 100) / places**0.6
    return MergedMatrix(
        name=name, m=768, n=768, kept=76, energy=0.5, total=1.0 + number % len(KINDS),
        spectral=1.0, largest=float(values[0]), cut=(76, float((1 + number / 100) / 76**0.6)),
        spectrum=tuple(zip(places.tolist(), values.tolist(), strict=True)),
    )  # fmt: skip


def _outcome(k: float, names: Sequence[str]) -> dict[str, Any]:
    return {
        "k": k, "kept": {name: int(k * 100) + i for i, name in enumerate(names)},
        "energy": k**0.3, "frobenius": 1 / 3, "spectral": 0.1, "factor_bytes": int(k * 1e9),
        "store_bytes": int(k * 1e10), "num_open": 0, "certain": True,
    }  # fmt: skip
