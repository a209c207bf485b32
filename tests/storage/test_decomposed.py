"""A decomposable model in the store: bytes, signs and order as they were, and what is refused."""

import pyarrow as pa
import pytest
import torch

from svdmerge.core.components import RankOneComponents
from svdmerge.core.kind.blueprint import Blueprint
from svdmerge.core.kind.gate import gate_of
from svdmerge.errors import ContentError, StoreError
from svdmerge.storage.decomposed import Layer, Place, StoredModel, put_decomposed
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.maintenance import list_sources, verify

SIZES = (20, 3, 2)
GATE = gate_of({"a": ["one"], "b": ["two"]})
ABOUT = Blueprint(model="x:y", config={"d": 4}, gate=GATE, layers={"w": SIZES}).to_json()
PLACE = Place.of({"d": 4}, source="one")


def layer(r=25):
    generator = torch.Generator().manual_seed(0)
    c = RankOneComponents(
        u=torch.randn(7, r, generator=generator),
        s=torch.randn(r, generator=generator),
        vh=torch.randn(r, 5, generator=generator),
    )
    return Layer(components=c, sizes=SIZES)


def rest():
    return {
        "w.bias": torch.randn(7),
        "table": torch.randn(3, 4, 2),
        "scale": torch.tensor(-0.5),
        "count": torch.tensor([3, 2**20], dtype=torch.int64),
        "half": torch.randn(4).half(),
        "none": torch.zeros(0, 3),
    }


@pytest.fixture
def store(tmp_path):
    return Folder.at(tmp_path)


def test_factors_come_back_as_they_were_neither_sorted_nor_turned(store):
    kept, given = layer(), rest()
    put_decomposed(store, PLACE, layers={"w": kept}, rest=given, about=ABOUT)
    found = StoredModel.load(store, PLACE)
    indices = [24, 0, 21, 3]
    c = found.components("w", indices)
    assert torch.equal(c.u, kept.components.u[:, indices])
    assert torch.equal(c.s, kept.components.s[indices])
    assert torch.equal(c.vh, kept.components.vh[indices])
    for name, value in found.rest().items():
        assert value.dtype == given[name].dtype
        assert torch.equal(value, given[name]), name
    assert found.rest().keys() == given.keys()
    assert found.blueprint.gate == GATE
    assert len(found.components("w", [])) == 0


def test_what_selection_needs_is_read_from_sidecars(store):
    put_decomposed(store, PLACE, layers={"w": layer()}, rest=rest(), about=ABOUT)
    [(path, stored)] = StoredModel.load(store, PLACE).layers().items()
    assert (path, stored.m, stored.n, stored.sizes) == ("w", 7, 5, SIZES)
    c = layer().components
    expected = torch.stack([c.slice(i, i + 1).dense().norm() for i in range(25)])
    torch.testing.assert_close(stored.salience, expected)


def test_shards_say_which_components_are_learngenes_and_whose_the_tailors_are(store):
    put_decomposed(store, PLACE, layers={"w": layer()}, rest={}, about=ABOUT)
    tables = [
        pa.ipc.open_file(store.path(p)).read_all()
        for p in store.find("components")
        if p.endswith(".arrow") and "spectrum" not in p
    ]
    rows = [row for t in tables for row in t.to_pylist()]
    assert [row["index"] for row in rows] == list(range(25))
    assert [row["kind"] for row in rows] == ["learngene"] * 20 + ["tailor"] * 5
    assert [row["class_group"] for row in rows] == [None] * 20 + [0] * 3 + [1] * 2


def test_a_store_with_a_model_verifies_and_lists_it_and_storing_again_adds_nothing(store):
    given = rest()
    put_decomposed(store, PLACE, layers={"w": layer()}, rest=given, about=ABOUT)
    before = store.find()
    put_decomposed(store, PLACE, layers={"w": layer()}, rest=given, about=ABOUT)
    assert store.find() == before
    assert verify(store) == []
    [listed] = list_sources(store)
    assert listed.source == "one"
    assert listed.num_components == 25 + 5


def test_a_model_whose_last_commit_or_layer_is_missing_is_not_there(store):
    with pytest.raises(StoreError, match="no whole decomposable model"):
        StoredModel.load(store, PLACE)
    put_decomposed(store, PLACE, layers={}, rest=rest(), about=ABOUT)
    with pytest.raises(StoreError, match="w is missing"):
        StoredModel.load(store, PLACE)


def test_what_float32_cannot_hold_is_refused_by_name(store):
    with pytest.raises(StoreError, match=r"count: its torch\.int64"):
        put_decomposed(
            store, PLACE, layers={}, rest={"count": torch.tensor([2**24 + 1])}, about=ABOUT
        )
    with pytest.raises(ContentError, match="not finite"):
        put_decomposed(
            store, PLACE, layers={}, rest={"bias": torch.tensor([torch.inf])}, about=ABOUT
        )
