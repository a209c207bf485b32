"""GPT-2's linear layers hold their weight as (in, out); they tune like any other."""

import torch
from torch import nn

from svdmerge.core import svd
from svdmerge.core.factored import install


class Conv1D(nn.Module):
    """As transformers' layer of this name."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_in, num_out))
        self.bias = nn.Parameter(torch.randn(num_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_a_weight_stored_as_in_by_out_trains_the_directions_of_that_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 7))
    components = svd.exact(torch.randn(5, 7)).slice(0, 3)
    weight, bias = (p.detach().clone() for p in model.parameters())
    x = torch.randn(2, 4, 5)
    layers = install(model, directions={"0.weight": components})
    torch.testing.assert_close(model(x), x @ weight + bias)
    with torch.no_grad():
        layers["0.weight"].sigma_change.copy_(torch.tensor([0.5, -1.0, 2.0]))
    change = components.u * torch.tensor([0.5, -1.0, 2.0]) @ components.vh
    moved = weight + change.float()
    torch.testing.assert_close(model(x), x @ moved + bias)
