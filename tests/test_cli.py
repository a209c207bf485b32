"""The command line: flags, exit codes, clean JSON, short errors, and a quick start."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from merging import Bench, command, micro_bench, micro_model, outcome, tree
from typer.main import get_command
from typer.testing import CliRunner, Result

from svdmerge.cli import app

FLAGS = {
    "demo": ["--address", "--json", "--out", "--verbose", "-v"],
    "plan": ["--deep", "--json", "--verbose", "-v", "RECIPE"],
    "run": ["--address", "--json", "--max-shard-size", "--verbose", "-v", "RECIPE"],
    "decompose": ["--address", "--json", "--verbose", "-v", "RECIPE"],
    "select": ["--address", "--json", "--verbose", "-v", "RECIPE"],
    "assemble": ["--address", "--json", "--max-shard-size", "--verbose", "-v", "RECIPE"],
    "tune": ["--address", "--json", "--verbose", "-v", "RECIPE"],
    "tick": ["--address", "--json", "--verbose", "--watch", "-v", "RECIPE"],
    "rollback": ["--json", "--verbose", "-v", "N", "RECIPE"],
    "releases": ["--json", "--verbose", "-v", "RECIPE"],
    "rank": ["--address", "--examples", "--json", "--verbose", "-v", "RECIPE"],
    "adapter export": [
        "--base",
        "--factors",
        "--format",
        "--json",
        "--merged",
        "--model",
        "--rank",
        "--to",
        "--verbose",
        "-v",
        "FOLDER",
    ],
    "whatif": [
        "--json",
        "--k",
        "--salience",
        "--scope",
        "--sources",
        "--verbose",
        "-v",
        "--without",
        "RECIPE",
    ],
    "verify": ["--json", "--verbose", "-v", "OUT"],
    "push": [
        "--dry-run",
        "--json",
        "--private",
        "--revision",
        "--verbose",
        "-v",
        "OUT",
        "REPO",
    ],
    "report": ["--json", "--verbose", "-v", "OUT"],
    "schema": ["--json", "--verbose", "-v"],
    "import-mergekit": ["--base", "--json", "--verbose", "-v", "FILE"],
    "store ls": ["--json", "--verbose", "-v", "STORE"],
    "store verify": ["--json", "--verbose", "-v", "STORE"],
    "kind train": ["--address", "--json", "--verbose", "-v", "CONFIG"],
    "kind split": ["--address", "--json", "--verbose", "-v", "CONFIG"],
    "kind recombine": ["--json", "--verbose", "-v", "CONFIG"],
    "kind transfer": ["--address", "--json", "--verbose", "-v", "CONFIG"],
    "kind demo": ["--address", "--json", "--out", "--verbose", "-v"],
    "store gc": ["--json", "--older-than-hours", "--verbose", "-v", "STORE"],
}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return micro_bench(tmp_path)


def svdmerge(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def result(*arguments: str | Path) -> Any:
    """What a command prints with --json, which must be all it prints."""
    done = svdmerge(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_commands_and_their_flags_are_frozen() -> None:
    found: dict[str, list[str]] = {}

    def walk(commands: dict[str, Any], prefix: str) -> None:
        for name, made in commands.items():
            if hasattr(made, "commands"):
                walk(made.commands, f"{prefix}{name} ")
                continue
            found[f"{prefix}{name}"] = sorted(
                flag
                for p in made.params
                for flag in ([p.metavar] if p.param_type_name == "argument" else p.opts)
            )

    walk(get_command(app).commands, "")  # type: ignore[attr-defined]
    assert found == {name: sorted(flags) for name, flags in FLAGS.items()}


@pytest.mark.parametrize("name", ["", *FLAGS])
def test_every_command_explains_itself(name: str) -> None:
    done = svdmerge(*name.split(), "--help")
    assert done.exit_code == 0
    assert "Usage:" in done.stdout


# --- a quick start ---

LOADED = """
import sys
from svdmerge.cli import main
sys.argv = ["svdmerge", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded", *sorted({"torch", "ray", "transformers", "jaxtyping"} & set(sys.modules)))
"""


@pytest.mark.parametrize("flags", [["--help"], ["plan", "--json"], ["plan"], ["tick"]])
def test_what_computes_nothing_loads_neither_torch_nor_ray(bench: Bench, flags: list[str]) -> None:
    if "--help" not in flags:
        flags = [*flags, str(bench.write_recipe())]
    if "tick" in flags:
        assert svdmerge(*flags, "--address", "none").exit_code == 0
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded"


# --- tick ---


def test_tick_releases_rollback_and_their_list_as_commands(bench: Bench) -> None:
    recipe = bench.write_recipe(models=[f"{bench.root}/source-*"])
    first = result("tick", recipe, "--address", "none")
    assert (first["status"], first["release"]["n"]) == ("released", 1)
    assert first["run"]["status"] == "done"
    micro_model(bench.root / "source-9", seed=9, base=bench.base)
    assert svdmerge("tick", recipe, "--address", "none").exit_code == 0
    assert result("rollback", recipe)["release"]["n"] == 3
    assert [r["n"] for r in result("releases", recipe)] == [1, 2, 3]
    assert "rollback to release 1" in svdmerge("releases", recipe).stdout.replace("\n", " ")
    assert result("tick", recipe)["status"] == "held"
    (bench.root / "source-0").mkdir()
    refused = svdmerge("tick", recipe)
    assert refused.exit_code == 1
    assert "refused" in refused.stdout


def test_a_watch_goes_on_after_a_failure_until_it_is_interrupted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, pauses = bench.write_recipe(), list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 1:
            (bench.base / "config.json").unlink()
            (bench.base / "model.safetensors").rename(bench.base / "away")
        elif len(pauses) == 2:
            (bench.base / "away").rename(bench.base / "model.safetensors")
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr("svdmerge.cli.time.sleep", sleep)
    done = svdmerge("tick", recipe, "--watch", "30", "--address", "none")
    assert done.exit_code == 130
    assert pauses == [30.0] * 3
    assert done.stdout.count("released: ") == 2
    assert "holds no weights" in done.stderr


# --- exit codes, errors, results ---


def test_a_run_prints_one_json_on_standard_output_and_progress_elsewhere(bench: Bench) -> None:
    done = command("run", bench.write_recipe(), "--address", "none", "--json")
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert told["status"] == "done"
    assert [s["name"] for s in told["stages"]] == ["decompose", "select", "merge", "write"]
    assert sum(told["kept"].values()) > 0
    assert told["out"] == str(bench.out)
    assert "decompose" in done.stderr
    again = command("run", bench.write_recipe(), "--address", "none", "--json")
    assert json.loads(again.stdout)["status"] == "unchanged"


def test_a_run_on_ray_prints_one_json(bench: Bench, ray_session: None) -> None:
    told = result("run", bench.write_recipe())
    assert told["status"] == "done"
    assert told["stages"][0]["num_units"] == len(bench.sources)


def test_a_run_for_people_fits_eighty_columns(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    recipe = bench.write_recipe()
    for arguments in (
        ["plan", recipe],
        ["run", recipe, "--address", "none"],
        ["whatif", recipe, "--k", "1,2,50%"],
        ["verify", bench.out],
        ["store", "ls", bench.store],
        ["store", "verify", bench.store],
    ):
        done = svdmerge(*arguments)
        assert done.exit_code == 0, done.stderr
        assert done.stdout.strip()
        assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_the_stages_as_commands_give_what_run_gives(bench: Bench) -> None:
    recipe = bench.write_recipe()
    for stage in ("decompose", "select", "assemble"):
        assert svdmerge(stage, recipe, "--address", "none").exit_code == 0
    staged = outcome(bench.out)
    bench.run(store=str(bench.root / "fresh"), out=str(bench.root / "fresh-out"))
    assert outcome(bench.root / "fresh-out") == staged


def test_a_failed_run_exits_1_with_at_most_three_lines(bench: Bench) -> None:
    micro_model(bench.sources[0], seed=1, **{"a.bias": torch.full((24,), float("nan"))})
    done = svdmerge("run", bench.write_recipe(), "--address", "none")
    assert done.exit_code == 1
    lines = [line for line in done.stderr.splitlines() if not line.endswith(" done")]
    assert lines[0].startswith("error: ")
    assert len(lines) <= 3
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_verbose_shows_the_traceback(bench: Bench) -> None:
    recipe = bench.write_recipe(base_model=str(bench.root / "gone"))
    done = command("plan", recipe, "-v")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "CheckpointError" in done.stderr
    quiet = command("plan", recipe)
    assert quiet.returncode == 1
    assert "Traceback" not in quiet.stderr


@pytest.mark.parametrize(
    "arguments",
    [["plan"], ["plan", "missing.yml"], ["nonsense"], ["run", "--adress", "none"], ["whatif"]],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert svdmerge(*arguments).exit_code == 2


@pytest.mark.parametrize("k", ["0", "-1", "ten", "120%", "", "3,,4"])
def test_budgets_that_are_none_are_wrong_usage(bench: Bench, k: str) -> None:
    done = svdmerge("whatif", bench.write_recipe(), f"--k={k}")
    assert done.exit_code == 2
    assert "--k" in done.stderr


def test_an_interrupted_run_says_that_it_can_go_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("svdmerge.workflow.Run.all", interrupt)
    done = svdmerge("run", bench.write_recipe(), "--address", "none")
    assert done.exit_code == 130
    assert "goes on from there" in done.stderr


def test_plan_prints_what_happens_to_every_tensor(bench: Bench) -> None:
    told = result("plan", bench.write_recipe())
    actions = {t["name"]: t["action"] for t in told["tensors"]}
    assert actions == {
        "a.bias": "average", "a.weight": "decompose", "b.weight": "decompose", "steps": "equal",
    }  # fmt: skip
    assert not bench.store.exists()


def test_whatif_tells_what_run_keeps_at_that_budget(bench: Bench) -> None:
    svdmerge("run", bench.write_recipe(), "--address", "none")
    two, share = result("whatif", bench.write_recipe(), "--k", "2,50%")
    assert result(
        "run", bench.write_recipe(parameters={"k": 2}), "--address", "none"
    )["kept"] == two["kept"]  # fmt: skip
    assert result(
        "run", bench.write_recipe(parameters={"k": "50%"}), "--address", "none"
    )["kept"] == share["kept"]  # fmt: skip


# --- verify ---


def test_verify_holds_on_a_fresh_output_and_exits_1_where_a_claim_does_not(bench: Bench) -> None:
    bench.run()
    assert all(check["held"] is not False for check in result("verify", bench.out))
    data = bytearray((bench.out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (bench.out / "model.safetensors").write_bytes(data)
    done = svdmerge("verify", bench.out, "--json")
    assert done.exit_code == 1
    assert [c["claim"] for c in json.loads(done.stdout) if not c["held"]] != []
    assert "FAILED" in svdmerge("verify", bench.out).stdout


def test_verify_of_a_folder_that_is_no_output_exits_1(tmp_path: Path) -> None:
    done = svdmerge("verify", tmp_path)
    assert done.exit_code == 1
    assert str(tmp_path) in done.stderr


# --- store ---


def test_store_ls_lists_each_source_once(bench: Bench) -> None:
    bench.run()
    rows = result("store", "ls", bench.store)
    plan = bench.plan()
    assert [r["source"] for r in rows] == sorted(s.revision for s in plan.sources)
    assert {r["base"] for r in rows} == {plan.base_key}
    assert {r["num_commits"] for r in rows} == {1}
    # Whole blocks of both matrices (ranks 18 and 9), and one flat vector.
    assert {r["num_components"] for r in rows} == {16 + 9 + 1}
    named = sum(p.stat().st_size for p in (bench.store / "components").rglob("*.arrow"))
    assert sum(r["size_bytes"] for r in rows) == named


def test_store_ls_of_nothing_is_empty(tmp_path: Path) -> None:
    assert result("store", "ls", tmp_path) == []


@pytest.mark.parametrize("work", ["ls", "verify", "gc"])
def test_a_store_that_does_not_exist_is_told(tmp_path: Path, work: str) -> None:
    done = svdmerge("store", work, tmp_path / "none")
    assert done.exit_code == 2
    assert f"{tmp_path / 'none'}: does not exist" in done.stderr


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_store_verify_names_what_is_damaged(bench: Bench, damage: str) -> None:
    bench.run()
    assert result("store", "verify", bench.store) == {"faults": []}
    shard = next((bench.store / "components").rglob("*.arrow"))
    if damage == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    done = svdmerge("store", "verify", bench.store, "--json")
    assert done.exit_code == 1
    faults = json.loads(done.stdout)["faults"]
    assert len(faults) == 1
    assert shard.name in faults[0]


def test_store_gc_removes_orphans_and_spares_the_young_and_the_committed(bench: Bench) -> None:
    bench.run()
    committed = tree(bench.store)
    folder = next((bench.store / "components").rglob("*.arrow")).parent
    old, young = folder / "0-15-00000000000000aa.arrow", folder / "0-15-00000000000000bb.arrow"
    half = bench.store / "commits/.tmpabc.partial"
    scratch = bench.store / "scratch/20260101T000000/0/given-0"
    scratch.parent.mkdir(parents=True)
    for path in (old, young, half, scratch):
        path.write_bytes(b"of a task that was killed")
    long_ago = time.time() - 48 * 3600
    for path in (old, half, scratch, *(bench.store / name for name in committed)):
        os.utime(path, (long_ago, long_ago))
    told = result("store", "gc", bench.store)
    assert sorted(told["removed"]) == sorted(
        str(p.relative_to(bench.store)) for p in (old, half, scratch)
    )
    assert tree(bench.store).keys() == committed.keys() | {str(young.relative_to(bench.store))}
    assert result("store", "gc", bench.store, "--older-than-hours", "0")["removed"] == [
        str(young.relative_to(bench.store))
    ]
    assert tree(bench.store) == committed
    assert bench.run().status == "unchanged"


def test_store_gc_removes_orphans_among_merged_factors(bench: Bench) -> None:
    bench.run()
    committed = tree(bench.store)
    folder = next((bench.store / "runs").rglob("factors/*.arrow")).parent
    (folder / "00000000000000aa-00000000000000bb.arrow").write_bytes(b"of a second attempt")
    (removed,) = result("store", "gc", bench.store, "--older-than-hours", "0")["removed"]
    assert removed.endswith("factors/00000000000000aa-00000000000000bb.arrow")
    assert tree(bench.store) == committed
    assert result("store", "verify", bench.store) == {"faults": []}


def test_orphans_change_nothing(bench: Bench) -> None:
    bench.run()
    first = outcome(bench.out)
    for shard in (bench.store / "components").rglob("*.arrow"):
        name = shard.name.split("-")
        (shard.parent / f"{name[0]}-{name[1]}-ffffffffffffffff.arrow").write_bytes(b"orphan")
    bench.run(parameters={"k": 2})
    bench.run()
    assert outcome(bench.out) == first
    assert result("store", "verify", bench.store) == {"faults": []}


def test_tensors_a_run_leaves_out_are_told(bench: Bench) -> None:
    extra = tiny.read_model(bench.sources[0]) | {"classifier.weight": torch.ones(2, 2)}
    tiny.write_model(bench.sources[0], extra)
    told = result("run", bench.write_recipe(), "--address", "none")
    assert "classifier.weight" in told["warnings"][0]
    planned = result("plan", bench.write_recipe())
    told = {"kind": "extra", "told": "the base lacks it: left out"}
    assert planned["unlike"] == {str(bench.sources[0]): {"classifier.weight": told}}
