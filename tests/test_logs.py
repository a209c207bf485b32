"""Logs: JSON by choice, one object a line and nothing else; warnings alone by default."""

import json
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from merging import Bench, micro_bench
from typer.testing import CliRunner

from svdmerge import logs
from svdmerge.cli import app


@pytest.fixture(autouse=True)
def quiet_again() -> Generator[None]:
    """No handler of a test outlives it: its standard error is closed then."""
    yield
    for handler in [*logs.ROOT.handlers]:
        logs.ROOT.removeHandler(handler)
    logs.ROOT.setLevel(logging.NOTSET)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return micro_bench(tmp_path)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_logs_its_steps_and_its_end_as_json_and_nothing_else(bench: Bench) -> None:
    command = ["--log-format", "json", "run", str(bench.write_recipe()), "--address", "none"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0
    told = lines(done.stderr)
    assert {"inventory", "decompose", "merge", "write"} <= {t.get("step") for t in told}
    assert all({"time", "level", "logger", "message"} <= set(t) for t in told)
    end = told[-1]
    assert (end["status"], end["level"]) == ("done", "info")
    assert end["plan_hash"] == json.loads(done.stdout)["plan_hash"]


def test_the_environment_chooses_too_and_errors_are_json(tmp_path: Path) -> None:
    environment = {"SVDMERGE_LOG_FORMAT": "json"}
    missing = str(tmp_path / "no.yml")
    done = CliRunner().invoke(app, ["run", missing], env=environment)
    assert done.exit_code == 2
    (told,) = lines(done.stderr)
    assert (told["level"], told["exit_code"]) == ("error", 2)
    assert "no.yml" in told["message"]


def test_by_default_only_warnings_are_told_as_lines(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("text")
    logging.getLogger("svdmerge.engine.tally").info("a step")
    logging.getLogger("svdmerge.engine.tally").warning("%s: tried again", "unit")
    assert capsys.readouterr().err == "unit: tried again\n"


def test_a_traceback_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("svdmerge.x").exception("it failed", extra={"unit": Path("a")})
    (told,) = lines(capsys.readouterr().err)
    assert told["traceback"].endswith("ValueError: bad")
    assert told["unit"] == "a"
