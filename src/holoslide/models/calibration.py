"""BatchNorm statistics for a network without pretrained weights.

The method keeps the pretrained statistics for good. A network that starts from nothing has none, and frozen at
mean 0 and variance 1 its BatchNorms would normalise nothing. So they are measured once, on windows of the training
slides, and then frozen like pretrained ones. Heads without a norm over the slide get a scale and a shift to begin
with that normalise their cells on the same windows.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from holoslide.models.classifier import LocalClassifier
from holoslide.models.heads import Head
from holoslide.models.readout import CellScale


@torch.no_grad()
def calibrate(model: LocalClassifier, windows_BCHW: Tensor) -> None:
    """Set BatchNorm statistics, and the heads' first scales, by a batch of normalised windows, (B, 3, H, W)."""
    norms = [m for m in (*model.stem.modules(), *model.parts.modules()) if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the batch's own statistics, not a moving average
        norm.train()
    features_BCHW = model.stem(windows_BCHW)
    for part, head in zip(model.parts, cast("list[Head]", model.heads), strict=True):
        features_BCHW = part(features_BCHW)
        scale = head.readout.norm
        if isinstance(scale, CellScale):
            variance_C, mean_C = torch.var_mean(head.stem(features_BCHW), dim=(0, 2, 3))
            scale.weight.copy_(torch.rsqrt(variance_C + 1e-5))
            scale.bias.copy_(-mean_C * scale.weight)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(model.training)  # puts the backbone back into evaluation mode
