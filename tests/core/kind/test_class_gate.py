import pytest
import torch

from svdmerge.core.kind.gate import disjoint, from_hierarchy, gate_of
from svdmerge.errors import RecipeError


def test_a_disjoint_gate_gives_every_class_learngenes_and_a_group_of_its_own():
    assert torch.equal(
        disjoint(["a", "b"]).rows(), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    )


def test_a_hierarchy_gives_a_class_the_groups_of_all_nodes_above_it():
    gate = from_hierarchy(
        {"animals": {"cats": ["lion", "lynx"], "dogs": ["wolf"]}, "rest": ["ship"]}
    )
    assert gate.groups == ("animals", "animals/cats", "animals/dogs", "rest")
    assert dict(zip(gate.classes, gate.uses, strict=True)) == {
        "lion": (0, 1), "lynx": (0, 1), "wolf": (0, 2), "ship": (3,)
    }  # fmt: skip


def test_a_class_in_several_places_has_the_groups_of_all():
    gate = from_hierarchy({"red": ["a", "b"], "round": ["b"]})
    assert gate.uses == ((0,), (0, 1))


def test_some_classes_keep_their_groups_and_no_other():
    gate = gate_of({"a": ["one"], "b": ["two"], "c": ["two", "three"]}).of(["c", "a"])
    assert gate.classes == ("a", "c")
    assert gate.groups == ("one", "two", "three")
    assert gate.of(["a"]).groups == ("one",)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: gate_of({"a": ["one"], "b": []}), "class 'b': has no tailors"),
        (lambda: gate_of({"a": ["one"]}, groups=["one", "two"]), "group 'two': is empty"),
        (lambda: gate_of({"a": ["one"]}, groups=[]), "group 'one': is not listed"),
        (lambda: gate_of({}), "has no classes"),
        (lambda: from_hierarchy({"cats": []}), "group 'cats': is empty"),
        (lambda: from_hierarchy(["lion"]), "class 'lion': has no tailors"),
        (lambda: disjoint(["a"]).of(["z"]), "class 'z': unknown to the gate"),
    ],
)
def test_a_gate_with_a_hole_is_refused(build, told):
    with pytest.raises(RecipeError, match=told):
        build()
