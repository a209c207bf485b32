"""A small ResNet with timm's names of layers, as transformers' models are saved and loaded."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


class TimmLikeConfig(PreTrainedConfig):
    model_type = "timm_like"


class BasicBlock(nn.Module):
    def __init__(self, inner: int, outer: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        shortcut = nn.Conv2d(inner, outer, 1, stride=stride, bias=False)
        self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class TimmLikeResNet(PreTrainedModel):
    config_class = TimmLikeConfig

    def __init__(self, config: TimmLikeConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(BasicBlock(8, 12, stride=1))
        self.layer2 = nn.Sequential(BasicBlock(12, 16, stride=2))
        self.fc = nn.Linear(16, 3)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Any:
        x = self.bn1(self.conv1(pixel_values)).relu()
        x = self.layer2(self.layer1(x))
        return {"logits": self.fc(x.mean((2, 3)))}


def build(config: dict[str, Any]) -> TimmLikeResNet:
    """What `tune.model` names."""
    return TimmLikeResNet(TimmLikeConfig())


def settled(model: TimmLikeResNet) -> TimmLikeResNet:
    """The model, its running statistics those of some images: no layer's are the defaults."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 8, 8))
    return model.eval()
