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
from holoslide.pixels import Pixels
from holoslide.streaming.tiled import OutputGradient
from holoslide.training.objective import Loss, Objective


@dataclass(frozen=True, slots=True)
class StepResult:
    """Losses and logits of the K modules for one slide; the last logits are the prediction's."""

    classification: tuple[float, ...]
    reconstruction: tuple[float, ...]
    logits_KL: Tensor


class LocalStep:
    """The step of one slide: adds every module's gradients to `.grad`; no weight changes."""

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
        heads_alone: bool = False,
    ) -> StepResult:
        """`scale` multiplies the gradients (1 / slides per optimiser step); `generator` draws dropout, patches.

        With `heads_alone` only heads and decoders get gradients, which costs little more than a prediction.
        """
        network, losses = self.network, list[Loss]()
        features = network.stem_map(slide, training=True)  # frozen
        for group in network.groups:
            # Up to a gradient barrier: one module, as in the paper, unless fewer barriers were asked for.
            maps, gradients = [features], list[OutputGradient]()
            for k in group:
                output = network.part_map(k, maps[-1], training=True, backward=not heads_alone)
                # The head's and the decoder's own gradients are added here.
                loss, gradient = self.objectives[k].loss_and_gradient(
                    output, maps[-1], label, generator=generator, scale=scale
                )
                losses.append(loss)
                maps.append(output)
                gradients.append(gradient)
            network.backward(group, maps, gradients, heads_alone=heads_alone)
            del gradient, gradients  # they hold the heads' cells
            for features in maps[:-1]:
                features.free()
            features = maps[-1]  # values only: nothing flows back
        features.free()
        return StepResult(
            tuple(torch.stack([loss.classification for loss in losses]).tolist()),
            tuple(torch.stack([loss.reconstruction for loss in losses]).tolist()),
            torch.stack([loss.logits_L for loss in losses]),
        )
