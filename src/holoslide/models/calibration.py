"""BatchNorm statistics for a network without pretrained weights.

The method keeps the pretrained statistics for good. A network that starts from nothing has none, and frozen at
mean 0 and variance 1 its BatchNorms would normalise nothing. So they are measured once, on windows of the training
slides, and then frozen like pretrained ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from holoslide.models.classifier import LocalClassifier


@torch.no_grad()
def calibrate(model: LocalClassifier, windows_BCHW: Tensor) -> None:
    """Set the backbone's BatchNorm statistics to those of a batch of normalised windows, (B, 3, H, W)."""
    norms = [m for m in (*model.stem.modules(), *model.parts.modules()) if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the batch's own statistics, not a moving average
        norm.train()
    features_BCHW = model.stem(windows_BCHW)
    for part in model.parts:
        features_BCHW = part(features_BCHW)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(model.training)  # puts the backbone back into evaluation mode
