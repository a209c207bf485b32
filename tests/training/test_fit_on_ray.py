"""Training under Ray Train: the numbers of one process, although a worker is killed.

Real: Ray, its workers, gloo, FSDP, SIGKILL, checkpoints on disk. Made up: the model and the data.
"""

from pathlib import Path

import pytest
import torch
from tune_case import Case, make_case

from svdmerge.storage.filesystem import Folder
from svdmerge.training.checkpointing import State, load_file


@pytest.fixture(autouse=True)
def quick_ray_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses noticed at once; they are looked for every two seconds by default."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")


def trained(case: Case, run: str) -> State:
    [path] = (case.root / run / "tune").glob("*/trained.pt")
    return load_file(Folder.at(path.parent), path.name)


def assert_close(a: State, b: State) -> None:
    """Equal up to the rounding of sums taken in another order."""
    assert a["sigma_change"].keys() == b["sigma_change"].keys()
    for name, change in a["sigma_change"].items():
        torch.testing.assert_close(change, b["sigma_change"][name], rtol=1e-3, atol=1e-4)
    for name, values in a["head"].items():
        torch.testing.assert_close(values, b["head"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("ray_session")
def test_two_workers_with_halved_weights_and_one_killed_end_with_the_numbers_of_one_process(
    tmp_path: Path,
) -> None:
    marker = tmp_path / "marker"
    # One step while the layers are probed, then five an epoch: dies within the third epoch.
    case = make_case(
        tmp_path, config={"kill_marker": str(marker), "kill_at_step": 13, "pause_s": 3.0}
    )
    # 36 examples in batches of 8: the last one is of 4, so the workers' parts differ in size too.
    config = case.config(num_workers=2, shard=True)
    seen: list[tuple[str, int, int]] = []
    result = case.tune(
        config, run="together", out="a", use_ray=True, on_progress=lambda *step: seen.append(step)
    )
    assert marker.exists()
    state = trained(case, "together")
    assert state["resumes"] == 1
    assert result.resumed
    assert len(result.curve) == state["epoch"] == 4
    assert seen[-1] == ("tune", 4, 4)
    alone = case.tune(config, run="alone", out="b")
    assert not alone.resumed
    assert_close(state, trained(case, "alone"))
    # One example of 90 may fall on the other side by rounding.
    assert [r.accuracy for r in result.rows] == pytest.approx(
        [r.accuracy for r in alone.rows], abs=0.012
    )
