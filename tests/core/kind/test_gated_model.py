import copy

import pytest
import torch
from kind_cases import GATE, Transformer, batch, gated_transformer
from torch import nn

from svdmerge.core.kind.gate import gate_of, gated
from svdmerge.core.kind.optimizer import GatedAdamW
from svdmerge.core.kind.replace import Spec, decomposable
from svdmerge.errors import RecipeError, TrainingError


def used_by(layer, name):
    """Which components class `name` uses, told from the gate's names alone."""
    groups = {"a": {"one"}, "b": {"two"}, "c": {"two", "three"}}[name]
    wanted = [0, *(1 + GATE.groups.index(g) for g in groups)]
    return torch.tensor([int(g) in wanted for g in layer.group])


@pytest.mark.parametrize("name", GATE.classes)
def test_gradients_reach_learngenes_and_own_tailors_and_are_exactly_zero_elsewhere(name):
    model, layers = gated_transformer()
    with gated(model, torch.full((4,), GATE.index(name))):
        model(batch(4)).square().sum().backward()
    assert len(layers) == 12
    for path, layer in layers.items():
        used = used_by(layer, name)
        for grad in (layer.u.grad.T, layer.s.grad[:, None], layer.vh.grad):
            assert (grad[~used] == 0).all(), path
            # The keys' gradient is orthogonal to constants, not zero in any component.
            assert (grad[used] != 0).any(dim=1).all(), path


def test_tailors_that_a_batch_did_not_use_keep_their_bytes_through_steps_with_momentum():
    model, layers = gated_transformer()
    optimizer = GatedAdamW(model, lr=0.01, weight_decay=0.1)

    def step(classes):
        optimizer.zero_grad()
        with gated(model, torch.tensor(classes)):
            model(batch(len(classes))).square().sum().backward()
        optimizer.step()

    step([0, 1, 2])  # all have momentum from here on
    before = copy.deepcopy({path: layer.components() for path, layer in layers.items()})
    for _ in range(3):
        step([1, 1, 1])
    for path, layer in layers.items():
        after, used = layer.components(), used_by(layer, "b")
        for old, new in (
            (before[path].u.T, after.u.T),
            (before[path].s[:, None], after.s[:, None]),
            (before[path].vh, after.vh),
        ):
            old, new = old.contiguous(), new.contiguous()
            unchanged = (old.view(torch.uint8) == new.view(torch.uint8)).all(dim=1)
            assert unchanged[~used].all(), path
            assert not unchanged[used].any(), path


def test_a_mixed_batch_equals_batches_of_single_classes():
    model, _ = gated_transformer()
    x, classes = batch(6), torch.tensor([0, 1, 2, 2, 1, 0])
    with gated(model, classes):
        mixed = model(x)
    for i, c in enumerate(classes):
        with gated(model, int(c)):
            torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1]), atol=1e-5, rtol=0)
        with gated(model, GATE.classes[int(c)]):
            torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1]), atol=1e-5, rtol=0)


def test_a_class_is_the_dense_model_of_its_own_components():
    model, layers = gated_transformer()
    dense = copy.deepcopy(model)
    for path, layer in layers.items():
        used = used_by(layer, "c").float()
        parent, _, child = path.rpartition(".")
        linear = nn.Linear(layer.in_features, layer.out_features)
        with torch.no_grad():
            weight = sum(
                layer.s[i] * torch.outer(layer.u[:, i], layer.vh[i])
                for i in range(len(used))
                if used[i]
            )
            linear.weight.copy_(weight)
            linear.bias.copy_(layer.bias)
        setattr(dense.get_submodule(parent), child, linear)
    with gated(model, "c"):
        torch.testing.assert_close(model(batch(3)), dense(batch(3)), atol=1e-5, rtol=0)


def test_from_a_trained_model_all_groups_together_are_that_model():
    torch.manual_seed(0)
    everything = {"all": ["one", "two", "three"], "a": ["one"]}
    model = Transformer()
    expected = model(batch(3))
    decomposable(model, Spec(gate=gate_of(everything), start="svd"))
    with gated(model, "all"):
        torch.testing.assert_close(model(batch(3)), expected, atol=1e-5, rtol=1e-5)


def test_a_random_start_has_the_scale_of_a_dense_layers():
    model = Transformer(192)
    expected = model.blocks[0].mlp.fc1.weight.std()
    layers = decomposable(model, Spec(gate=GATE))
    layer = layers["blocks.0.mlp.fc1"]
    stds = []
    for name in GATE.classes:
        c, used = layer.components(), used_by(layer, name).float()
        stds.append(((c.u * c.s * used) @ c.vh).std())
    assert torch.stack(stds).mean() == pytest.approx(float(expected), rel=0.1)


def test_outside_a_gate_or_with_too_few_classes_a_model_says_what_is_missing():
    model, _ = gated_transformer()
    with pytest.raises(TrainingError, match="without a class"):
        model(batch(2))
    with gated(model, torch.tensor([0, 1, 1])), pytest.raises(TrainingError, match="3 classes"):
        model(batch(2))
    with pytest.raises(RecipeError, match="'d': unknown"), gated(model, "d"):
        pass
    with pytest.raises(RecipeError, match="number -1: unknown"), gated(model, -1):
        pass
    with pytest.raises(IndexError), gated(model, torch.tensor([-1])):
        pass


def test_gates_nest_and_an_error_inside_restores_what_was_before():
    model, _ = gated_transformer()
    with gated(model, 0):
        first = model(batch(2))
        with pytest.raises(ValueError, match="inside"), gated(model, 1):
            raise ValueError("inside")
        torch.testing.assert_close(model(batch(2)), first, atol=0, rtol=0)


def test_per_sample_gradients_by_torch_func_are_those_of_single_samples():
    model, _ = gated_transformer()
    parameters = dict(model.named_parameters())
    x, classes = batch(3), torch.tensor([0, 1, 2])

    def loss(parameters, sample, c):
        with gated(model, c):
            out = torch.func.functional_call(model, parameters, (sample[None],))
        return out.square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, classes)
    for i in range(3):
        model.zero_grad()
        with gated(model, int(classes[i])):
            model(x[i : i + 1]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name][i], p.grad, atol=1e-5, rtol=1e-4)
