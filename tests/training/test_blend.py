"""Models put together in memory from stored components, and sources compared by them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from merging import Bench
from targeted import target_bench, targeted

from svdmerge.core.params import Action
from svdmerge.engine.plan import Plan
from svdmerge.training.backbone import Backbone, build_backbone, load_weights
from svdmerge.training.blend import Blend, Ingredient, at_strengths, committed, differences
from svdmerge.training.judge import MAX_EXAMPLES, JudgeUnit, judge, judged_examples
from svdmerge.training.overlap import OverlapUnit, overlaps
from svdmerge.workflow import run_stage

NAME = "encoder.0.weight"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench whose sources are decomposed."""
    found = target_bench(tmp_path_factory.mktemp("blend") / "bench", copy=True)
    run_stage(found.recipe(**targeted(found)), "decompose", address="none")
    return found


@pytest.fixture(scope="module")
def plan(bench: Bench) -> Plan:
    return bench.plan(**targeted(bench))


def revision(plan: Plan, name: str) -> str:
    return next(s.revision for s in plan.sources if Path(s.reference).name == name)


def blend(plan: Plan, **parts: tuple[Ingredient, ...]) -> Blend:
    """The ingredients, by the last part of a tensor's name or for all."""
    return Blend(
        store=plan.store,
        base_key=plan.base_key,
        parameters=plan.parameters,
        ingredients={p.id: parts.get("all", ()) for p in plan.parameters},
    )


def backbone_of(bench: Bench, plan: Plan) -> Backbone:
    config = bench.recipe(**targeted(bench)).tune
    assert config is not None
    found = build_backbone(config, base=plan.base)
    load_weights(found, checkpoint=plan.base, base=plan.base)
    return found


def test_all_components_of_a_source_are_its_whole_difference(plan: Plan) -> None:
    key = revision(plan, "noise-2")
    found = differences(blend(plan, all=(Ingredient(revision=key, weight=1.0),)), base=plan.base)
    source = next(s for s in plan.sources if s.revision == key).checkpoint
    changed = {p.tensor for p in plan.parameters if p.action is not Action.EQUAL}
    assert set(found) == changed
    for name, difference in found.items():
        expected = source.tensors[name].read() - plan.base.tensors[name].read()
        torch.testing.assert_close(difference, expected, atol=2e-6, rtol=1e-5)


def test_leading_components_are_the_best_approximation_of_their_rank(plan: Plan) -> None:
    key = revision(plan, "noise-3")
    part = (Ingredient(revision=key, weight=0.5, count=3),)
    found = differences(blend(plan, all=part), base=plan.base)[NAME].numpy()
    source = next(s for s in plan.sources if s.revision == key).checkpoint
    whole = (source.tensors[NAME].read() - plan.base.tensors[NAME].read()).double().numpy()
    u, s, vh = np.linalg.svd(whole, full_matrices=False)
    np.testing.assert_allclose(found, 0.5 * (u[:, :3] * s[:3]) @ vh[:3], atol=2e-6)


def test_ingredients_add_up(plan: Plan) -> None:
    parts = [
        Ingredient(revision=revision(plan, "noise-2"), weight=0.3),
        Ingredient(revision=revision(plan, "helper"), weight=-2.0, count=1),
    ]
    both = differences(blend(plan, all=tuple(parts)), base=plan.base)
    one, other = (differences(blend(plan, all=(part,)), base=plan.base) for part in parts)
    for name, total in both.items():
        torch.testing.assert_close(total, one[name] + other[name], atol=1e-5, rtol=1e-5)


def test_no_ingredients_change_nothing(plan: Plan) -> None:
    assert differences(blend(plan), base=plan.base) == {}


def test_strengths_scale_the_change_and_the_base_comes_back(bench: Bench, plan: Plan) -> None:
    backbone = backbone_of(bench, plan)
    name = backbone.module_name(NAME)
    before = {n: t.clone() for n, t in backbone.module.state_dict().items()}
    change = torch.ones_like(before[name])
    for strength in at_strengths(backbone, changes={NAME: change}, strengths=(0.5, 2.0)):
        now = backbone.module.state_dict()[name]
        torch.testing.assert_close(now, before[name] + strength * change)
    for n, t in backbone.module.state_dict().items():
        assert torch.equal(t, before[n])


def test_the_base_comes_back_also_when_judging_fails(bench: Bench, plan: Plan) -> None:
    backbone = backbone_of(bench, plan)
    name = backbone.module_name(NAME)
    before = backbone.module.state_dict()[name].clone()
    steps = at_strengths(backbone, changes={NAME: torch.ones_like(before)}, strengths=(1.0,))
    next(steps)
    steps.close()
    assert torch.equal(backbone.module.state_dict()[name], before)


def unit(
    bench: Bench, plan: Plan, cache: str, *, weight: float, strengths: tuple[float, ...]
) -> JudgeUnit:
    config = bench.recipe(**targeted(bench)).tune
    assert config is not None
    part = (Ingredient(revision=revision(plan, "helper"), weight=weight),)
    return JudgeUnit(
        name="test",
        memory_bytes=1,
        threads=1,
        config=config,
        base=plan.base,
        blend=blend(plan, all=part),
        strengths=strengths,
        examples=judged_examples(config, base=plan.base).digest(),
        cache=plan.store.child(cache),
    )


def test_a_blend_at_a_strength_is_the_scaled_blend(bench: Bench, plan: Plan) -> None:
    several = judge(unit(bench, plan, "a", weight=1.0, strengths=(0.0, 0.5, 1.0)))
    scaled = judge(unit(bench, plan, "b", weight=0.5, strengths=(1.0,)))
    base = judge(unit(bench, plan, "c", weight=0.0, strengths=(1.0,)))
    np.testing.assert_allclose(several.losses[1], scaled.losses[0], atol=1e-4)
    np.testing.assert_allclose(several.losses[0], base.losses[0], atol=1e-6)
    assert np.mean(several.losses[2]) < np.mean(several.losses[0])


def test_judging_again_reads_the_stored_losses_and_other_questions_do_not(
    bench: Bench, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = unit(bench, plan, "d", weight=1.0, strengths=(1.0,))
    first = judge(asked)

    def never(*arguments: object, **more: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("svdmerge.training.judge.build_backbone", never)
    assert judge(asked) == first
    for other in (
        unit(bench, plan, "d", weight=0.9, strengths=(1.0,)),
        unit(bench, plan, "d", weight=1.0, strengths=(0.9,)),
    ):
        with pytest.raises(AssertionError, match="computed again"):
            judge(other)


def test_many_examples_are_thinned_alike_in_every_class(
    bench: Bench, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = bench.recipe(**targeted(bench)).tune
    assert config is not None
    assert len(judged_examples(config, base=plan.base)) == 60 < MAX_EXAMPLES
    monkeypatch.setattr("svdmerge.training.judge.MAX_EXAMPLES", 12)
    few = judged_examples(config, base=plan.base)
    assert torch.bincount(few.labels).tolist() == [4, 4, 4]
    assert few.digest() == judged_examples(config, base=plan.base).digest()


def test_a_subset_keeps_inputs_beside_their_labels(bench: Bench, plan: Plan) -> None:
    config = bench.recipe(**targeted(bench)).tune
    assert config is not None
    examples = judged_examples(config, base=plan.base)
    taken = examples.take([5, 2])
    assert torch.equal(taken.labels, examples.labels[[5, 2]])
    assert isinstance(taken.inputs, torch.Tensor)
    assert isinstance(examples.inputs, torch.Tensor)
    assert torch.equal(taken.inputs, examples.inputs[[5, 2]])


def test_what_is_held_is_the_rank_of_the_change_and_not_the_depth(plan: Plan) -> None:
    helper = committed(plan.store, plan.base_key, revision(plan, "helper"))
    untouched = next(p.id for p in plan.parameters if p.tensor == "encoder.2.weight")
    assert helper.depth(untouched) == 16
    assert helper.held(untouched) == 0
    assert helper.held("absent") == 0
    noise = committed(plan.store, plan.base_key, revision(plan, "noise-2"))
    assert noise.held(untouched) == noise.depth(untouched)


def test_overlaps_tell_copies_from_strangers_and_count_what_either_changed(plan: Plan) -> None:
    order = ("copy", "helper", "noise-2", "noise-3")
    matrices = tuple(p for p in plan.parameters if p.action is Action.DECOMPOSE)
    found = OverlapUnit(
        name="test",
        memory_bytes=1,
        threads=1,
        store=plan.store,
        base_key=plan.base_key,
        revisions=tuple(revision(plan, name) for name in order),
        parameters=matrices,
    )
    sums, counts = map(torch.tensor, overlaps(found))
    assert torch.equal(sums, sums.T)
    assert torch.equal(counts, counts.T)
    assert counts[0, 1] == 1
    assert counts[0, 2] == counts[2, 3] == len(matrices)
    assert float(sums[0, 1]) == pytest.approx(1.0, abs=1e-6)
    assert float(sums[2, 3] / counts[2, 3]) < 0.8
