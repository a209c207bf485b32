import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdmerge.core.params import Action, Policy, action_of, budget, matrices
from svdmerge.errors import RecipeError


def outcome(
    name: str,
    *shape: int,
    floating: bool = True,
    policies: tuple[Policy, ...] = (),
    vocab_size: int | None = None,
    matrix_action: Action = Action.DECOMPOSE,
) -> Action:
    return action_of(
        name,
        shape=shape,
        floating=floating,
        policies=policies,
        vocab_size=vocab_size,
        matrix_action=matrix_action,
    )


# --- defaults ---


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.word_embeddings.weight",
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "shared.weight",
        "lm_head.weight",
        "vision.position_embedding.weight",
        "encoder.position_bias.weight",
        "patch_embed.proj.weight",
    ],
)
def test_embeddings_heads_and_positions_stay_the_bases(name: str) -> None:
    assert outcome(name, 8, 6) is Action.BASE


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.shared_experts.up_proj.weight",
        "model.layers.0.mlp.shared_expert.gate_proj.weight",
        "encoder.layer.0.attention.self.query.weight",
        "my_lm_head_adapter.weight",
        "swtew.weight",
    ],
)
def test_a_word_within_a_word_does_not_make_a_matrix_the_bases(name: str) -> None:
    assert outcome(name, 8, 6) is Action.DECOMPOSE


@pytest.mark.parametrize("shape", [(100, 6), (6, 100), (100,), (3, 100, 2)])
def test_a_dimension_of_the_vocabulary_makes_a_tensor_the_bases(shape: tuple[int, ...]) -> None:
    assert outcome("output.weight", *shape, vocab_size=100) is Action.BASE
    assert outcome("output.weight", *shape, vocab_size=99) is not Action.BASE
    assert outcome("output.weight", *shape, vocab_size=None) is not Action.BASE


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_scalars_and_vectors_are_averaged(shape: tuple[int, ...]) -> None:
    assert outcome("logit_scale", *shape) is Action.AVERAGE


@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (8, 3, 4, 4)])
def test_matrices_and_kernels_are_what_the_method_makes_of_matrices(shape: tuple[int, ...]) -> None:
    assert outcome("a.weight", *shape) is Action.DECOMPOSE
    assert outcome("a.weight", *shape, matrix_action=Action.AVERAGE) is Action.AVERAGE


def test_a_stack_is_decomposed_only_if_it_is_named_experts() -> None:
    assert outcome("mlp.experts.down_proj", 4, 5, 6) is Action.DECOMPOSE
    assert outcome("mlp.shared_experts.down_proj", 4, 5, 6) is Action.DECOMPOSE
    assert outcome("mlp.conv1d.weight", 4, 5, 6) is Action.AVERAGE


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (2, 3, 4, 5, 6, 7)])
def test_other_shapes_are_averaged(shape: tuple[int, ...]) -> None:
    assert outcome("mlp.experts.weight", *shape) is Action.AVERAGE


@pytest.mark.parametrize("shape", [(), (5,), (1, 512), (4, 5, 6)])
@pytest.mark.parametrize("name", ["embeddings.position_ids", "steps", "experts.map"])
def test_integers_must_equal_the_bases_whatever_their_name(
    name: str, shape: tuple[int, ...]
) -> None:
    assert outcome(name, *shape, floating=False, vocab_size=512) is Action.EQUAL


# --- policies ---


def test_the_first_matching_policy_wins_and_stands_before_the_defaults() -> None:
    rules = (
        Policy(match="*.gate.*", policy="base"),
        Policy(match="*.weight", policy="average"),
        Policy(match="*", policy="decompose"),
    )
    assert outcome("a.gate.weight", 4, 4, policies=rules) is Action.BASE
    assert outcome("a.up.weight", 4, 4, policies=rules) is Action.AVERAGE
    assert outcome("lm_head.kernel", 4, 4, policies=rules) is Action.DECOMPOSE
    assert outcome("a.bias", 4, policies=rules) is Action.DECOMPOSE


def test_a_policy_that_matches_nothing_changes_nothing() -> None:
    rules = (Policy(match="zzz*", policy="error"), Policy(match="A.*", policy="base"))
    assert outcome("a.weight", 4, 4, policies=rules) is Action.DECOMPOSE


def test_decompose_means_what_the_method_does_with_matrices() -> None:
    rules = (Policy(match="*", policy="decompose"),)
    got = outcome("wte.weight", 4, 4, policies=rules, matrix_action=Action.AVERAGE)
    assert got is Action.AVERAGE


def test_the_policy_error_refuses_the_tensor_by_name() -> None:
    with pytest.raises(RecipeError, match=r"a\.gate\.weight.*\*\.gate\.\*"):
        outcome("a.gate.weight", 4, 4, policies=(Policy(match="*.gate.*", policy="error"),))


@pytest.mark.parametrize("policy", ["average", "decompose"])
def test_a_policy_cannot_merge_integers(policy: str) -> None:
    with pytest.raises(RecipeError, match="position_ids"):
        outcome("position_ids", 4, floating=False, policies=(Policy(match="*", policy=policy),))


def test_a_policy_may_take_the_bases_integers_unseen() -> None:
    rules = (Policy(match="*", policy="base"),)
    assert outcome("position_ids", 4, floating=False, policies=rules) is Action.BASE


# --- the matrices of a tensor ---


def test_a_kernel_is_a_matrix_of_out_by_all_the_rest() -> None:
    (only,) = matrices("conv", shape=(8, 3, 4, 5), action=Action.DECOMPOSE)
    assert (only.id, only.tensor, only.start, only.m, only.n) == ("conv", "conv", 0, 8, 60)


def test_a_stack_is_one_matrix_a_slice() -> None:
    found = matrices("experts", shape=(3, 4, 5), action=Action.DECOMPOSE)
    assert [(p.id, p.start, p.m, p.n) for p in found] == [
        ("experts[0]", 0, 4, 5),
        ("experts[1]", 20, 4, 5),
        ("experts[2]", 40, 4, 5),
    ]
    assert {p.tensor for p in found} == {"experts"}


def test_what_is_averaged_travels_flat_under_an_id_of_its_own() -> None:
    (flat,) = matrices("a", shape=(4, 5), action=Action.AVERAGE)
    (whole,) = matrices("a", shape=(4, 5), action=Action.DECOMPOSE)
    assert (flat.m, flat.n, flat.rank) == (1, 20, 1)
    assert (whole.m, whole.n, whole.rank) == (4, 5, 4)
    assert flat.id != whole.id


def test_a_vector_that_a_policy_decomposes_is_one_row() -> None:
    (row,) = matrices("bias", shape=(7,), action=Action.DECOMPOSE)
    assert (row.m, row.n, row.rank) == (1, 7, 1)


@given(
    shape=st.lists(st.integers(0, 5), max_size=5),
    action=st.sampled_from(list(Action)),
)
def test_the_matrices_of_a_tensor_cover_every_element_once_in_order(
    shape: list[int], action: Action
) -> None:
    position = 0
    for part in matrices("t", shape=shape, action=action):
        assert part.start == position
        assert part.action is action
        position += part.numel
    assert position == math.prod(shape)


# --- budgets ---


def test_a_share_that_floats_just_below_a_whole_number_is_that_number() -> None:
    assert math.floor(0.29 * 100) == 28
    assert budget(0.1, rank=30) == 3
    assert budget(0.29, rank=100) == 29
    assert budget(0.57, rank=100) == 57


@pytest.mark.parametrize(
    ("k", "rank", "expected"),
    [(0.1, 768, 76), (0.1, 5, 1), (1.0, 7, 7), (38, 20, 20), (38, 768, 38), (1, 9, 1), (1.0, 9, 9)],
)
def test_a_budget_is_a_floored_share_or_a_clamped_count(k: float, rank: int, expected: int) -> None:
    assert budget(k, rank=rank) == expected


@given(
    k=st.one_of(st.integers(1, 10**9), st.floats(1e-9, 1.0, exclude_min=True)),
    rank=st.integers(1, 10**6),
)
def test_a_budget_is_at_least_one_and_at_most_the_rank(k: int | float, rank: int) -> None:
    assert 1 <= budget(k, rank=rank) <= rank


@given(num=st.integers(1, 1000), rank=st.integers(1, 5000))
def test_a_share_of_a_thousand_is_exact(num: int, rank: int) -> None:
    assert budget(num / 1000, rank=rank) == max(1, num * rank // 1000)


@given(one=st.floats(1e-6, 1.0), other=st.floats(1e-6, 1.0), rank=st.integers(1, 5000))
def test_a_larger_share_never_keeps_less(one: float, other: float, rank: int) -> None:
    small, large = sorted((one, other))
    assert budget(small, rank=rank) <= budget(large, rank=rank)


# --- whole differences ---


def test_a_matrix_merged_whole_is_stored_flat_and_ends_as_its_own_factors() -> None:
    (kernel,) = matrices("a.weight", shape=(8, 3, 4, 4), action=Action.WHOLE)
    assert (kernel.id, kernel.source_id, kernel.m, kernel.n) == (
        "a.weight", "a.weight#flat", 8, 48,
    )  # fmt: skip
    assert (kernel.rank, kernel.is_factored) == (1, True)
    stack = matrices("experts", shape=(2, 4, 5), action=Action.WHOLE)
    assert [p.source_id for p in stack] == ["experts[0]#flat", "experts[1]#flat"]
    (vector,) = matrices("b", shape=(7,), action=Action.ELEMENTWISE)
    assert (vector.id, vector.source_id, vector.is_factored) == ("b#flat", "b#flat", False)


def test_a_policy_of_average_stands_before_the_methods_own_rule_for_vectors() -> None:
    def of(name: str, *policies: Policy) -> Action:
        return action_of(
            name, shape=(4,), floating=True, policies=policies, vocab_size=None,
            matrix_action=Action.WHOLE, vector_action=Action.ELEMENTWISE,
        )  # fmt: skip

    assert of("a.bias") is Action.ELEMENTWISE
    assert of("a.bias", Policy(match="*", policy="average")) is Action.AVERAGE
    assert of("a.bias", Policy(match="*", policy="decompose")) is Action.WHOLE
