"""A matrix by its products: the same from its rows, however they are cut."""

import pytest
import torch
from torch import Tensor

from svdmerge.core.blocks import lanczos_block, next_block
from svdmerge.core.components import none
from svdmerge.core.delta import delta
from svdmerge.core.products import Dense, image, step


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("height", [1, 7, 700])
def test_products_of_tiles_are_those_of_the_matrix(height: int) -> None:
    a, x = drawn(50, 30), drawn(30, 4, seed=1)
    y, z = step(a.split(height), x)
    assert torch.allclose(y, a @ x, rtol=0, atol=1e-12)
    assert torch.allclose(z, a.T @ (a @ x), rtol=0, atol=1e-11)
    assert torch.allclose(image(a.split(height), x), a @ x, rtol=0, atol=1e-12)


def test_an_image_is_in_float64_whatever_the_products_are_in() -> None:
    a, x = drawn(50, 30), drawn(30, 4, seed=1)
    matrix = Dense(a, torch.float32)
    assert torch.allclose(matrix.image(x), a @ x, rtol=0, atol=1e-12)
    assert matrix.step(x.float())[0].dtype == torch.float32
    assert torch.allclose(matrix.pulled(a[:, :2].float()).double(), a.T @ a[:, :2], atol=1e-3)


@pytest.mark.parametrize("shape", [(160, 300), (300, 160)])
def test_a_block_from_products_is_that_of_the_matrix_turned_or_not(shape: tuple[int, int]) -> None:
    u, v = (torch.linalg.qr(drawn(d, 160, seed=d)).Q for d in shape)
    a = (u * torch.arange(1, 161) ** -0.7) @ v.T
    fro = float(torch.linalg.vector_norm(a))
    found = lanczos_block(
        lambda dtype: Dense(a, dtype), shape=shape, stored=lambda: none(*shape), fro=fro,
        parameter="x", steps=lambda _: 10,
    )  # fmt: skip
    expected = next_block(a, stored=none(*shape), fro=fro, parameter="x")
    assert found is not None
    assert len(found.components) == len(expected.components) == 16
    assert torch.allclose(found.components.s, expected.components.s, rtol=1e-9)
    assert torch.allclose(found.components.dense(), expected.components.dense(), atol=1e-5)
    assert found.bound >= 17**-0.7


def test_noise_that_nothing_converges_of_at_first_does_after_starting_again() -> None:
    a = drawn(1000, 1300).float()
    fro = float(torch.linalg.vector_norm(a.double()))

    def found(restarts: int) -> int:
        block = lanczos_block(
            lambda dtype: Dense(a, dtype), shape=(1000, 1300), stored=lambda: none(1000, 1300),
            fro=fro, parameter="x", steps=lambda _: 10, restarts=restarts,
        )  # fmt: skip
        return 0 if block is None else len(block.components)

    assert found(0) == 0
    assert found(8) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_differences_in_float32_are_those_in_float64_rounded_once(dtype: torch.dtype) -> None:
    source, base = drawn(9, 8).to(dtype), drawn(9, 8, seed=1).to(dtype)
    buffers = torch.empty(2, 9, 8)
    exact = delta(source, base=base).float()
    assert torch.equal(delta(source, base=base, dtype=torch.float32), exact)
    assert torch.equal(delta(source, base=base, dtype=torch.float32, buffers=buffers), exact)
