"""The bridge: a library of fine-tuned sources as one decomposable model, gated by source."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from svdmerge.core.components import RankOneComponents, concatenate
from svdmerge.core.factored import is_transposed, linear_of
from svdmerge.core.kind.blueprint import Blueprint
from svdmerge.core.kind.gate import ClassGate, disjoint
from svdmerge.core.kind.recombine import Stored
from svdmerge.core.kind.shared import Shared, take_apart
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.plan import Plan, make_plan
from svdmerge.engine.runtime import open_runtime
from svdmerge.errors import RecipeError
from svdmerge.kind.split import SplitResult
from svdmerge.progress import SILENT, Progress
from svdmerge.recipe import TuneConfig, load_recipe
from svdmerge.storage import layout
from svdmerge.storage.decomposed import Layer, Place, StoredModel, put_decomposed
from svdmerge.storage.manifest import Committed
from svdmerge.training.backbone import Backbone, build_backbone, load_weights
from svdmerge.training.kind.classifier import EXTRACTOR

# The class of all chosen sources at once.
TOGETHER = "together"
# Of the batch that costs are measured on.
EXAMPLE_ROWS, EXAMPLE_TOKENS = 8, 32
# Part of what a library's place in the store depends on: another rule finds other learngenes.
RULE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Sources of a merge recipe, planned: nothing of them is read yet."""

    plan: Plan
    model: str
    """What builds the base's module: `transformers:CLASS` or `package.module:callable`."""
    backbone: Backbone
    names: tuple[str, ...]
    """What each source of the plan is called as a class."""
    layers: Mapping[str, Parameter]
    """Linear layers' paths in the module that are decomposed, and their matrices."""

    @property
    def place(self) -> Place:
        """Where its learngenes and tailors lie: by revisions, and what they depend on."""
        fields = [
            RULE,
            self.plan.recipe.model_dump(mode="json", include={"parameters", "policies"}),
            [source.revision for source in self.plan.sources],
            self.names,
        ]
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return Place.of({"base": self.plan.base.revision}, source=digest[:32])

    def committed(self) -> list[Committed]:
        """Every source's components in the store."""
        key = self.plan.base_key
        return [
            Committed.load(
                self.plan.store,
                commits=layout.commits_path(key, source.revision),
                data=layout.components_path(key, source.revision),
            )
            for source in self.plan.sources
        ]


def open_library(path: str) -> Library:
    """The library of a merge recipe.

    Raises:
        RecipeError: two sources have one name, or none of the matrices is a linear layer's.
        TrainingError: the base's module cannot be built.
    """
    recipe = load_recipe(path)
    plan = make_plan(recipe.model_copy(update={"tune": None}))
    # Without examples, for only its `model` is looked at.
    config = recipe.tune or TuneConfig(train="-", test="-")
    backbone = build_backbone(config, base=plan.base)
    decomposed = {p.id: p for p in plan.parameters if p.action is Action.DECOMPOSE}
    layers = {
        backbone.module_name(name).removesuffix(".weight"): parameter
        for name, parameter in decomposed.items()
        if linear_of(backbone.module, backbone.module_name(name)) is not None
    }
    if not layers:
        raise RecipeError(
            f"{path}: none of {len(decomposed)} matrices is a linear layer's",
            "Learngenes and tailors are components of linear layers.",
            "Set `tune.model` to the class that fits the base.",
        )
    return Library(
        plan=plan, model=config.model, backbone=backbone, names=_names(plan), layers=layers
    )


def _names(plan: Plan) -> tuple[str, ...]:
    """The last part of each source's place, which the recipe's reader knows it by."""
    names = tuple(s.reference.rstrip("/").rsplit("/", 1)[-1] for s in plan.sources)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(
            f"models: two sources are called {twice[0]!r}",
            "Each is a class of its own, known by the last part of its place.",
            "Rename a folder.",
        )
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class LibrarySplit:
    """What was found and stored: in numbers for a terminal, and by matrix."""

    result: SplitResult
    explained: Mapping[str, float]
    """Of each matrix: share of the sources' squared norms that learngenes take off."""


def split_library(path: str, *, address: str = "none", progress: Progress = SILENT) -> LibrarySplit:
    """Learngenes and tailors of a library's sources, each source decomposed first as deep as the
    recipe's k says (what is stored already is read)."""
    from svdmerge.workflow import Run

    library = open_library(path)
    plan = library.plan
    with open_runtime(address) as runtime:
        Run(plan.recipe, runtime=runtime, progress=progress).decompose(whole=True)
    sources = library.committed()
    found: dict[str, Shared] = {}
    with progress.stage("share", len(library.layers)) as bar:
        for layer, parameter in library.layers.items():
            found[layer] = take_apart(
                [_components(c, parameter) for c in sources], num_tailors=plan.depth(parameter)
            )
            bar.advance()
    layers = {
        layer: Layer(
            components=_oriented(
                concatenate([x.learngenes, *x.tailors]).to(torch.float32), library, layer
            ),
            sizes=(len(x.learngenes), *map(len, x.tailors)),
        )
        for layer, x in found.items()
    }
    blueprint = _blueprint(library, {path: layer.sizes for path, layer in layers.items()})
    put_decomposed(
        plan.store, library.place, layers=_prefixed(layers), rest={}, about=blueprint.to_json()
    )
    explained = {library.layers[layer].id: x.explained for layer, x in found.items()}
    return LibrarySplit(result=_told(library, layers, explained), explained=explained)


def _prefixed(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    return {f"backbone.{path}": layer for path, layer in layers.items()}


def _oriented(components: RankOneComponents, library: Library, layer: str) -> RankOneComponents:
    """As the layer applies them, (out, in): some checkpoints store matrices transposed."""
    if not is_transposed(library.backbone.module, f"{layer}.weight"):
        return components
    return RankOneComponents(u=components.vh.T, s=components.s, vh=components.u.T)


def _components(committed: Committed, parameter: Parameter) -> RankOneComponents:
    """All that is stored of a source's matrix; nothing where it did not change."""
    depth = committed.held(parameter.id)
    if depth:
        found = committed.read(parameter.id, range(depth))
        return found.slice(0, int((found.s > 0).sum()))
    m, n = parameter.m, parameter.n
    return RankOneComponents(u=torch.zeros(m, 0), s=torch.zeros(0), vh=torch.zeros(0, n))


def _blueprint(library: Library, sizes: Mapping[str, tuple[int, ...]]) -> Blueprint:
    return Blueprint(
        model=EXTRACTOR,
        config={"backbone": library.model, "config": dict(library.plan.base.config)},
        gate=disjoint(library.names),
        layers={f"backbone.{path}": own for path, own in sizes.items()},
        based=tuple(f"backbone.{path}" for path in sizes),
        about={
            "base": library.plan.base.reference,
            "sources": [source.reference for source in library.plan.sources],
        },
    )


def _told(
    library: Library, layers: Mapping[str, Layer], explained: Mapping[str, float]
) -> SplitResult:
    num_learngenes = sum(layer.sizes[0] for layer in layers.values())
    share = sum(explained.values()) / len(explained)
    num_shared = sum(layer.sizes[0] > 0 for layer in layers.values())
    weighed = [source.reference for source in library.plan.sources if source.weight != 1.0]
    notes = (
        *(f"{place}: its weight does not count, each is a class of its own" for place in weighed),
        f"learngenes take off {share:.1%} of the sources' squared norms, mean over matrices",
        f"{num_shared} of {len(layers)} matrices have any",
    )
    return SplitResult(
        store=library.plan.store.uri,
        source=library.place.source,
        num_layers=len(layers),
        num_learngenes=num_learngenes,
        num_tailors=sum(sum(layer.sizes[1:]) for layer in layers.values()),
        notes=notes,
    )


class LibraryParts:
    """A split library as parts to recombine for some of its sources.

    What is no linear layer's matrix, such as biases and norms, is not gated: it is the base's, with
    the mean of the chosen sources' differences. So for one source it is that source's.
    """

    def __init__(self, library: Library, *, chosen: Sequence[str], together: bool) -> None:
        self._library, self._chosen, self._together = library, chosen, together
        self._stored = StoredModel.load(library.plan.store, library.place)
        self.blueprint = Blueprint.from_json(self._stored.about)
        gate = self.blueprint.gate
        self._numbers = [gate.index(name) for name in chosen]
        if together:
            used = tuple(sorted({g for i in self._numbers for g in gate.uses[i]}))
            whole = ClassGate(classes=(TOGETHER,), groups=gate.groups, uses=(used,))
            self.blueprint = replace(self.blueprint, gate=whole)

    @property
    def classes(self) -> tuple[str, ...]:
        """Those to recombine for."""
        return (TOGETHER,) if self._together else tuple(self._chosen)

    def layers(self) -> Mapping[str, Stored]:
        """Every layer as selection sees it."""
        return self._stored.layers()

    def components(self, path: str, indices: Sequence[int]) -> RankOneComponents:
        """Components by ids; tailors that are on together count as their sources' mean."""
        found = self._stored.components(path, indices)
        if not self._together:
            return found
        num_learngenes = self.blueprint.layers[path][0]
        shares = [1.0 if i < num_learngenes else 1.0 / len(self._chosen) for i in indices]
        return RankOneComponents(u=found.u, s=found.s * torch.tensor(shares), vh=found.vh)

    def rest(self) -> dict[str, Tensor]:
        """The base's tensors, those that are not gated moved by the chosen sources' mean."""
        return {f"backbone.{name}": value for name, value in self._moved.items()}

    @cached_property
    def _moved(self) -> dict[str, Tensor]:
        library = self._library
        load_weights(library.backbone, checkpoint=library.plan.base, base=library.plan.base)
        state = {k: v.clone() for k, v in library.backbone.module.state_dict().items()}
        decomposed = {parameter.id for parameter in library.layers.values()}
        sources = library.committed()
        for parameter in library.plan.parameters:
            target = state.get(library.backbone.module_name(parameter.tensor))
            if target is None or parameter.id in decomposed or not target.is_floating_point():
                continue
            parts = [_components(sources[i], parameter) for i in self._numbers]
            mean = torch.stack([part.dense().reshape(-1) for part in parts]).mean(dim=0)
            target.view(-1)[parameter.start : parameter.start + parameter.numel] += mean
        for path in library.layers:
            weight = state.pop(f"{path}.weight")
            transposed = is_transposed(library.backbone.module, f"{path}.weight")
            state[f"{path}.base"] = weight.T.contiguous() if transposed else weight
        return state


def library_parts(path: str, *, chosen: Sequence[str], together: bool) -> LibraryParts:
    """Parts of a split library for some of its sources.

    Raises:
        StoreError: it was not split.
        RecipeError: a source is unknown.
    """
    return LibraryParts(open_library(path), chosen=chosen, together=together)


def example_inputs(config: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
    """A batch by which cost is measured: tokens of a language model, pixels of a vision model.

    Raises:
        RecipeError: the configuration says neither.
    """
    generator = torch.Generator().manual_seed(0)
    if "vocab_size" in config:
        shape = (EXAMPLE_ROWS, EXAMPLE_TOKENS)
        tokens = torch.randint(int(config["vocab_size"]), shape, generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if "image_size" in config:
        side, channels = int(config["image_size"]), int(config.get("num_channels", 3))
        return torch.randn(EXAMPLE_ROWS, channels, side, side, generator=generator)
    raise RecipeError(
        "the base's config.json has neither `vocab_size` nor `image_size`",
        "Costs are measured on tokens or pixels.",
        "Recombine sources of a language or vision model.",
    )
