"""The model card: what a model is, what it was trained on, how good it was, and what it is not for."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from holoslide.models.classifier import LocalClassifier

_HEAD = """---
library_name: holoslide
pipeline_tag: image-classification
tags: [pathology, whole-slide-image, locally-supervised-learning]
---

# {title}

A classifier of whole pathology slides ({classes}), trained on entire slides from one label per slide with
holoslide.

```python
from holoslide import LocalClassifier

model = LocalClassifier.load("hub:owner/name")  # or the path of this folder
```

| | |
| --- | --- |
| backbone | {backbone}, {cut} |
| input | RGB at {mpp} um per pixel, tissue on glass of {glass} |
| classes | {classes} |
| parameters | {parameters:,} |
| heads | {heads} |
| attention of a heatmap | {attention} |
"""

_CELLS_FIRST = "every cell is classified, and the answers are pooled class by class"
_POOLED_FIRST = "all cells are pooled to one vector, which is classified"

# What a heatmap's attention is, by how the heads pool.
ATTENTION = {
    "auto": "how much each cell weighs, the mean of the classes' own weights",
    "gated": "how much each cell weighs in the slide's one vector",
    "attention": "how much each cell weighs in the slide's one vector",
    "mean": "the same weight for every cell",
}

_LIMITS = """
## What it is not for

It is a research model. It has not been shown to be safe or right for diagnosis, and its probabilities are not
calibrated unless a report says so. Expect worse on other scanners, stains, laboratories, organs and patients than
those it was trained on. A heatmap shows what the model used, not where disease is.
"""


def escaped(text: str) -> str:
    """A name as Markdown that shows it as it is, also in a table: no markup, no HTML, one line.

    >>> print(escaped("p53|mut <1 %"))
    p53\\|mut \\<1 %
    """
    return re.sub(r"([\\`*_~|<>&\[\]$#])", r"\\\1", " ".join(text.split()))


def model_card(model: LocalClassifier, *, title: str, run: Path | None = None) -> str:
    """The card as Markdown with the hub's header; `run` adds what its files tell of data and results."""
    pooling = model.config.heads.pooling
    text = _HEAD.format(
        title=escaped(title),
        classes=" against ".join(map(escaped, model.classes)),
        backbone=escaped(model.config.backbone.name),
        cut=_cut(len(model.units), model.config.barrier_every),
        mpp=model.mpp,
        glass=list(model.glass),
        parameters=sum(p.numel() for p in model.parameters()),
        heads=_CELLS_FIRST if pooling == "auto" else _POOLED_FIRST,
        attention=ATTENTION[pooling],
    )
    if run is not None:
        text += _data(run / "cohort.csv") + _results(run / "metrics.json")
    return text + _LIMITS


def _cut(modules: int, barrier_every: int) -> str:
    if modules == 1:
        return "one module, trained from end to end"
    if barrier_every == 1:
        return f"cut into {modules} locally trained modules"
    barriers = "none" if barrier_every >= modules else f"one after every {barrier_every}"
    return f"cut into {modules} modules, gradient barriers: {barriers}"


def _data(table: Path) -> str:
    if not table.exists():
        return ""
    with table.open(newline="", encoding="utf-8") as file:
        counts = Counter((row["split"], row["label"]) for row in csv.DictReader(file))
    lines = [
        f"| {split or 'no part'} | {escaped(label) or 'none'} | {n} |" for (split, label), n in counts.items()
    ]
    return "\n## Slides\n\n| part | label | slides |\n| --- | --- | --- |\n" + "\n".join(sorted(lines)) + "\n"


def _results(path: Path) -> str:
    """What the run's test part came to; a card has no results on slides that training has seen."""
    head = "\n## Results on the test part\n\n"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("split") != "test" or found.get("table") is not None:
        return (
            head
            + "None: the run's folder holds no results of its test part. `holoslide evaluate` makes them.\n"
        )
    measured, lines = found["slides"], []
    for name in ("auroc", "auprc", "accuracy", "balanced_accuracy", "log_loss"):
        value = measured.get(name)
        if isinstance(value, dict) and value.get("value") is not None:
            low, high = value.get("low"), value.get("high")
            interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
            lines.append(f"| {name.replace('_', ' ')} | {value['value']:.3f} | {interval} |")
    after = ", after the temperature" if found.get("calibrated") else ""
    head += f"Of {measured['slides']} slides{after}; the run's `metrics.json` has all.\n\n"
    return head + "| measure | value | 95 % interval |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n"
