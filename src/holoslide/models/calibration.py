"""Statistics that are measured once, on windows of the training slides, and then frozen.

The method keeps the pretrained BatchNorm statistics for good. A network that starts from nothing has none, and at
mean 0 and variance 1 its BatchNorms would normalise nothing; heads of norm "cohort" begin with none, either.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from holoslide.models.classifier import LocalClassifier
from holoslide.models.heads import Head, StandardConv


def needs_statistics(model: LocalClassifier, *, fresh: bool) -> bool:
    """Whether something is to be measured: of a model that is not `fresh`, heads that never were."""
    return bool(_norms(model, fresh=fresh) or _stems(model))


@torch.no_grad()
def calibrate(model: LocalClassifier, windows_BCHW: Tensor, *, fresh: bool = True) -> None:
    """Set what has no statistics to those of a batch of normalised windows, (B, 3, H, W)."""
    norms, stems = _norms(model, fresh=fresh), _stems(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the batch's own statistics, not a moving average
        norm.train()
    features_BCHW = model.stem(windows_BCHW)
    for part, head in zip(model.parts, cast("list[Head]", model.heads), strict=True):
        features_BCHW = part(features_BCHW)
        if isinstance(head.stem, StandardConv) and head.stem in stems:
            head.stem.measure(features_BCHW)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(model.training)  # puts the backbone back into evaluation mode


def _norms(model: LocalClassifier, *, fresh: bool) -> list[_BatchNorm]:
    """Of a backbone that starts from nothing."""
    if not fresh or model.config.backbone.weights != "none":
        return []
    return [m for m in (*model.stem.modules(), *model.parts.modules()) if isinstance(m, _BatchNorm)]


def _stems(model: LocalClassifier) -> list[StandardConv]:
    stems = [head.stem for head in cast("list[Head]", model.heads)]
    return [stem for stem in stems if isinstance(stem, StandardConv) and not stem.is_measured]
