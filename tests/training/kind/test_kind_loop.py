import pytest
import torch
from kind_cases import Toy

from svdmerge.errors import TrainingError
from svdmerge.storage.filesystem import Folder
from svdmerge.training.checkpointing import FolderCheckpoints
from svdmerge.training.kind.loop import KindLoop, train_kind
from svdmerge.training.kind.objective import Settings
from svdmerge.training.loop import Group

SETTINGS = Settings(steps=20, batch_size=5, learning_rate=0.01, ema=0.5, measure_every=10)
CPU = torch.device("cpu")


def trained(folder, settings=SETTINGS, group=None, stop=None):
    loop = KindLoop(Toy(), settings=settings, group=group or Group(), device=CPU)

    def told(loop):
        if loop.epoch == stop:
            raise KeyboardInterrupt

    return loop, train_kind(loop, checkpoints=FolderCheckpoints(folder), on_step=told)


def test_training_lowers_the_loss_and_measures_averaged_weights_when_due(tmp_path):
    loop, state = trained(Folder.at(tmp_path))
    losses = [p["loss"] for p in state["curve"] if "loss" in p]
    assert losses[-1] < 0.5 * losses[0]
    assert [p["step"] for p in state["curve"] if "mean" in p] == [10, 20]
    averaged = loop.averaged()
    model = Toy().model()
    model.load_state_dict(averaged)
    expected = next(p["mean"] for p in reversed(state["curve"]) if "mean" in p)
    assert Toy().measure(model, step=0)["mean"] == pytest.approx(expected, rel=1e-6)
    assert not torch.equal(averaged["head.weight"], state["model"]["head.weight"])


def test_a_resumed_training_ends_in_the_bits_of_one_that_was_never_cut(tmp_path):
    whole = trained(Folder.at(tmp_path / "whole"))[1]
    settings = Settings(
        steps=20, batch_size=5, learning_rate=0.01, ema=0.5, measure_every=10,
        checkpoint_every_s=0.0,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trained(Folder.at(tmp_path / "cut"), settings, stop=7)
    state = trained(Folder.at(tmp_path / "cut"), settings)[1]
    assert state["resumes"] == 1
    assert state["curve"] == whole["curve"]
    for name, value in whole["model"].items():
        assert torch.equal(value, state["model"][name]), name


def test_a_diverged_training_says_what_to_lower(tmp_path):
    loop = KindLoop(Toy(scale=float("inf")), settings=SETTINGS, group=Group(), device=CPU)
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        loop.run_step()
