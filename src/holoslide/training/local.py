"""Locally supervised learning on a whole slide (arXiv 2207.08267), streamed: memory does not grow with the slide.

The network is cut into K modules. Each is trained by a loss of its own, and no gradient crosses the border
between two modules, so only one module's activations are alive at a time. Each module runs tile by tile, and the
tiles' gradients add up to the gradient of the whole slide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holoslide.models.streamed import StreamedClassifier
from holoslide.streaming.features import Pixels
from holoslide.streaming.tiled import backward_readers
from holoslide.training.objective import Loss, Objective


@dataclass(frozen=True, slots=True)
class StepResult:
    """Losses and logits of the K modules for one slide; the last logits are the prediction's."""

    classification: tuple[float, ...]
    reconstruction: tuple[float, ...]
    logits_KL: Tensor


class LocalStep:
    """The step of one slide: adds every module's gradients to `.grad`, and changes nothing else."""

    def __init__(self, network: StreamedClassifier, *, class_weights: Tensor | None = None) -> None:
        self.network = network
        self.objectives = [
            Objective(network, k, class_weights=class_weights) for k in range(len(network.parts))
        ]

    def __call__(
        self,
        slide: Pixels,
        label: int,
        *,
        generator: torch.Generator,
        scale: float = 1.0,
        backbone: bool = True,
    ) -> StepResult:
        """`scale` multiplies the gradients (1 / slides per optimiser step); `generator` draws dropout, patches.

        Without `backbone` only heads and decoders get gradients, which costs little more than a prediction.
        """
        network, losses = self.network, list[Loss]()
        features = network.stem_map(slide, training=True)  # frozen
        for k, objective in enumerate(self.objectives):
            output = network.part_map(k, features, training=True, backward=backbone)
            loss, pull = objective(output, features, label, generator=generator, scale=scale)
            if backbone:
                network.parts[k].backward(pull)
            else:
                backward_readers(network.parts[k].segments[-1], output, pull)
            losses.append(loss)
            del pull  # it holds the head's cells
            features.free()
            features = output  # values only: nothing flows back
        features.free()
        return StepResult(
            tuple(torch.stack([loss.classification for loss in losses]).tolist()),
            tuple(torch.stack([loss.reconstruction for loss in losses]).tolist()),
            torch.stack([loss.logits_L for loss in losses]),
        )
