"""Death at any moment: the same command again ends with an undisturbed run's bytes.

Real: the process, its SIGKILL or `os._exit`, the filesystem. Not shown: a machine that loses power.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from merging import Bench, command, micro_bench, outcome, tiny_bench, tree

from svdmerge.storage import maintenance
from svdmerge.storage.filesystem import Folder

# Dies before the n-th change to the filesystem below a folder, then says so by its exit code. The
# audit hook sees what Python does before the kernel does it. Forked, for importing torch is slow.
CRASHING = """
import json, os, shutil, sys
from pathlib import Path
from svdmerge.recipe import parse_recipe
from svdmerge.workflow import run
import svdmerge.engine.tasks, pyarrow.parquet, torch
torch.set_num_threads(1)
CHANGES = {"os.rename", "os.link", "shutil.rmtree"}
raw, root, first = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

def crash_before(number):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in CHANGES and str(args[0]).startswith(root):
            seen += 1
            if seen == number:
                os._exit(77)
    sys.addaudithook(hook)

def in_a_child(work):
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def reset():
    for name in ("store", "out"):
        shutil.rmtree(Path(root, name), ignore_errors=True)
    if first.exists():
        shutil.copytree(first, Path(root, "out"))

def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(Path(folder).rglob("*")) if p.is_file()}

work = lambda: run(parse_recipe(raw), address="none")
reset()
assert in_a_child(work) == 0
expected, faults, number = files(Path(root, "out")), [], 0
while True:
    number += 1
    reset()
    code = in_a_child(lambda: (crash_before(number), work()))
    if code == 0:
        break
    if code != 77:
        faults.append(f"{number}: first run exited {code}")
    half = Path(root, "out")
    if half.exists() and files(half) not in (expected, files(first) if first.exists() else {}):
        faults.append(f"{number}: a half-written output was readable")
    kept = {k: v for k, v in files(Path(root, "store")).items() if k.startswith("com")
            and not k.endswith(".partial")} if Path(root, "store").exists() else {}
    if (code := in_a_child(work)) != 0:
        faults.append(f"{number}: second run exited {code}")
        continue
    if files(Path(root, "out")) != expected:
        faults.append(f"{number}: another output")
    after = files(Path(root, "store"))
    if any(after.get(name) != data for name, data in kept.items()):
        faults.append(f"{number}: a stored object changed")
print(json.dumps({"deaths": number - 1, "faults": faults}))
"""


def test_dying_before_any_file_appears_or_vanishes_loses_nothing(tmp_path: Path) -> None:
    """Every rename, link and removal, down to those that put the output in an earlier one's place.

    At each of them what is being written lies finished under a name that nobody reads.
    """
    bench = micro_bench(tmp_path / "work", num_sources=1)
    earlier = tmp_path / "earlier"
    bench.run(parameters={"k": 1}, store=str(tmp_path / "other-store"), out=str(earlier))
    raw = json.dumps(bench.raw(max_shard_size="1KB"))  # three shards and an index
    done = subprocess.run(
        [sys.executable, "-c", CRASHING, raw, str(bench.root), str(earlier)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["faults"] == [], done.stderr[-3000:]
    assert told["deaths"] > 18


def commits(bench: Bench) -> dict[str, str]:
    """sha256 of every commit and of every object a commit names."""
    store = Folder.at(bench.store)
    named = {e.path for _, c in maintenance._commits(store) for e in maintenance.objects(c)}
    return {
        name: sha
        for name, sha in tree(bench.store).items()
        if name in named or (name.startswith("commits/") and name.endswith(".json"))
    }


def start(recipe: Path, address: str) -> subprocess.Popen[bytes]:
    """The command in a session of its own, so that all it started can be ended."""
    program = [sys.executable, "-c", "from svdmerge.cli import main; main()"]
    return subprocess.Popen(
        [*program, "run", str(recipe), "--address", address],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def kill_and_run_again(bench: Bench, *, address: str, kills: int, seed: int) -> list[str]:
    """Moments of death and what was stored by then. Commits only ever grow."""
    recipe = bench.write_recipe()
    begin = time.perf_counter()
    assert command("run", recipe, "--address", address).returncode == 0
    seconds, expected = time.perf_counter() - begin, outcome(bench.out)
    again = Bench(root=bench.root / "again", base=bench.base, sources=bench.sources)
    again.root.mkdir()
    recipe = again.write_recipe()

    draw, told = random.Random(seed), list[str]()
    before: dict[str, str] = {}
    while len(told) < kills:
        # From the moment imports are done, more or less, to the end.
        moment = seconds * draw.uniform(0.6, 1.0)
        process = start(recipe, address)
        time.sleep(moment)
        ended = process.poll() is not None
        process.kill()  # SIGKILL
        process.wait()
        now = commits(again)
        assert before.items() <= now.items(), "a committed unit was lost or changed"
        before = now
        if again.out.exists():
            assert outcome(again.out) == expected
        if ended:  # no kill: it was faster than the first. A finished run has no moments left.
            assert process.returncode == 0
            seconds, before = moment, {}
            shutil.rmtree(again.out)
            shutil.rmtree(again.store)
            continue
        told.append(f"{len(told) + 1}: {moment:.2f} s, {len(now)} objects")
    assert command("run", recipe, "--address", address).returncode == 0
    assert outcome(again.out) == expected
    assert before.items() <= commits(again).items()
    assert maintenance.verify(Folder.at(again.store)) == []
    return told


def test_a_command_killed_at_random_moments_ends_with_an_undisturbed_runs_bytes(
    tmp_path: Path,
) -> None:
    told = kill_and_run_again(tiny_bench(tmp_path, num_sources=6), address="none", kills=6, seed=1)
    print(*told, sep="\n")  # noqa: T201  read with pytest -s


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_driver_on_ray_killed_twenty_times_ends_with_an_undisturbed_runs_bytes(
    tmp_path: Path,
) -> None:
    """On the zoo if there is one: workers outlive the driver for a while and commit, or do not."""
    zoo = os.environ.get("SVDMERGE_ZOO")
    if zoo:
        models = sorted(p for p in Path(zoo).iterdir() if (p / "model.safetensors").exists())
        base = next(p for p in models if p.name == "base")
        sources = tuple(p for p in models if p.name != "base")
        bench = Bench(root=tmp_path, base=base, sources=sources)
    else:
        bench = tiny_bench(tmp_path, num_sources=8)
    told = kill_and_run_again(bench, address="local", kills=20, seed=2)
    print(*told, sep="\n")  # noqa: T201  read with pytest -s
