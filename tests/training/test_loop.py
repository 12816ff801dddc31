"""The loop: each step is the mean over its slides, every slide is seen once, and no fault is swallowed.

The faults of the paper's published code (method.md, part 1), as far as they are the loop's, are tests here.
"""

import csv
import math
import re
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from holoslide.errors import MemoryPlanError, SlideError
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import StreamConfig
from holoslide.models.precision import mixed_dtype
from holoslide.models.streamed import StreamedClassifier
from holoslide.slides.augment import AugmentConfig
from holoslide.training import loop
from holoslide.training.history import best_row, module_auroc
from holoslide.training.local import LocalStep
from holoslide.training.samples import Slides
from tests.training import tiny


class Told:
    """Remembers what a run tells."""

    def __init__(self):
        self.facts, self.slides, self.rows = [], [], []

    def started(self, facts):
        self.facts.append(facts)

    def slide_done(self, slide):
        self.slides.append(slide)

    def epoch_done(self, row, *, is_best):
        self.rows.append((row, is_best))


def weights(*modules):
    return torch.cat([p.detach().double().flatten() for m in modules for p in m.parameters()])


# --- Steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads_first", [0, 1])
def test_equals_plain_accumulation_and_leaks_nothing_from_epoch_to_epoch(tmp_path, slides, heads_first):
    """Five slides in groups of two: the last group of each epoch is one slide, with its own mean and step."""
    config = tiny.config(epochs=3, lr=1e-3, schedule="cosine", warmup_epochs=1, heads_first=heads_first)
    model = tiny.model(dtype=torch.float64)
    tiny.run(tmp_path / "run", slides, trained=model, config=config)

    plain = tiny.model(dtype=torch.float64)
    step = LocalStep(StreamedClassifier(plain, StreamConfig()))
    source = Slides(*slides, open_pixels=tiny.open_npz, augment=AugmentConfig(), seed=config.seed)
    optimizer = torch.optim.AdamW(
        [
            {"params": [*plain.heads.parameters(), *plain.decoders.parameters()], "share": 1.0},
            {"params": list(plain.parts.parameters()), "share": 0.5},
        ],
        weight_decay=1e-2,
    )
    rises = {0: [1] * 9, 1: [0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1]}
    number = 0
    for epoch in range(3):
        for group in source.order(epoch, 2):
            optimizer.zero_grad()
            for index in group:
                with source.open_train(epoch, index) as pixels:
                    step(pixels, slides[0][index].target, generator=source.generator(epoch, index))
            for rates, rise in zip(optimizer.param_groups, (1, rises[heads_first][number]), strict=True):
                rates["lr"] = 1e-3 * rates["share"] * config.rates().factor(number, steps_per_epoch=3) * rise
                for parameter in rates["params"]:
                    parameter.grad /= len(group)
            if epoch < heads_first:
                plain.parts.zero_grad()
            optimizer.step()
            number += 1
    assert number == 9
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-10, atol=1e-12)


def test_the_average_of_the_weights_is_what_is_validated_and_kept(tmp_path, slides):
    """Beside runs that were stopped after each epoch, whose one step an epoch is the average's, too."""
    config = {"epochs": 3, "accumulate": 5}
    with_average = tiny.run(tmp_path / "a", slides, config=tiny.config(**config, average=0.15, milestones=()))
    plain = [tiny.model() for _ in range(4)]
    for epochs in (1, 2, 3):
        stopped = tiny.config(**config | {"epochs": epochs}, milestones=())
        tiny.run(tmp_path / str(epochs), slides, trained=plain[epochs], config=stopped)
    saved = [weights(m.stem, m.parts, m.heads) for m in plain]  # a model directory has no decoders
    average, kept = saved[0], []
    for step in range(3):
        keep = min(0.15, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * saved[step + 1]
        kept.append(average)
    best = LocalClassifier.load(with_average.best)
    found = weights(best.stem, best.parts, best.heads)
    torch.testing.assert_close(found, kept[with_average.best_epoch - 1], rtol=1e-6, atol=1e-8)


def test_every_slide_is_trained_once_an_epoch_in_another_order(tmp_path, slides):
    told = Told()
    tiny.run(tmp_path, slides, config=tiny.config(epochs=3), progress=told)
    orders = [[s.slide_id for s in told.slides if s.phase == "train" and s.epoch == e] for e in (1, 2, 3)]
    assert all(sorted(order) == sorted(s.slide_id for s in slides[0]) for order in orders)
    assert orders[0] != orders[1] or orders[1] != orders[2]
    assert [s.done for s in told.slides] == [1, 2, 3, 4, 5, 1, 2, 3, 4] * 3
    assert told.slides[-1].eta_s == pytest.approx(0)
    assert all(math.isfinite(s.eta_s) for s in told.slides)


def test_the_same_seed_gives_the_same_weights_whatever_torch_was_seeded_with(tmp_path, slides):
    results = []
    for number, seed in enumerate((0, 0, 1)):
        model = tiny.model()
        torch.manual_seed(number)
        np.random.seed(number)  # nothing may depend on either
        tiny.run(tmp_path / str(number), slides, trained=model, config=tiny.config(seed=seed))
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_draws_are_functions_of_seed_epoch_and_slide(slides):
    first, again, other = (
        Slides(*slides, open_pixels=tiny.open_npz, augment=AugmentConfig(), seed=seed) for seed in (3, 3, 4)
    )
    assert first.order(7, 2) == again.order(7, 2)
    assert sorted(i for group in first.order(7, 2) for i in group) == list(range(5))
    streams = [
        source.generator(epoch, index).initial_seed()
        for source, epoch, index in [
            (first, 0, 0),
            (again, 0, 0),
            (first, 0, 1),
            (first, 1, 0),
            (other, 0, 0),
        ]
    ]
    assert streams[0] == streams[1]
    assert len(set(streams)) == 4


def test_class_weights_balance_the_classes_and_average_to_one(tmp_path, slides):
    train, valid = slides
    plain, balanced = Told(), Told()
    for name, told in (("none", plain), ("balanced", balanced)):
        config = tiny.config(epochs=1, lr=1e-9, class_weights=name)
        tiny.run(tmp_path / name, (train, valid), config=config, progress=told)
    ratio = {
        b.slide_id: b.classification[0] / a.classification[0]
        for a, b in zip(plain.slides, balanced.slides, strict=True)
    }
    expected = {0: 5 / (2 * 3), 1: 5 / (2 * 2)}  # three slides of class 0, two of class 1
    for sample in (*train, *valid):
        assert ratio[sample.slide_id] == pytest.approx(expected[sample.target], rel=1e-4)


def test_learns(tmp_path, slides):
    result = tiny.run(tmp_path, slides, config=tiny.config(epochs=12, lr=3e-3, schedule="cosine"))
    first, last = result.history[0], result.history[-1]
    assert last["train/classification_2"] < 0.5 * first["train/classification_2"]


# --- Faults of the published code ---------------------------------------------------------------------------------


def test_gradients_that_a_model_brings_are_not_taken_for_the_runs(tmp_path, slides):
    clean, used = tiny.model(), tiny.model()
    for parameter in used.parameters():
        parameter.grad = torch.ones_like(parameter)
    for name, trained in (("clean", clean), ("used", used)):
        tiny.run(tmp_path / name, slides, trained=trained, config=tiny.config(epochs=1))
    for one, other in zip(clean.parameters(), used.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_frozen_stays_as_it_is(tmp_path, slides):
    """Weight decay included, and though the head between is frozen, too."""
    trained = tiny.model()
    frozen = {"parts.0": trained.parts[0], "heads.1": trained.heads[1]}
    for module in frozen.values():
        module.requires_grad_(requires_grad=False)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    tiny.run(tmp_path, slides, trained=trained, config=tiny.config(weight_decay=0.5))
    for name, parameter in trained.named_parameters():
        stays = name.startswith((*frozen, "stem"))
        assert torch.equal(parameter, before[name]) == stays, name


@pytest.mark.parametrize("error", [RuntimeError, OSError, ValueError])
def test_a_slide_that_cannot_be_read_stops_the_run_by_its_name_and_is_not_tried_again(
    tmp_path, slides, error
):
    tries, broken = [], slides[0][2]

    class Broken(tiny.ArrayPixels):
        def read(self, box_px):
            tries.append(box_px)
            message = "this slide breaks\nwith much to say"
            raise error(message)

    @contextmanager
    def open_pixels(path):
        with tiny.open_npz(path) as pixels:
            yield Broken(pixels.rgb, pixels.mask) if path == broken.raster else pixels

    told = Told()
    with pytest.raises(SlideError, match=r"slide2: failed \(this slide breaks\); check .*npz"):
        tiny.run(tmp_path, slides, open_pixels=open_pixels, progress=told)
    assert len(tries) == 1
    assert len(told.slides) < len(slides[0])
    assert broken.raster.exists()


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError])
def test_what_fails_in_a_step_stays_what_it_is_and_names_the_slide(tmp_path, slides, monkeypatch, error):
    """A fault of ours must not send the user to look for one in the slide."""

    def failing(self, slide, label, **more):
        message = "a matrix is not square"
        raise error(message)

    monkeypatch.setattr(LocalStep, "__call__", failing)
    with pytest.raises(error, match="a matrix is not square") as stopped:
        tiny.run(tmp_path, slides)
    assert re.fullmatch(r"holoslide: slide slide\d was being run", *stopped.value.__notes__)


def test_a_slide_that_cannot_be_opened_stops_the_run_before_it_starts(tmp_path, slides):
    @contextmanager
    def open_pixels(path):
        if path == slides[1][3].raster:
            message = "no such raster"
            raise OSError(message)
        with tiny.open_npz(path) as pixels:
            yield pixels

    told = Told()
    with pytest.raises(SlideError, match=r"slide8: failed \(no such raster\)"):
        tiny.run(tmp_path, slides, open_pixels=open_pixels, progress=told)
    assert told.slides == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_too_little_memory_is_never_handled_by_changing_the_data(tmp_path, slides, monkeypatch, error):
    def failing(self, slide, label, **more):
        raise error

    monkeypatch.setattr(LocalStep, "__call__", failing)
    with pytest.raises(MemoryPlanError, match=r"slide\d: does not fit into the memory that is free"):
        tiny.run(tmp_path, slides)


def test_only_training_and_validation_slides_are_opened(tmp_path, slides):
    opened = Counter()

    def open_pixels(path):
        opened[path] += 1
        return tiny.open_npz(path)

    tiny.run(tmp_path, slides, config=tiny.config(epochs=2), open_pixels=open_pixels)
    assert opened.keys() == {sample.raster for sample in (*slides[0], *slides[1])}
    planned_for = 2  # the largest of each part
    assert opened.total() == 3 * len(opened) + planned_for  # looked at, and once an epoch


def test_validation_metrics_get_probabilities_of_all_heads_without_augmentation(
    tmp_path, slides, monkeypatch
):
    seen = []

    def watched(targets, probabilities):
        seen.append((targets, probabilities))
        return module_auroc(targets, probabilities)

    monkeypatch.setattr(loop, "module_auroc", watched)
    model = tiny.model(dtype=torch.float64)
    result = tiny.run(tmp_path, slides, trained=model, config=tiny.config(epochs=1))
    network, row = StreamedClassifier(model, StreamConfig()), result.history[0]
    targets = torch.tensor([sample.target for sample in slides[1]])
    logits = [[], []]
    for sample in slides[1]:
        with tiny.open_npz(sample.raster) as pixels, torch.no_grad():
            features = network.stem_map(pixels)
            for k, head in enumerate(model.heads):
                features = network.part_map(k, features)
                logits[k].append(head.readout(network.head_cells(head, features).cells_NC))
    for k in range(2):
        expected = torch.stack(logits[k]).softmax(1)
        np.testing.assert_allclose(seen[k][1], expected, rtol=1e-10)
        assert row[f"valid/auroc_{k + 1}"] == roc_auc_score(targets, expected[:, 1])
        assert row[f"valid/loss_{k + 1}"] == pytest.approx(
            float(F.cross_entropy(torch.stack(logits[k]), targets))
        )


def test_validation_builds_no_graph(tmp_path, slides):
    model, graphs = tiny.model(), []
    model.heads[-1].readout.register_forward_hook(lambda _, __, output: graphs.append(output.requires_grad))
    tiny.run(tmp_path, slides, trained=model, config=tiny.config(epochs=2))
    assert graphs == ([True] * 5 + [False] * 4) * 2


def test_loss_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path, slides):
    model = tiny.model()
    with torch.no_grad():
        model.heads[0].readout.output.bias.fill_(math.inf)
    before = weights(model)
    with pytest.raises(SlideError, match=r"slide\d: gave a loss that is not finite"):
        tiny.run(tmp_path, slides, trained=model)
    assert torch.equal(weights(model), before)


def test_weights_that_are_not_finite_stop_the_run_at_validation(tmp_path, slides, monkeypatch):
    """The last step of an epoch may be the one that breaks them: no slide is trained on after it."""
    model, step = tiny.model(), torch.optim.AdamW.step

    def breaking(*arguments):
        step(*arguments)
        with torch.no_grad():
            model.heads[1].readout.output.bias.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    with pytest.raises(SlideError, match="slide5: gave a loss that is not finite"):
        tiny.run(tmp_path, slides, trained=model, config=tiny.config(accumulate=5))


# --- What a run leaves --------------------------------------------------------------------------------------------


def test_leaves_checkpoint_best_model_and_tables(tmp_path, slides):
    told = Told()
    result = tiny.run(tmp_path, slides, config=tiny.config(epochs=3), progress=told)
    assert result.last == tmp_path / "last.ckpt"
    assert result.last.exists()
    assert LocalClassifier.load(result.best).classes == ("red", "green")
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["valid/loss_2"]) for row in rows] == [row["valid/loss_2"] for row in result.history]
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    for row in result.history:  # means over all slides of the epoch
        for phase, name in (("train", "train/classification"), ("valid", "valid/loss")):
            told_K = [s.classification for s in told.slides if (s.phase, s.epoch) == (phase, row["epoch"])]
            np.testing.assert_allclose([row[f"{name}_{k}"] for k in (1, 2)], np.mean(told_K, axis=0))
    expected = {"lr", "seconds", "peak_rss_bytes", "peak_device_bytes", "train/reconstruction_1"}
    expected |= {
        f"{name}_{k}" for k in (1, 2) for name in ("train/classification", "valid/loss", "valid/auroc")
    }
    assert expected < set(result.history[0])
    assert list((tmp_path / "tensorboard").iterdir())
    assert [row for row, _ in told.rows] == result.history
    assert (told.facts[0].precision, told.facts[0].ranks, told.facts[0].modules) == ("32", 1, 2)


def _scripted(monkeypatch, aurocs, losses):
    """Let validation say this, and count training by the weights' epoch."""
    script = iter(zip(aurocs, losses, strict=True))

    def validate(self):
        auroc, loss = next(script)
        return {"valid/loss_1": 0, "valid/loss_2": loss, "valid/auroc_1": 0, "valid/auroc_2": auroc}

    monkeypatch.setattr(loop._Run, "validate", validate)


def test_best_is_the_model_of_the_best_epoch(tmp_path, slides, monkeypatch):
    _scripted(monkeypatch, [0.5, 0.9, 0.9, 0.7], [0.8, 0.5, 0.6, 0.1])
    model, kept = tiny.model(), []

    class Keeping(Told):
        def epoch_done(self, row, *, is_best):
            super().epoch_done(row, is_best=is_best)
            kept.append({k: v.clone() for k, v in model.state_dict().items()})

    told = Keeping()
    result = tiny.run(tmp_path, slides, trained=model, config=tiny.config(epochs=4), progress=told)
    assert result.best_epoch == 2
    assert [is_best for _, is_best in told.rows] == [True, True, False, False]
    for name, tensor in LocalClassifier.load(result.best).state_dict().items():
        if not name.startswith("decoders"):
            assert torch.equal(tensor, kept[1][name]), name


def test_stops_early_when_patience_is_exhausted(tmp_path, slides, monkeypatch):
    _scripted(monkeypatch, [0.5, 0.9, 0.8, 0.9, 0.9], [0.5, 0.3, 0.3, 0.3, 0.2])
    result = tiny.run(tmp_path, slides, config=tiny.config(epochs=9, patience=2))
    assert len(result.history) == 4
    assert result.best_epoch == 2
    again = tiny.run(tmp_path, slides, config=tiny.config(epochs=9, patience=2), resume=True)
    assert again.history == result.history


def test_the_best_row_is_by_auroc_then_loss_then_the_first():
    def rows(*pairs):
        return [{"valid/auroc_1": auroc, "valid/loss_1": loss} for auroc, loss in pairs]

    history = rows((0.8, 0.1), (0.9, 0.3), (0.9, 0.2), (0.9, 0.2), (math.nan, math.nan))
    assert best_row(history, monitor="auroc", modules=1) == 2
    assert best_row(history, monitor="loss", modules=1) == 0
    assert best_row(rows((math.nan, 0.1)), monitor="auroc", modules=1) == 0


def test_auroc_is_macro_over_classes_against_the_rest_and_nan_for_one_class():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.2, 0.2, 0.6], [0.1, 0.5, 0.4]])
    targets = np.array([0, 1, 2, 2])
    assert module_auroc(targets, probabilities) == roc_auc_score(targets, probabilities, multi_class="ovr")
    assert math.isnan(module_auroc(np.array([1, 1]), probabilities[:2]))


# --- Precision ----------------------------------------------------------------------------------------------------


def test_precision_is_chosen_by_the_device(monkeypatch):
    cpu = torch.device("cpu")
    assert mixed_dtype("32", cpu) is None
    assert mixed_dtype("bf16", cpu) is torch.bfloat16
    for has_it in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert mixed_dtype("auto", cpu) is (torch.bfloat16 if has_it else None)


def test_trains_in_bf16_and_says_so(tmp_path, slides):
    told = Told()
    result = tiny.run(tmp_path, slides, config=tiny.config(epochs=1, precision="bf16"), progress=told)
    assert told.facts[0].precision == "bf16"
    assert math.isfinite(result.history[0]["valid/loss_2"])
