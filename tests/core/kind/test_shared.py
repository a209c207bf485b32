import pytest
import torch

from svdmerge.core.components import RankOneComponents
from svdmerge.core.kind.shared import chance_edge, shared_directions, take_apart
from svdmerge.core.svd import exact

M, N = 40, 30


def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def planted(num_sources, *, shared=(5.0, 4.0), own=(3.0, 2.0), signs=None, sharing=None):
    """Sources with the same leading components, as far as they share, and private ones."""
    per = len(own)
    u, v = (orthonormal(d, len(shared) + num_sources * per, seed=d) for d in (M, N))
    sources = []
    for i in range(num_sources):
        dense = torch.zeros(M, N, dtype=torch.float64)
        for j, s in enumerate(shared):
            if sharing is None or i in sharing:
                dense += (signs[i] if signs else 1.0) * s * torch.outer(u[:, j], v[:, j])
        for j, s in enumerate(own):
            at = len(shared) + i * per + j
            dense += s * torch.outer(u[:, at], v[:, at])
        found = exact(dense)
        sources.append(found.slice(0, int((found.s > 1e-9).sum())))
    common = (u[:, : len(shared)] * torch.tensor(shared, dtype=torch.float64)) @ v[
        :, : len(shared)
    ].T
    return sources, common


def test_planted_shared_components_become_learngenes_and_private_ones_tailors():
    sources, common = planted(5)
    found = take_apart(sources, num_tailors=10)
    assert len(found.learngenes) == 2
    torch.testing.assert_close(found.learngenes.dense(), common, atol=1e-10, rtol=0)
    for source, tailors in zip(sources, found.tailors, strict=True):
        assert len(tailors) == 2
        torch.testing.assert_close(tailors.s, torch.tensor([3.0, 2.0]).double())
        torch.testing.assert_close(
            found.learngenes.dense() + tailors.dense(), source.dense(), atol=1e-10, rtol=0
        )


def test_sources_of_equal_strength_that_share_nothing_have_no_learngenes():
    # Equal values tie in the joint SVD, whose directions then mix all sources.
    sources, _ = planted(5, shared=(), own=(1.0, 1.0))
    found = take_apart(sources, num_tailors=10)
    assert len(found.learngenes) == 0
    for source, tailors in zip(sources, found.tailors, strict=True):
        torch.testing.assert_close(tailors.dense(), source.dense(), atol=1e-10, rtol=0)


def test_what_three_of_five_share_is_a_learngene_and_what_two_share_is_none():
    assert len(take_apart(planted(5, sharing={0, 2, 4})[0], num_tailors=9).learngenes) == 2
    assert len(take_apart(planted(5, sharing={0, 2})[0], num_tailors=9).learngenes) == 0


def test_opposite_changes_along_one_direction_are_no_learngene():
    sources, _ = planted(4, signs=(1.0, -1.0, 1.0, -1.0))
    assert len(take_apart(sources, num_tailors=10).learngenes) == 0


def test_a_source_without_the_shared_change_is_still_told_exactly():
    sources, _ = planted(5, sharing={0, 1, 2})
    found = take_apart(sources, num_tailors=20)
    assert len(found.learngenes) == 2
    for source, tailors in zip(sources, found.tailors, strict=True):
        rebuilt = found.learngenes.dense() + tailors.dense()
        torch.testing.assert_close(rebuilt, source.dense(), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("num", "rank"), [(2, 20), (4, 40), (8, 20), (8, 80)])
def test_random_spans_share_nothing_and_come_close_to_the_edge_of_chance(num, rank):
    m = 200
    spans = [orthonormal(m, rank, seed=i) for i in range(num)]
    largest = float(torch.linalg.matrix_norm(torch.cat(spans, dim=1), ord=2)) ** 2 / num
    edge = chance_edge(num, share=rank / m)
    # Tracy-Widom fluctuations at m = 200 are about m^(-2/3) = 3 %.
    assert largest == pytest.approx(edge, rel=0.04)
    noisy = shared_directions(spans)
    assert noisy.shape[1] <= 1


def test_a_single_source_is_all_learngenes():
    source = exact(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))).slice(0, 2)
    found = take_apart([source], num_tailors=5)
    torch.testing.assert_close(found.learngenes.dense(), source.dense())
    assert len(found.tailors[0]) == 0


def test_empty_sources_have_neither():
    empty = RankOneComponents(u=torch.zeros(6, 0), s=torch.zeros(0), vh=torch.zeros(0, 4))
    found = take_apart([empty, empty], num_tailors=5)
    assert len(found.learngenes) == len(found.tailors[0]) == 0
    assert found.explained == 0.0
