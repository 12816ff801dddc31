"""A training run: epochs of accumulated steps, validation, the best model, and a checkpoint after each epoch.

Nothing here depends on time, on the number of processes, or on whether the run was interrupted: what is random
is a function of (seed, epoch, slide), and what is learned a function of the settings and the slides.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from holoslide.errors import CheckpointError, CohortError, SlideError
from holoslide.files import write_rows
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import StreamConfig
from holoslide.models.precision import mixed_dtype
from holoslide.models.streamed import StreamedClassifier
from holoslide.pixels import Pixels
from holoslide.slides.augment import AugmentConfig
from holoslide.slides.raster import Raster
from holoslide.streaming.host import hand_back_freed
from holoslide.training import checkpoint
from holoslide.training.averaging import Average
from holoslide.training.checkpoint import Checkpoint, Identity, Position
from holoslide.training.history import Row, best_row, module_auroc, numbered, peaks
from holoslide.training.local import LocalStep, StepResult
from holoslide.training.options import TrainConfig
from holoslide.training.parallel import (
    idle,
    launch,
    others,
    same_start,
    share,
    sum_gradients,
    sum_over_ranks,
    together,
)
from holoslide.training.planning import plan_run
from holoslide.training.progress import Progress, Reporter, RunFacts, Silent, SlideDone
from holoslide.training.samples import OpenPixels, Sample, Slides

LAST = "last.ckpt"  # in the run's folder; beside it best/, history.csv and tensorboard/
_CHANGES_NOTHING = ("accelerator", "devices", "nodes", "log_every", "checkpoint_minutes")


@dataclass(frozen=True, slots=True)
class FitResult:
    """`best` is a model directory, `last` the checkpoint of the last epoch, `best_epoch` counts from 1.

    The model that was given holds the last weights, not the best. Every rank gets the same result; what must
    happen once is for `rank` 0 of `ranks`.
    """

    best: Path
    last: Path
    history: list[Row]
    best_epoch: int
    rank: int = 0
    ranks: int = 1


def fit(
    model: LocalClassifier,
    train: Sequence[Sample],
    valid: Sequence[Sample],
    *,
    config: TrainConfig,
    stream: StreamConfig,
    augment: AugmentConfig,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    open_pixels: OpenPixels = Raster.open,
    on_start: Callable[[], None] | None = None,
) -> FitResult:
    """Train a model, in place, and keep the best by the validation slides; `out` gets all files.

    `resume` goes on from the checkpoint in `out`, or starts where there is none yet, and ends with the weights
    of a run that was never interrupted. `on_start` is called, on rank 0, once it is sure that the run in `out` is
    this one, or none. Raises `SlideError`, with its name, for a slide that cannot be opened or run, `CohortError`
    where the slides do not allow it, `CheckpointError` where `out` holds another run, or one under way,
    `ModelError` for a model that could not be loaded again, and `HoloslideError` where another process of the run
    has ended.
    """
    model.refuse_changed()
    if (out / LAST).exists() and not resume:
        raise CheckpointError(out, "holds a run already", "resume it, or train into another folder")
    slides = Slides(train, valid, open_pixels=open_pixels, augment=augment, seed=config.seed)
    fabric = launch(config)
    with checkpoint.alone(out) if fabric.is_global_zero else nullcontext():
        run = _Run(model, slides, fabric, config=config, stream=stream, out=out)
        if resume and (out / LAST).exists():
            run.resume()
        if on_start is not None and fabric.is_global_zero:
            on_start()
        return run.to_the_end(progress or Silent())


class _Run:
    """One run: what stays (slides, settings), what changes (weights, optimiser, position), what it writes."""

    def __init__(
        self,
        model: LocalClassifier,
        slides: Slides,
        fabric: Fabric,
        *,
        config: TrainConfig,
        stream: StreamConfig,
        out: Path,
    ) -> None:
        self.slides, self.fabric, self.config, self.out = slides, fabric, config, out
        self.model = model.to(fabric.device)
        same_start(fabric, model)
        self.mixed = mixed_dtype(config.precision, fabric.device)
        self.network = StreamedClassifier(model, stream, mixed=self.mixed)
        self.modules = len(self.network.heads)
        self.weights = self._class_weights()
        self.step = LocalStep(self.network, class_weights=self.weights)
        self.optimizer = _optimizer(model, config)
        self.average = Average(model, config.average)
        self.rates = config.rates()
        self.steps_per_epoch = math.ceil(len(slides.train) / config.accumulate)
        self.position = Position()
        self.identity = _identity(model, slides, config, self.mixed)
        self.saved_at = time.monotonic()

    # --- The course of a run ------------------------------------------------------------------------------------

    def to_the_end(self, progress: Progress) -> FitResult:
        """All epochs that are left; an early stop is a function of the history alone."""
        self.optimizer.zero_grad()  # of a model that was given
        self.plan = plan_run(
            self.network, self.slides, self.fabric, self.out,
            nodes=self.config.nodes, held_bytes=self.average.size_bytes, begun=self._steps() > 0,
        )  # fmt: skip
        # Of a run that goes on, what its last life logged after the checkpoint does not count.
        self.logger = TensorBoardLogger(self.out, "tensorboard", "", purge_step=self._steps() + 1)
        reports_to = progress if self.fabric.is_global_zero else Silent()
        self.reporter = Reporter(reports_to, self.slides, self.position, facts=self._facts())
        while self.position.epoch < self.config.epochs and not self._is_exhausted():
            self.train_epoch()
            with self.average.in_place():
                valid = self.validate()
            self.end_epoch(valid)
        self.logger.finalize("success")
        with together(self.fabric):
            self.fabric.barrier()  # every rank finds the files written
        return FitResult(
            self.out / "best", self.out / LAST, self.position.history, self._best() + 1,
            rank=self.fabric.global_rank, ranks=self.fabric.world_size,
        )  # fmt: skip

    def train_epoch(self) -> None:
        """The optimiser steps of an epoch that are left; the last group may be smaller, and is a step too."""
        self.network.follow(self.plan.train)
        groups = self.slides.order(self.position.epoch, self.config.accumulate)
        for group in groups[self.position.group :]:
            started = time.monotonic()
            losses = self.train_group(group)
            self.position.losses += losses
            self.position.group += 1
            self.position.seconds += time.monotonic() - started
            self._log_step(losses)
            if time.monotonic() - self.saved_at >= 60 * self.config.checkpoint_minutes:
                self.save_last()

    def train_group(self, group: Sequence[int]) -> list[list[float]]:
        """One optimiser step: the mean gradient of a group of slides, shared out over ranks by tissue area."""
        losses = torch.zeros(len(group), 2 * self.modules, dtype=torch.float64)
        mine = share([self.slides.train_px[index] for index in group], self.fabric.world_size)
        for place in mine[self.fabric.global_rank]:
            result = self.train_slide(group[place], scale=1 / len(group))
            losses[place] = torch.tensor(result.classification + result.reconstruction, dtype=losses.dtype)
            self.reporter.train(group[place], result.classification, result.reconstruction)
        sum_gradients(self.fabric, _trained(self.optimizer, backbone=self._backbone_rate() > 0))
        for rates in self.optimizer.param_groups:
            rates["lr"] = rates["initial_lr"] * self._rate()
            if rates["name"] == "backbone":
                rates["lr"] *= self._backbone_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()  # here and not before the next one: validation's plan has no room for them
        self.average.update(self._steps())
        self.reporter.others("train", [group[place] for place in others(mine, self.fabric.global_rank)])
        rows: list[list[float]] = sum_over_ranks(self.fabric, losses).tolist()
        return rows

    def train_slide(self, index: int, *, scale: float) -> StepResult:
        """Add one slide's gradients, times `scale`."""
        epoch, sample = self.position.epoch, self.slides.train[index]
        generator = self.slides.generator(epoch, index)
        with self.slides.open_train(epoch, index) as pixels:
            result = self.step(
                pixels,
                sample.target,
                generator=generator,
                scale=scale,
                heads_alone=self._backbone_rate() == 0,
            )
        hand_back_freed()
        _refuse_infinite(sample, result.classification + result.reconstruction)
        return result

    def validate(self) -> Row:
        """Losses and AUROC of all K heads on the validation slides, as they are and without gradients."""
        started, slides = time.monotonic(), self.slides
        self.network.follow(self.plan.valid)
        targets = torch.tensor([sample.target for sample in slides.valid])
        logits_NKL = torch.zeros(len(targets), self.modules, len(self.model.classes), dtype=torch.float64)
        losses_NK = torch.zeros(len(targets), self.modules, dtype=torch.float64)
        mine = share(slides.valid_px, self.fabric.world_size)
        for index in mine[self.fabric.global_rank]:
            with slides.open_valid(index) as pixels:
                logits_NKL[index] = self.logits(pixels)
            losses_NK[index] = self._loss(logits_NKL[index], slides.valid[index].target)
            _refuse_infinite(slides.valid[index], losses_NK[index].tolist())
            self.reporter.valid(index, tuple(losses_NK[index].tolist()))
        self.reporter.others("valid", others(mine, self.fabric.global_rank))
        probabilities_NKL = sum_over_ranks(self.fabric, logits_NKL).softmax(dim=2).numpy()
        losses_K = sum_over_ranks(self.fabric, losses_NK).mean(dim=0)
        self.position.seconds += time.monotonic() - started
        return numbered("valid/loss", losses_K.tolist()) | numbered(
            "valid/auroc",
            [module_auroc(targets.numpy(), probabilities_NKL[:, k]) for k in range(self.modules)],
        )

    @torch.no_grad()
    def logits(self, slide: Pixels) -> Tensor:
        """What the K heads say about a slide, (K, L)."""
        return torch.stack(
            [head.readout(cells.cells_NC).double().cpu() for head, _, cells in self.network.read(slide)]
        )

    def end_epoch(self, valid: Row) -> None:
        """Write what the epoch came to: the model if it is the best, the log, then the checkpoint, then the table.

        In this order a run that is killed in between does the end of its epoch again, and the same.
        """
        position, losses = self.position, np.mean(self.position.losses, axis=0)
        row: Row = {"epoch": position.epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= numbered("train/classification", losses[: self.modules].tolist())
        row |= numbered("train/reconstruction", losses[self.modules :][: len(self.model.decoders)].tolist())
        row |= valid | {"seconds": position.seconds} | peaks(self.fabric.device)
        position.history.append(row)
        position.next_epoch()
        is_best = self._best() == len(position.history) - 1
        if self.fabric.is_global_zero:
            if is_best:
                with self.average.in_place():
                    checkpoint.replace_folder(self.out / "best", self.model.save)
            self.logger.log_metrics(row, self._steps())
            self.save_last()
            write_rows(position.history, self.out / "history.csv")
        self.reporter.epoch_done(row, is_best=is_best)

    # --- Checkpoints --------------------------------------------------------------------------------------------

    def save_last(self) -> None:
        """Write the checkpoint; between two optimiser steps only, when no gradient is pending."""
        self.saved_at = time.monotonic()
        if self.fabric.is_global_zero:
            self.logger.save()  # what was logged up to here would not be logged again
            state = (self.model.state_dict(), self.average.state(), self.optimizer.state_dict())
            checkpoint.save(Checkpoint(*state, self.position, self.identity), self.out / LAST)

    def resume(self) -> None:
        """Go on from the checkpoint."""
        saved = checkpoint.load(self.out / LAST, identity=self.identity)
        self.model.load_state_dict(saved.model)
        self.average.restore(saved.average)
        self.optimizer.load_state_dict(saved.optimizer)
        self.position = saved.position
        if self.fabric.is_global_zero and self.position.history:
            write_rows(self.position.history, self.out / "history.csv")  # it may have been killed before this

    # --- Rates, weights, the best epoch -------------------------------------------------------------------------

    def _steps(self) -> int:
        return self.position.epoch * self.steps_per_epoch + self.position.group

    def _backbone_rate(self) -> float:
        """Of the backbone, times `_rate`; 0 while the heads learn alone."""
        return self.rates.backbone_factor(self._steps(), steps_per_epoch=self.steps_per_epoch)

    def _rate(self) -> float:
        return self.rates.factor(self._steps(), steps_per_epoch=self.steps_per_epoch)

    def _best(self) -> int:
        return best_row(self.position.history, monitor=self.config.monitor, modules=self.modules)

    def _is_exhausted(self) -> bool:
        done = len(self.position.history)
        return 0 < self.config.patience < done and done - 1 - self._best() >= self.config.patience

    def _class_weights(self) -> Tensor | None:
        """L weights whose mean over the training slides is 1."""
        targets = [sample.target for sample in (*self.slides.train, *self.slides.valid)]
        classes = self.model.classes
        if not all(0 <= target < len(classes) for target in targets):
            raise CohortError(
                "targets", f"reach {max(targets)}", f"the model has classes 0 to {len(classes) - 1}"
            )
        if self.config.monitor == "auroc" and len({s.target for s in self.slides.valid}) < 2:
            raise CohortError("valid", "holds one class, so it has no AUROC", "set train.monitor to loss")
        counts = torch.bincount(torch.tensor(targets[: len(self.slides.train)]), minlength=len(classes))
        if not counts.all():  # it would be told of as learnt, and be an answer that is never given
            missing = classes[int(counts.argmin())]
            remedy = "mend what was left out, or leave the class out of the table"
            raise CohortError("train", f"holds no slide of class {missing}", remedy)
        if self.config.class_weights == "none":
            return None
        weights = len(self.slides.train) / (len(classes) * counts.double())
        return weights.to(self.network.device, self.network.dtype)

    def _loss(self, logits_KL: Tensor, target: int) -> Tensor:
        """The classification loss of K heads, (K,), weighted as in training."""
        weight = 1.0 if self.weights is None else float(self.weights[target])
        targets = torch.full((len(logits_KL),), target)
        return weight * F.cross_entropy(logits_KL, targets, reduction="none")

    def _log_step(self, losses: Sequence[Sequence[float]]) -> None:
        if self._steps() % self.config.log_every == 0:
            mean = np.mean(losses, axis=0).tolist()
            row = numbered("step/classification", mean[: self.modules])
            row |= numbered("step/reconstruction", mean[self.modules :][: len(self.model.decoders)])
            self.logger.log_metrics(row | {"step/lr": self.optimizer.param_groups[0]["lr"]}, self._steps())

    def _facts(self) -> RunFacts:
        return RunFacts(
            device=str(self.fabric.device),
            precision="32" if self.mixed is None else "bf16",
            ranks=self.fabric.world_size,
            epoch=self.position.epoch,
            epochs=self.config.epochs,
            modules=self.modules,
            peak_bytes=self.plan.peak_bytes,
            idle=idle(self.fabric, self.config),
        )


def _refuse_infinite(sample: Sample, losses: Sequence[float]) -> None:
    if not all(map(math.isfinite, losses)):
        raise SlideError(
            sample.slide_id, "gave a loss that is not finite", "lower train.lr, or train with precision 32"
        )


def _optimizer(model: LocalClassifier, config: TrainConfig) -> torch.optim.AdamW:
    """Two rates: one for heads and decoders, one for the backbone."""
    groups = model.parameter_groups(config.lr)
    for group in groups:
        group["lr"] = config.lr * (config.backbone_lr_ratio if group["name"] == "backbone" else 1.0)
        group["initial_lr"] = group["lr"]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def _trained(optimizer: torch.optim.Optimizer, *, backbone: bool) -> list[torch.nn.Parameter]:
    groups = [group for group in optimizer.param_groups if backbone or group["name"] != "backbone"]
    return [parameter for group in groups for parameter in group["params"]]


def decisive(config: TrainConfig) -> dict[str, object]:
    """The settings that another result can come of."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _CHANGES_NOTHING}


def _identity(
    model: LocalClassifier,
    slides: Slides,
    config: TrainConfig,
    mixed: torch.dtype | None,
) -> Identity:
    """What a checkpoint must agree with: all that changes the result by more than rounding."""
    return checkpoint.describe(
        {
            "train": decisive(config) | {"precision": "32" if mixed is None else "bf16"},
            "augment": slides.augment,
            "model": model.config,
            "frozen": [
                n for n, p in model.named_parameters() if not (p.requires_grad or n.startswith("stem."))
            ],
            "inputs": model.inputs,
            "classes": model.classes,
            "slides.train": [_described(sample) for sample in slides.train],
            "slides.valid": [_described(sample) for sample in slides.valid],
        }
    )


def _described(sample: Sample) -> str:
    made = f", made as {sample.made[:12]}" if sample.made else ""
    return f"{sample.slide_id} of {sample.patient_id}, class {sample.target}{made}"


__all__ = [
    "LAST", "FitResult", "Progress", "RunFacts", "Sample", "SlideDone", "TrainConfig", "decisive", "fit",
]  # fmt: skip
