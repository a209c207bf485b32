"""A decomposable text classifier beside dense models, on old labels and carried to novel ones."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from svdmerge.comparison.text_case import BUILDER, Case, Part
from svdmerge.core.kind.gate import GateRows
from svdmerge.core.kind.replace import GATE, projections
from svdmerge.kind.folder import Model, read
from svdmerge.kind.recipe import Training, Transfer
from svdmerge.kind.split import place_of, split
from svdmerge.kind.train import (
    Learngenes,
    classifier,
    data_config,
    gate_of_labels,
    put_state,
    settings_of,
    train,
)
from svdmerge.peers.lora import WithLora
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.training.checkpointing import load_file
from svdmerge.training.data import load_target
from svdmerge.training.fit import TRAINED
from svdmerge.training.kind.classifier import Classification
from svdmerge.training.kind.fit import fit_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The case, and how long everything trains."""

    case: Case
    out: Path
    learngenes: float = 0.5
    """Of each layer's rank; all the rest is tailors. So factors are twice a dense layer's values,
    of which a class uses those of its learngenes and its own group's tailors."""
    steps: int = 600
    transfer_steps: int = 150
    per_class: int = 16
    """Novel training texts of each label."""
    batch_size: int = 32
    learning_rate: float = 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An entrant's result: accuracies at steps, superclasses known."""

    parameters: int
    trained: int
    accuracy: Mapping[int, float]
    seconds: float

    @property
    def last(self) -> float:
        """Accuracy at the end."""
        return self.accuracy[max(self.accuracy)]


def pretrained(study: Study, seed: int) -> Outcome:
    """The gated model on the old labels."""
    return _trained(study, _section(study, study.case.old, seed=seed), f"gated-{seed}")


def dense_pretrained(study: Study, seed: int) -> Outcome:
    """A dense model of the same width on the old labels."""
    return _dense(study, study.case.old, seed=seed, name=f"dense-{seed}", start=None)


def recombined_part(study: Study, seed: int) -> Model:
    """The gated model at rest, to recombine."""
    return read(Folder.at(study.out / f"gated-{seed}"))


def entrants() -> dict[str, Callable[[Study, int], Outcome]]:
    """Ways to learn the novel labels; the first is KIND."""
    return {
        "learngenes frozen + tailors": _kind,
        "learngenes trained on + tailors": _kind_unfrozen,
        "decomposable from scratch": _scratch,
        "whole dense model, all trained": _whole,
        "whole dense model, LoRA of equal size": _lora,
        "dense from scratch": _dense_scratch,
    }


def _section(study: Study, part: Part, *, seed: int) -> Training:
    return Training(
        task="text", base_model=study.case.base, backbone=BUILDER, train=part.train, test=part.test,
        max_length=24, groups=part.groups,
        learngenes=study.learngenes, tailors=1.0 - study.learngenes,
        steps=study.steps, batch_size=study.batch_size, learning_rate=study.learning_rate,
        warmup_steps=20, measure_every=max(1, study.steps // 3), seed=seed,
    )  # fmt: skip


def _novel(study: Study, *, seed: int, freeze: str = "carried") -> Transfer:
    section = _section(study, study.case.novel, seed=seed).model_dump()
    changed = {
        "steps": study.transfer_steps,
        "measure_every": max(1, study.transfer_steps // 3),
        "per_class": study.per_class,
        "freeze": freeze,
    }
    return Transfer.model_validate(section | changed)


def _trained(
    study: Study, config: Training, name: str, learngenes: Learngenes | None = None
) -> Outcome:
    found = train(
        config, out=Folder.at(study.out / name), store=Folder.at(study.out / "store"),
        use_ray=False, on_step=_unseen, learngenes=learngenes,
    )  # fmt: skip
    return Outcome(
        parameters=found.num_parameters, trained=found.num_trained,
        accuracy=_accuracies(found.curve), seconds=found.seconds,
    )  # fmt: skip


def _kind(study: Study, seed: int) -> Outcome:
    return _carried(study, seed, freeze="carried")


def _kind_unfrozen(study: Study, seed: int) -> Outcome:
    return _carried(study, seed, freeze="nothing")


def _carried(study: Study, seed: int, *, freeze: str) -> Outcome:
    model, store = recombined_part(study, seed), Folder.at(study.out / "store")
    split(store, model)
    learngenes = Learngenes(store=store, place=place_of(model))
    config = _novel(study, seed=seed, freeze=freeze)
    return _trained(study, config, f"transfer-{freeze}-{seed}", learngenes)


def _scratch(study: Study, seed: int) -> Outcome:
    return _trained(study, _novel(study, seed=seed), f"scratch-{seed}")


def _whole(study: Study, seed: int) -> Outcome:
    name, start = f"whole-{seed}", f"dense-{seed}"
    return _dense(study, study.case.novel, seed=seed, name=name, start=start)


def _dense_scratch(study: Study, seed: int) -> Outcome:
    name = f"dense-scratch-{seed}"
    return _dense(study, study.case.novel, seed=seed, name=name, start=None)


def _lora(study: Study, seed: int) -> Outcome:
    name, start = f"lora-{seed}", f"dense-{seed}"
    size = _kind(study, seed).trained
    return _dense(study, study.case.novel, seed=seed, name=name, start=start, lora=size)


def _with_lora(model: nn.Module, *, num_values: int, seed: int) -> nn.Module:
    """LoRA on the projections, these frozen, beside vectors and head: of at most so many values."""
    names = [f"{path}.weight" for path in projections(model)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dim() < 2 or name.startswith("head"))
    left = num_values - sum(p.numel() for p in model.parameters() if p.requires_grad)
    return WithLora(model, names=names, num_values=left, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opener:
    """Opens the objective of a dense classifier that is told superclasses as the gated one is."""

    config: Training
    start: Path | None
    lora: int | None

    def __call__(self) -> Classification:
        base = open_checkpoint(self.config.base_model)
        target = load_target(data_config(self.config), base=base)
        gate = gate_of_labels(self.config.groups)
        model = classifier(self.config, base=base, target=target, gate=gate)
        if self.start is not None:
            kept = load_file(Folder.at(self.start), TRAINED)["model"]
            own = model.state_dict()
            same = {k: v for k, v in kept.items() if k in own and own[k].shape == v.shape}
            model.load_state_dict(own | same)
        if self.lora is not None:
            model = _with_lora(model, num_values=self.lora, seed=self.config.seed)
        model.add_module(GATE, GateRows(gate))
        return Classification(model, train=target.train, test=target.test)


def _dense(
    study: Study, part: Part, *, seed: int, name: str, start: str | None, lora: int | None = None
) -> Outcome:
    is_novel = part is study.case.novel
    config = _novel(study, seed=seed) if is_novel else _section(study, part, seed=seed)
    opener = _Opener(config=config, start=None if start is None else study.out / start, lora=lora)
    state = fit_kind(
        opener, settings=settings_of(config), folder=Folder.at(study.out / name), use_ray=False,
        on_step=_unseen,
    )  # fmt: skip
    model = opener().model()
    put_state(model, state)
    return Outcome(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        accuracy=_accuracies(state["curve"]),
        seconds=state["seconds"],
    )


def _accuracies(curve: Sequence[Mapping[str, float]]) -> dict[int, float]:
    return {int(p["step"]): p["test_accuracy"] for p in curve if "test_accuracy" in p}


def interval(values: Sequence[float]) -> str:
    """Mean and the range over seeds, in percent."""
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * statistics.mean(values):.1f} ({low:.1f} to {high:.1f})"


def quick(study: Study) -> Study:
    """The same with a few steps: whether everything runs."""
    return replace(study, steps=4, transfer_steps=3, per_class=2)


def one_thread() -> None:
    """Take one core."""
    torch.set_num_threads(1)


def _unseen(step: int) -> None:
    del step
