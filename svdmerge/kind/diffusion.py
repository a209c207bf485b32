"""Train a decomposable diffusion model, or train on from the learngenes of another."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from svdmerge.core.dit import DiT, DiTConfig
from svdmerge.core.kind.blueprint import Blueprint
from svdmerge.core.kind.gate import ClassGate, disjoint, from_hierarchy, gate_of, gate_rows
from svdmerge.core.kind.replace import Spec
from svdmerge.errors import RecipeError
from svdmerge.kind.folder import Model, as_example, check_free, write
from svdmerge.kind.recipe import Drawing
from svdmerge.kind.train import Learngenes, put_state
from svdmerge.storage.filesystem import Folder
from svdmerge.training.kind.diffusion import Diffusion, unread
from svdmerge.training.kind.fit import fit_kind
from svdmerge.training.kind.objective import Settings
from svdmerge.training.kind.transfer import carry, freeze, num_trainable

BUILDER = "svdmerge.core.dit:build"
# Images that a model's cost is measured on.
EXAMPLE_IMAGES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionResult:
    """What training came to."""

    out: str
    num_parameters: int
    num_trained: int
    steps: int
    seconds: float
    resumes: int
    curve: list[dict[str, float]]
    """Training losses, and held-out ones where a test table is given."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def train_diffusion(
    diffusion: Diffusion,
    *,
    settings: Settings,
    names: Sequence[str],
    out: Folder,
    store: Folder,
    use_ray: bool,
    on_step: Callable[[int], None],
    learngenes: Learngenes | None = None,
) -> DiffusionResult:
    """What training came to; the model, its weights averaged where asked, is in `out`.

    With `learngenes`, these and all other matrices but the class embedding are carried over and
    stand still. Checkpoints lie in the store: the same call again resumes.

    Raises:
        RecipeError: the objective has no gate, or its gate's classes are not `names`.
        TrainingError: images cannot be used, or training failed.
        OutputError: `out` holds something else.
    """
    check_free(out)
    if diffusion.spec is None or diffusion.spec.gate.classes != tuple(names):
        raise RecipeError(
            f"diffusion: its gate does not know {', '.join(names)}",
            "Learngenes and tailors are told apart by a gate over the classes.",
            "Give a `spec` whose gate has these classes, in this order.",
        )
    if learngenes is not None:
        diffusion = replace(diffusion, prepare=partial(_carried_over, learngenes))
    model = diffusion.model()
    num_trained = num_trainable(model, frozen_learngenes=learngenes is not None)
    state = fit_kind(
        partial(unread, diffusion),
        settings=settings,
        folder=store.child(f"runs/kind-{_key(diffusion, settings, learngenes=learngenes)}"),
        use_ray=use_ray,
        on_step=on_step,
    )
    put_state(model, state)
    result = DiffusionResult(
        out=out.uri,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=num_trained,
        steps=state["epoch"],
        seconds=state["seconds"],
        resumes=state["resumes"],
        curve=state["curve"],
    )
    write(out, _at_rest(model.eval(), diffusion), result=result.to_json())
    return result


def diffusion_of(config: Drawing) -> Diffusion:
    """The objective of a `draw` section.

    Raises:
        RecipeError: a class is in no group, or a group names one that is not learnt.
        TrainingError: the sizes do not fit each other.
    """
    names = tuple(config.classes)
    return Diffusion(
        network=DiTConfig(
            image_size=config.image_size, channels=config.channels, patch=config.patch,
            width=config.width, depth=config.depth, heads=config.heads, num_classes=len(names),
        ),
        train=_absolute(config.train),
        test=_absolute(config.test),
        classes=tuple(config.classes.values()),
        spec=Spec(
            gate=_gate(config.groups, names=names),
            num_learngenes=config.learngenes,
            num_tailors=config.tailors,
            seed=config.seed,
        ),
        seed=config.seed,
        pictures=_absolute(config.pictures),
    )  # fmt: skip


def _absolute(place: str) -> str:
    """A path or URI as every process understands it: workers have another working directory."""
    return Folder.at(place).uri if place else ""


def _gate(groups: dict[str, Any] | None, *, names: tuple[str, ...]) -> ClassGate:
    if groups is None:
        return disjoint(names)
    found = from_hierarchy(groups)
    if odd := sorted(set(found.classes) ^ set(names)):
        raise RecipeError(
            f"groups: {odd[0]!r} is in `groups` or in `classes`, but not in both",
            "Every class that is learnt has its tailors.",
            "Put it in both, or in neither.",
        )
    uses = {name: [found.groups[g] for g in found.uses[found.index(name)]] for name in names}
    return gate_of(uses, groups=found.groups)


def _carried_over(learngenes: Learngenes, model: nn.Module) -> None:
    """Learngenes and all that is no factor into a fresh model. The embedding of classes stays: what
    novel ones mean is not known, even where there are as many as before."""
    state, sizes = learngenes.state()
    state.pop("class_embed.weight")
    freeze(model, carried=carry(model, state=state, learngenes=sizes))


def _at_rest(model: nn.Module, diffusion: Diffusion) -> Model:
    assert isinstance(model, DiT)
    network = diffusion.network
    blueprint = Blueprint(
        model=BUILDER, config=asdict(network), gate=gate_rows(model).gate, layers={}
    )
    shape = (EXAMPLE_IMAGES, network.channels, network.image_size, network.image_size)
    example = (torch.zeros(shape), torch.full(shape[:1], 0.5), torch.zeros(shape[:1]).long())
    return Model(
        blueprint=blueprint.of(model), state=model.state_dict(), example=as_example(example)
    )


def _key(diffusion: Diffusion, settings: Settings, *, learngenes: Learngenes | None) -> str:
    """Digest of what the trained numbers depend on; the images count by content."""
    numbers = replace(settings, num_workers=1, use_gpu=False, threads=1, checkpoint_every_s=0.0)
    fields = [
        diffusion.network, diffusion.classes, diffusion.spec, diffusion.seed, numbers,
        diffusion.random_gate,
        *(
            hashlib.sha256(Folder.at(place).read("")).hexdigest() if place else ""
            for place in (diffusion.train, diffusion.test)
        ),
        None if learngenes is None else (learngenes.place.base, learngenes.place.source),
    ]  # fmt: skip
    return hashlib.sha256(repr(fields).encode()).hexdigest()[:32]
