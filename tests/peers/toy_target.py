"""A frozen module with attention, a target that it separates badly, and made-up sources."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from svdmerge.core.components import RankOneComponents
from svdmerge.core.svd import exact
from svdmerge.core.transfer import LinearHead
from svdmerge.peers.objectives import Classification
from svdmerge.peers.space import Weights, WeightSpace
from svdmerge.peers.train import Trained, TrainSettings, train

TOKENS, WIDTH, INNER, CLASSES = 3, 12, 20, 3
MATRICES = ("attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "down.weight")
SETTINGS = TrainSettings(epochs=6, batch_size=8, learning_rate=0.03, head_learning_rate=0.01)


class ToyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        mixed, _ = self.attention(inputs, inputs, inputs, need_weights=False)
        hidden = self.norm(inputs + mixed)
        return (hidden + self.down(torch.tanh(self.up(hidden)))).mean(dim=1)


def toy_net(seed: int = 0) -> ToyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ToyNet().eval().requires_grad_(False)
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


class Target:
    """Examples whose class is a direction that all tokens share, under noise."""

    def __init__(self, num_examples: int = 24) -> None:
        generator = torch.Generator().manual_seed(1)
        self.net = toy_net()
        self.base: Weights = dict(self.net.named_parameters())
        self.labels = torch.arange(num_examples) % CLASSES
        centres = torch.randn(CLASSES, WIDTH, generator=generator)
        noise = torch.randn(num_examples, TOKENS, WIDTH, generator=generator)
        self.inputs = centres[self.labels][:, None] + 0.3 * noise
        weight = 0.1 * torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
        self.head = LinearHead(weight=weight, bias=weight.new_zeros(CLASSES))

    def features(self, weights: Weights, rows: list[int]) -> Tensor:
        return functional_call(self.net, dict(weights), (self.inputs[rows],))

    def objective(self) -> Classification:
        return Classification(self.labels, head=self.head)

    def train(self, space: WeightSpace, settings: TrainSettings = SETTINGS) -> Trained:
        return train(self.features, space=space, objective=self.objective(), settings=settings)


def differences(base: Weights, *, seed: int, size: float = 0.1) -> dict[str, Tensor]:
    """A made-up source: its differences to the base in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(w.shape, generator=generator) for n, w in base.items()}


def components(source: Weights) -> dict[str, RankOneComponents]:
    return {name: exact(source[name]) for name in MATRICES}
