"""What any rule must keep that chooses sources by held-out losses."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from svdmerge.core.gate import BASE, Mix, alone, blend, equal, gate

NUM = 40


def losses(mean: float, *, seed: int, spread: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + spread * torch.randn(NUM, generator=generator, dtype=torch.float64)


def worse(mixes: Sequence[Mix]) -> list[Tensor]:
    """Every merge loses to the one good source in proportion to what it holds of others."""
    good = losses(0.1, seed=0)
    return [good + 2.0 * (1.0 - mix.weights.get("good", 0.0)) ** 2 for mix in mixes]


def noise_and_one_good() -> dict[str, Tensor]:
    return {f"noise-{i}": losses(1.6, seed=10 + i) for i in range(6)} | {
        "good": losses(0.1, seed=0)
    }


def test_an_obviously_best_source_among_noise_is_taken_alone() -> None:
    chosen, _ = gate(noise_and_one_good(), base=losses(1.5, seed=1), judge=worse)
    assert list(chosen.weights) == ["good"]
    assert chosen.weights["good"] == pytest.approx(1.0, abs=0.01)


def test_sources_that_are_all_clearly_worse_keep_the_base() -> None:
    base = losses(0.1, seed=0)
    sources = {f"bad-{i}": losses(2.0, seed=20 + i) for i in range(4)}
    chosen, _ = gate(sources, base=base, judge=lambda mixes: [base + 1.0 for _ in mixes])
    assert chosen == BASE
    assert chosen.weights == {}


def test_a_doubted_source_takes_part_where_its_help_is_sure_and_not_where_it_is_lucky() -> None:
    base = losses(1.5, seed=1)
    lucky = base - 0.05 - losses(0.0, seed=3)
    assert 0 < float((base - lucky).mean()) < 0.2
    sources = {"good": losses(0.1, seed=0), "lucky": lucky, "bad": losses(3.0, seed=2)}
    every = {"good", "lucky", "bad"}
    chosen, considered = gate(sources, base=base, judge=worse, doubted=every)
    assert list(chosen.weights) == ["good"]
    assert {s for mix in considered for s in mix.weights} == {"good"}
    alone = gate({"lucky": lucky}, base=base, judge=worse, doubted={"lucky"})
    assert alone == (BASE, {BASE: base})


def test_without_sources_the_base_is_kept() -> None:
    base = losses(0.1, seed=0)
    assert gate({}, base=base, judge=worse) == (BASE, {BASE: base})


def test_the_choice_is_the_same_every_time() -> None:
    first, considered = gate(noise_and_one_good(), base=losses(1.5, seed=1), judge=worse)
    again, others = gate(noise_and_one_good(), base=losses(1.5, seed=1), judge=worse)
    assert first == again
    assert list(considered) == list(others)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_in_which_sources_are_listed_does_not_matter(seed: int) -> None:
    sources = {f"s{i}": losses(1.0 - 0.05 * i, seed=30 + i) for i in range(5)}

    def judge(mixes: Sequence[Mix]) -> list[Tensor]:
        return [
            torch.stack([w * sources[s] for s, w in sorted(m.weights.items())]).sum(0)
            if m.weights
            else base
            for m in mixes
        ]

    base = losses(1.1, seed=2)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed)).tolist()
    names = list(sources)
    shuffled = {names[i]: sources[names[i]] for i in order}
    chosen, expected = (gate(x, base=base, judge=judge)[0] for x in (shuffled, sources))
    assert chosen.total == pytest.approx(expected.total, rel=1e-12)
    assert dict(chosen.shares) == pytest.approx(dict(expected.shares), rel=1e-12)


def test_the_chosen_merge_is_among_those_considered_with_its_losses() -> None:
    chosen, considered = gate(noise_and_one_good(), base=losses(1.5, seed=1), judge=worse)
    assert BASE in considered
    assert all(len(x) == NUM for x in considered.values())
    assert chosen in considered


def test_merges_that_the_examples_cannot_tell_apart_are_averaged() -> None:
    one, two = alone("one"), equal(("one", "two"), total=1.0)
    same = losses(0.5, seed=3)
    found = blend({one: same, two: same, BASE: same})
    assert found.weights == pytest.approx({"one": 0.5, "two": 1.0 / 6})


def test_a_merge_falls_off_by_its_standard_errors_behind_the_best() -> None:
    best = losses(0.5, seed=3)
    away = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(NUM // 2)
    # Paired differences of mean 2 SE: spread a gives a standard error of a / sqrt(NUM - 1).
    behind = best + away + 2.0 / (NUM - 1) ** 0.5
    found = blend({alone("best"): best, alone("other"): behind})
    ratio = found.weights["other"] / found.weights["best"]
    assert ratio == pytest.approx(0.1353352832, rel=1e-9)


def test_with_more_examples_the_best_merge_takes_all() -> None:
    best = losses(0.5, seed=3)
    found = blend({alone("best"): best, alone("other"): best + losses(0.4, seed=4)})
    assert found == alone("best")
