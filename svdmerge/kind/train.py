"""Train a decomposable classifier, or train on from the learngenes of another."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from svdmerge.core.kind.blueprint import Blueprint
from svdmerge.core.kind.gate import ClassGate, from_hierarchy, gate_of, gate_rows
from svdmerge.core.kind.replace import Spec, decomposable
from svdmerge.errors import RecipeError
from svdmerge.kind.folder import Model, as_example, check_free, plain, write
from svdmerge.kind.recipe import Pace, Training, Transfer
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.storage.decomposed import Place, StoredModel
from svdmerge.storage.filesystem import Folder
from svdmerge.training.adapter import absolute
from svdmerge.training.backbone import Backbone, build_backbone, load_weights
from svdmerge.training.checkpointing import State
from svdmerge.training.data import Target, load_target
from svdmerge.training.features import extract
from svdmerge.training.kind.classifier import BUILDER, Classification, check_labels
from svdmerge.training.kind.fit import fit_kind
from svdmerge.training.kind.objective import Settings
from svdmerge.training.kind.transfer import FACTORS, carry, freeze, num_trainable

# Inputs of the batch that a model's cost is measured on.
EXAMPLE_ROWS = 8
HEAD = "head."


@dataclass(frozen=True, slots=True, kw_only=True)
class Learngenes:
    """Where a stored model's learngenes lie."""

    store: Folder
    place: Place

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Learngenes' factors and all that is no factor; and each layer's number of learngenes.

        No tailor is read.
        """
        stored = StoredModel.load(self.store, self.place)
        sizes = {path: own[0] for path, own in stored.blueprint.layers.items()}
        state = stored.rest()
        for path, count in sizes.items():
            c = stored.components(path, range(count))
            state |= {f"{path}.{n}": v for n, v in zip(FACTORS, (c.u, c.s, c.vh), strict=True)}
        return state, sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What training came to."""

    out: str
    num_parameters: int
    num_trained: int
    steps: int
    seconds: float
    resumes: int
    test_accuracy: float
    """With each example's superclass known."""
    test_loss: float
    curve: list[dict[str, float]]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def train(
    config: Training,
    *,
    out: Folder,
    store: Folder,
    use_ray: bool,
    on_step: Callable[[int], None],
    learngenes: Learngenes | None = None,
) -> TrainResult:
    """What training came to; the model, its weights averaged where asked, is in `out`.

    With `learngenes`, these are carried over and the tailors start afresh. Checkpoints lie in the
    store: the same call again resumes.

    Raises:
        RecipeError: groups, ranks or labels do not fit; told before training.
        TrainingError: examples cannot be used, or training failed.
        OutputError: `out` holds something else.
    """
    check_free(out)
    base = open_checkpoint(config.base_model)
    target = load_target(data_config(config), base=base)
    opener = partial(open_classification, _anywhere(config), learngenes=learngenes)
    objective = opened(config, base=base, target=target, learngenes=learngenes)
    model = objective.model()
    frozen = learngenes is not None and _freezes(config)
    num_trained = num_trainable(model, frozen_learngenes=frozen)
    state = fit_kind(
        opener,
        settings=settings_of(config),
        folder=store.child(f"runs/kind-{_key(config, base=base, target=target, of=learngenes)}"),
        use_ray=use_ray,
        on_step=on_step,
        search_path=config.backbone,
    )
    put_state(model, state)
    measured = objective.tested(model.eval())
    result = TrainResult(
        out=out.uri,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=num_trained,
        steps=state["epoch"],
        seconds=state["seconds"],
        resumes=state["resumes"],
        test_accuracy=measured["test_accuracy"],
        test_loss=measured["test_loss"],
        curve=state["curve"],
        notes=target.notes,
    )
    rows = range(min(EXAMPLE_ROWS, len(target.test)))
    at_rest = Model(
        blueprint=_architecture(config, base=base, model=model).of(model),
        state=model.state_dict(),
        example=as_example(target.test.batch(rows)),
    )
    write(out, at_rest, result=result.to_json())
    return result


def _anywhere(config: Training) -> Training:
    """The configuration with places as every process understands them: workers have another
    working directory."""
    named = ("base_model", "train", "test")
    return config.model_copy(update={name: absolute(getattr(config, name)) for name in named})


def _freezes(config: Training) -> bool:
    return isinstance(config, Transfer) and config.freeze == "carried"


def put_state(model: nn.Module, state: State) -> None:
    """The trained values put into a model like the one that was trained: averaged ones, if any."""
    model.load_state_dict(state["model"])
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, average in zip(trained, state["average"], strict=False):
            parameter.copy_(average)


def open_classification(config: Training, *, learngenes: Learngenes | None) -> Classification:
    """The objective, opened in any process from the places in its configuration."""
    base = open_checkpoint(config.base_model)
    target = load_target(data_config(config), base=base)
    return opened(config, base=base, target=target, learngenes=learngenes)


def opened(
    config: Training, *, base: Checkpoint, target: Target, learngenes: Learngenes | None
) -> Classification:
    """The objective of examples that are read: a model, the same bits in every process.

    Raises:
        RecipeError: groups, ranks or labels do not fit.
    """
    gate = gate_of_labels(config.groups, names=target.classes)
    check_labels(gate, train=target.train.labels, test=target.test.labels)
    model = classifier(config, base=base, target=target, gate=gate)
    spec = Spec(
        gate=gate,
        num_learngenes=config.learngenes,
        num_tailors=config.tailors,
        start=config.start if learngenes is None else "random",
        seed=config.seed,
    )
    decomposable(model, spec)
    if learngenes is not None:
        state, sizes = learngenes.state()
        # The head stays new even where there are as many labels as before: they mean others.
        body = {name: value for name, value in state.items() if not name.startswith(HEAD)}
        carried = carry(model, state=body, learngenes=sizes)
        if _freezes(config):
            freeze(model, carried=carried)
    return Classification(model, train=target.train, test=target.test)


def gate_of_labels(groups: dict[str, Any], *, names: tuple[str, ...] = ()) -> ClassGate:
    """The gate of groups of labels, its classes numbered as labels are: 0, 1, ... or by name.

    Raises:
        RecipeError: a label between the least and the greatest is in no group, or one is no label.
    """
    found = from_hierarchy(groups)
    pairs = zip(found.classes, found.uses, strict=True)
    uses = {label: [found.groups[g] for g in own] for label, own in pairs}
    if unknown := [label for label in uses if names and label not in names]:
        raise RecipeError(
            f"groups: {unknown[0]!r} is no class of the examples",
            f"They have {', '.join(names[:10])}.",
            "Correct `groups`.",
        )
    if names:
        return gate_of({label: uses.get(label, []) for label in names})
    # Not isdigit, which takes superscripts too; and 01 would be another name of 1.
    if wrong := [x for x in uses if not x.isdecimal() or str(int(x)) != x]:
        raise RecipeError(
            f"groups: {wrong[0]!r} is no label", "Labels are numbers from 0.", "Correct `groups`."
        )
    # One more than there are labels shows the first gap, however large a label is.
    num = min(1 + max(map(int, uses)), 1 + len(uses))
    return gate_of({str(i): uses.get(str(i), []) for i in range(num)})


def settings_of(config: Pace) -> Settings:
    """How training goes."""
    names = Settings.__dataclass_fields__.keys() & type(config).model_fields.keys()
    return Settings(**{name: getattr(config, name) for name in names})


def data_config(config: Training) -> TuneConfig:
    """The examples' part, as data are read everywhere."""
    shared = ("task", "train", "test", "input", "label", "per_class", "max_length", "seed")
    return TuneConfig(model=config.backbone, **{name: getattr(config, name) for name in shared})


def classifier(config: Training, *, base: Checkpoint, target: Target, gate: ClassGate) -> nn.Module:
    """The undecomposed classifier, its backbone the base's weights, its head new."""
    backbone = build_backbone(data_config(config), base=base)
    load_weights(backbone, checkpoint=base, base=base)
    width = _width(backbone, target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = plain(_blueprint(config, base=base, width=width, gate=gate))
    model.get_submodule("backbone").load_state_dict(backbone.module.state_dict())
    return model


def _width(backbone: Backbone, target: Target) -> int:
    return extract(backbone, target.train.take([0]), device=torch.device("cpu")).shape[1]


def _blueprint(config: Training, *, base: Checkpoint, width: int, gate: ClassGate) -> Blueprint:
    built = {
        "backbone": config.backbone,
        "config": dict(base.config),
        "features": width,
        "labels": len(gate.classes),
    }
    return Blueprint(model=BUILDER, config=built, gate=gate, layers={})


def _architecture(config: Training, *, base: Checkpoint, model: nn.Module) -> Blueprint:
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    gate = gate_rows(model).gate
    return _blueprint(config, base=base, width=head.in_features, gate=gate)


def _key(config: Training, *, base: Checkpoint, target: Target, of: Learngenes | None) -> str:
    """Digest of what the trained numbers depend on."""
    places = {"train", "test", "out", "num_workers", "use_gpu", "threads", "checkpoint_every_s"}
    fields = [
        config.model_dump(mode="json", exclude=places),
        base.revision,
        target.train.digest(),
        target.test.digest(),
        None if of is None else [of.place.base, of.place.source],
    ]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]
