"""A decomposable model in the component store: learngenes, tailors, and all that is neither."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdmerge.core.components import RankOneComponents, flat
from svdmerge.core.kind.blueprint import Blueprint
from svdmerge.core.kind.recombine import Stored, salience
from svdmerge.errors import StoreError
from svdmerge.storage import layout
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Committed, Covered, put_unit
from svdmerge.storage.shards import Rows, Spectrum

# What its commits give as solver: the factors are as training left them.
SOLVER = "kind"
LEARNGENE, TAILOR, FLAT = "learngene", "tailor", "flat"
# The commit with the blueprint is put last: a model without it is not whole.
REST = "rest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer's components as trained, learngenes first, then each group's tailors."""

    components: RankOneComponents
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a model lies in a store."""

    base: str
    source: str

    @staticmethod
    def of(architecture: Mapping[str, Any], *, source: str) -> "Place":
        """The place of a model of this architecture, from a digest of its content."""
        text = json.dumps(architecture, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Place(base=layout.base_key(digest, solver=SOLVER), source=source)

    def paths(self, name: str, *, depth: int) -> tuple[str, str]:
        """Prefix of a unit's objects, and path of its commit."""
        place = f"{layout.group_key([name])}/0-{max(depth - 1, 0)}"
        return (
            f"{layout.components_path(self.base, self.source)}/{place}",
            f"{layout.commits_path(self.base, self.source)}/{place}.json",
        )


def put_decomposed(
    store: Folder,
    place: Place,
    *,
    layers: Mapping[str, Layer],
    rest: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> None:
    """Store a model: a commit for each layer, then one for the rest with the blueprint `about` it.

    Factors are stored as they are, signs and order kept; float32, as all of the store.

    Raises:
        StoreError: a tensor of the rest does not survive float32.
        ContentError: a value is not finite.
    """
    for path, layer in layers.items():
        _put_layer(store, place, path, layer)
    kept = {name: value.detach().cpu() for name, value in rest.items() if value.numel()}
    shapes = {name: [str(v.dtype).removeprefix("torch."), *v.shape] for name, v in rest.items()}
    data_prefix, commit_path = place.paths(REST, depth=1)
    put_unit(
        store,
        data_prefix=data_prefix,
        commit_path=commit_path,
        rows=[
            Rows(parameter=f"{name}#flat", kind=FLAT, first=0, components=flat(_float32(name, v)))
            for name, v in kept.items()
        ],
        spectra=[],
        covered=[_covered(f"{name}#flat", 1, _sha256([v])) for name, v in kept.items()],
        solver=SOLVER,
        numerics="",
        about={"shapes": shapes, **about},
    )


def _put_layer(store: Folder, place: Place, path: str, layer: Layer) -> None:
    c = layer.components
    digest = _sha256([c.u, c.s, c.vh])
    values = salience(c)
    data_prefix, commit_path = place.paths(path, depth=len(c))
    put_unit(
        store,
        data_prefix=data_prefix,
        commit_path=commit_path,
        rows=list(_rows(path, layer)),
        # What selection reads: of free factors the salience takes the singular value's place.
        spectra=[
            Spectrum(
                parameter=path,
                sha256=digest,
                m=c.u.shape[0],
                n=c.vh.shape[1],
                fro=float(values.norm()),
                base_fro=None,
                bound=0.0,
                noise=0.0,
                first=0,
                s=values.float().numpy(),
                solver=SOLVER,
            )
        ],
        covered=[_covered(path, len(c), digest)],
        solver=SOLVER,
        numerics="",
    )


def _rows(path: str, layer: Layer) -> Iterator[Rows]:
    start = 0
    for group, size in enumerate(layer.sizes):
        part = layer.components.slice(start, start + size)
        kind, own = (TAILOR, group - 1) if group else (LEARNGENE, None)
        yield Rows(parameter=path, kind=kind, first=start, components=part, class_group=own)
        start += size


class StoredModel:
    """A decomposable model in a store: its blueprint and what selection needs are read; vectors
    only by ids."""

    def __init__(self, committed: Committed, about: Mapping[str, Any]) -> None:
        self._committed, self.about = committed, about
        self.blueprint = Blueprint.from_json(about)

    @staticmethod
    def load(store: Folder, place: Place) -> "StoredModel":
        """The model at a place. Raises: StoreError, if it is not there whole."""
        committed = Committed.load(
            store,
            commits=layout.commits_path(place.base, place.source),
            data=layout.components_path(place.base, place.source),
        )
        about = next((c.about for c in committed.commits if c.about), None)
        lacking = [p for p in (about or {}).get("layers", ()) if p not in committed]
        if about is None or lacking:
            raise StoreError(
                f"{store.uri}: holds no whole decomposable model {place.source}",
                f"{lacking[0]} is missing."
                if lacking
                else "It was never split, or not to the end.",
                "Run `svdmerge kind split` first.",
            )
        return StoredModel(committed, about)

    def layers(self) -> dict[str, Stored]:
        """Every layer as selection sees it, from sidecars alone."""
        spectra = self._committed.spectra()
        return {
            path: Stored(
                m=spectra[path][0].m,
                n=spectra[path][0].n,
                sizes=tuple(sizes),
                salience=torch.from_numpy(spectra[path][0].s.copy()),
                based=path in self.about["based"],
            )
            for path, sizes in self.about["layers"].items()
        }

    def components(self, path: str, indices: Sequence[int]) -> RankOneComponents:
        """Components of a layer by ids, in their order."""
        if indices:
            return self._committed.read(path, indices)
        m, n = (getattr(self.layers()[path], axis) for axis in ("m", "n"))
        return RankOneComponents(u=torch.zeros(m, 0), s=torch.zeros(0), vh=torch.zeros(0, n))

    def rest(self) -> dict[str, Tensor]:
        """Every tensor that is no factor, as it was."""
        return {name: self._tensor(name, spec) for name, spec in self.about["shapes"].items()}

    def _tensor(self, name: str, spec: Sequence[Any]) -> Tensor:
        dtype, shape = getattr(torch, spec[0]), spec[1:]
        if 0 in shape:
            return torch.zeros(*shape, dtype=dtype)
        return self._committed.read(f"{name}#flat", [0]).vh.reshape(shape).to(dtype)


def _float32(name: str, value: Tensor) -> Tensor:
    found = value.to(torch.float32)
    if not torch.equal(found.to(value.dtype), value):
        raise StoreError(
            f"{name}: its {value.dtype} values do not fit into float32",
            "The store holds float32.",
            "Convert the model to float32, or keep that buffer out of its state.",
        )
    return found.reshape(1, -1)


def _covered(parameter: str, depth: int, sha256: str) -> Covered:
    return Covered(parameter=parameter, first=0, depth=depth, source_sha256=sha256, base_sha256="")


def _sha256(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
