"""Tables: what they hold, and that long names fold instead of being cut."""

import json
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table

from svdmerge.engine.whatif import Outcome
from svdmerge.report.run_report import RunReport, StageReport
from svdmerge.tables import run_tables, size, table, verify_table, whatif_table
from svdmerge.training.result import Row
from svdmerge.verify import Check


def shown(*tables: Table, width: int = 80) -> str:
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as capture:
        for made in tables:
            console.print(made)
    return capture.get()


@pytest.mark.parametrize(
    ("num", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (1 << 40, "1.0 TiB")],
)
def test_sizes_are_told_in_binary_units(num: int, text: str) -> None:
    assert size(num) == text


def test_long_names_fold_and_nothing_is_lost() -> None:
    name = "s3://bucket/" + "very-long-name/" * 10 + "end"
    text = shown(table("t", columns=("source", "num"), rows=[(name, 3)]))
    assert max(len(line) for line in text.splitlines()) <= 80
    words = "".join(line.split()[0] for line in text.splitlines()[2:] if line.split())
    assert words == name


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    console = Console(width=80, markup=False)
    with console.capture() as capture:
        console.print(table("t", columns=("claim",), rows=[("experts[0] [bold]x[/bold]",)]))
    assert "experts[0] [bold]x[/bold]" in capture.get()


def test_a_runs_tables_show_stages_and_what_was_kept() -> None:
    report = RunReport(plan_hash="h", out="o", store="s")
    assert run_tables(report) == []
    report.stages.append(StageReport(name="decompose", num_units=3, seconds=1.25, num_matrices=9))
    report.kept = {"ft-a": 4}
    text = shown(*run_tables(report))
    assert "decompose" in text
    assert "ft-a" in text
    assert "1.2" in text


def test_a_language_targets_rows_are_shown_in_nats_per_token() -> None:
    row = Row(
        name="tuned", accuracy=0.5, trained=8, trained_with_head=8, seconds=1.0, loo_error=None,
        nll=2.0, perplexity=7.389,
    )  # fmt: skip
    report = RunReport(plan_hash="", out="", store="", tune=SimpleNamespace(rows=(row,)))
    text = shown(*run_tables(report))
    assert "nats" in text
    assert "2.0000" in text
    assert "7.389" in text


def test_a_report_is_json_that_reads_back() -> None:
    report = RunReport(plan_hash="h", out="o", store="s", status="done")
    report.stages.append(StageReport(name="select", num_units=0, seconds=0.5))
    told = json.loads(report.to_json())
    assert told["status"] == "done"
    assert told["stages"][0]["name"] == "select"
    assert told["tune"] is None


def test_whatif_shows_budgets_side_by_side_and_what_is_uncertain() -> None:
    outcomes = [
        Outcome(
            k=16, kept={"a": 10, "b": 6}, energy=0.5, frobenius=12.345, spectral=3.5,
            factor_bytes=2048, store_bytes=8192, num_open=0,
        ),
        Outcome(
            k=0.2, kept={"a": 12, "b": 9}, energy=0.75, frobenius=6.0, spectral=1.25,
            factor_bytes=4096, store_bytes=8192, num_open=2,
        ),
    ]  # fmt: skip
    text = shown(whatif_table(outcomes))
    told = ("16", "0.2", "50.0%", "75.0%", "12.3", "1.25", "2.0 KiB", "8.0 KiB", "yes", "12")
    for word in (*told, "deepen first"):
        assert word in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_claims_that_did_not_hold_stand_out() -> None:
    text = shown(verify_table([Check(claim="files", held=False, detail="model: missing")]))
    assert "FAILED" in text
    assert "model: missing" in text
