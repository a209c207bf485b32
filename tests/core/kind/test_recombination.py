import pytest
import torch

from svdmerge.core.components import RankOneComponents
from svdmerge.core.kind.gate import gate_of
from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.recombine import Stored, assembled, recombine, salience
from svdmerge.core.kind.start import dealt, groups_of
from svdmerge.errors import RecipeError

GATE = gate_of({"a": ["one"], "b": ["two"], "c": ["two", "three"]})
SIZES = (2, 1, 2, 1)


def components(m=8, n=6, r=6):
    generator = torch.Generator().manual_seed(0)
    return RankOneComponents(
        u=torch.randn(m, r, generator=generator),
        s=torch.tensor([1.0, -2.0, 3.0, 0.5, -0.1, 2.0]),
        vh=torch.randn(r, n, generator=generator),
    )


def stored(c=None, m=8, n=6):
    return Stored(m=m, n=n, sizes=SIZES, salience=salience(c or components()))


def test_the_salience_is_each_components_frobenius_norm_whatever_its_signs_and_scales():
    c = components()
    for i, value in enumerate(salience(c)):
        assert float(value) == pytest.approx(float(c.slice(i, i + 1).dense().norm()), rel=1e-5)


def test_a_selection_is_the_ids_of_learngenes_and_of_the_tailors_that_classes_need():
    found = recombine({"x": stored()}, gate=GATE, classes=["a", "b"], budget=None)
    assert found.layers["x"].indices == (0, 1, 2, 3, 4)
    assert found.layers["x"].sizes == (2, 1, 2)
    assert found.gate.classes == ("a", "b")
    assert found.gate.groups == ("one", "two")


def test_groups_that_all_chosen_classes_use_need_no_gate():
    found = recombine({"x": stored()}, gate=GATE, classes=["b", "c"], budget=None)
    assert found.layers["x"].indices == (0, 1, 3, 4, 5)
    assert found.layers["x"].sizes == (4, 1)
    assert found.gate.groups == ("three",)
    assert found.gate.uses == ((), (0,))


@pytest.mark.parametrize("width", [4, 40])
def test_one_group_left_is_dense_where_that_is_smaller(width):
    c = components(m=width, n=width)
    found = recombine({"x": stored(c, m=width, n=width)}, gate=GATE, classes=["b"], budget=None)
    choice = found.layers["x"]
    assert choice.dense == (width == 4)
    kept = RankOneComponents(
        u=c.u[:, list(choice.indices)], s=c.s[list(choice.indices)], vh=c.vh[list(choice.indices)]
    )
    layer = assembled(choice, kept, bias=torch.ones(width))
    assert isinstance(layer, DecomposableLinear) == (width == 40)
    x = torch.randn(3, width)
    torch.testing.assert_close(layer(x), x @ kept.dense().T + 1.0, atol=1e-5, rtol=1e-5)


def test_a_budget_takes_the_tailors_of_most_energy_and_counts_what_it_drops():
    c = components()
    size = 8 + 6 + 1
    found = recombine({"x": stored(c)}, gate=GATE, classes=["a", "b"], budget=4 * size)
    strongest = sorted(range(2, 5), key=lambda i: -float(salience(c)[i]))[:2]
    assert found.layers["x"].indices == (0, 1, *sorted(strongest))
    assert found.num_dropped == 1
    assert sum(found.layers["x"].sizes) == 4


def test_a_budget_below_the_learngenes_alone_is_refused():
    with pytest.raises(RecipeError, match="learngenes alone take 30"):
        recombine({"x": stored()}, gate=GATE, classes=["a"], budget=29)


def test_an_unknown_class_is_refused():
    with pytest.raises(RecipeError, match="'z': unknown to the gate"):
        recombine({"x": stored()}, gate=GATE, classes=["z"], budget=None)


def test_a_dense_part_takes_what_is_always_on():
    c, base = components(), torch.randn(8, 6)
    layer = Stored(m=8, n=6, sizes=SIZES, salience=salience(c), based=True)
    choice = recombine({"x": layer}, gate=GATE, classes=["a", "b"], budget=None).layers["x"]
    made = assembled(choice, c.slice(0, 5), bias=None, base=base)
    assert isinstance(made, DecomposableLinear)
    assert made.sizes == (0, 1, 2)
    torch.testing.assert_close(made.base.detach(), base + c.slice(0, 2).dense())


def test_values_are_dealt_largest_to_learngenes_and_then_to_groups_in_turn():
    assert dealt([2, 2, 1]) == [0, 1, 2, 4, 3]
    assert groups_of([2, 2, 1]) == [0, 0, 1, 1, 2]
