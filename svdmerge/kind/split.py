"""Split: a trained decomposable model into the component store."""

from dataclasses import asdict, dataclass
from typing import Any

from svdmerge.core.components import RankOneComponents
from svdmerge.core.kind.blueprint import Blueprint
from svdmerge.errors import StoreError
from svdmerge.kind.folder import Model
from svdmerge.storage.decomposed import Layer, Place, StoredModel, put_decomposed
from svdmerge.storage.filesystem import Folder

FACTORS = ("u", "s", "vh")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitResult:
    """What was stored."""

    store: str
    source: str
    num_layers: int
    num_learngenes: int
    num_tailors: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def place_of(model: Model) -> Place:
    """Where a model lies in any store: by its architecture and its content."""
    blueprint = model.blueprint
    architecture = {"model": blueprint.model, "config": blueprint.config}
    return Place.of(architecture, source=model.digest[:32])


def split(store: Folder, model: Model) -> SplitResult:
    """Put a model's learngenes and tailors, and what is neither, into a store."""
    layers = {path: layer_of(model, path) for path in model.blueprint.layers}
    factors = {f"{path}.{name}" for path in layers for name in FACTORS}
    rest = {name: value for name, value in model.state.items() if name not in factors}
    place = place_of(model)
    put_decomposed(store, place, layers=layers, rest=rest, about=model.blueprint.to_json())
    sizes = model.blueprint.layers.values()
    return SplitResult(
        store=store.uri,
        source=place.source,
        num_layers=len(layers),
        num_learngenes=sum(s[0] for s in sizes),
        num_tailors=sum(sum(s[1:]) for s in sizes),
    )


def layer_of(model: Model, path: str) -> Layer:
    """A layer's components as they are."""
    u, s, vh = (model.state[f"{path}.{name}"].detach().cpu() for name in FACTORS)
    components = RankOneComponents(u=u, s=s, vh=vh)
    return Layer(components=components, sizes=model.blueprint.layers[path])


def stored(store: Folder, model: Model) -> StoredModel:
    """A model as it lies in the store, put there now if it is not yet.

    Raises:
        StoreError: another blueprint lies there, which would build something else.
    """
    split(store, model)  # what is committed stays, and what was lost heals
    found = StoredModel.load(store, place_of(model))
    if found.blueprint != Blueprint.from_json(model.blueprint.to_json()):
        raise StoreError(
            f"{store.uri}: the blueprint of {place_of(model).source} is not the model's",
            "Its place follows from its content, so the store was changed.",
            "Give another `store`.",
        )
    return found
