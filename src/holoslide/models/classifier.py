"""The model: a backbone's stem and its K modules, a head for each, and decoders for all but the last."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from holoslide.errors import CheckpointError, ConfigError, ModelError
from holoslide.models.heads import Head
from holoslide.models.hub import model_folder
from holoslide.models.options import BackboneConfig, InputConfig, ModelConfig
from holoslide.models.partition import Trunk, Unit, build_trunk, cut
from holoslide.models.reconstruction import Decoder, side_for

FORMAT = "holoslide model"
VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.yaml"


class LocalClassifier(nn.Module):
    """Stem -> part 1 -> ... -> part K; head k reads part k's output, and the last head's answer is the answer.

    `parts[k]` is a `Sequential` of units. The stem is frozen, and the whole backbone stays in evaluation mode:
    BatchNorm keeps its running statistics, its scale and shift are trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        trunk: Trunk,
        groups: Sequence[Sequence[Unit]],
        config: ModelConfig,
        *,
        classes: Sequence[str],
        inputs: InputConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.classes = _checked_classes(classes)
        self.units = tuple(tuple(unit.name for unit in group) for group in groups)
        self.stem = trunk.stem.requires_grad_(False)  # noqa: FBT003 - torch's own
        self.stem_channels = trunk.stem_channels
        self.strides = tuple(_stride(group) for group in groups)
        depths = list(itertools.accumulate(self.strides, int.__mul__))
        channels = [trunk.stem_channels, *(group[-1].out_channels for group in groups)]
        last = len(groups) - 1
        self.parts = nn.ModuleList(
            nn.Sequential(OrderedDict((_key(unit), unit.module) for unit in group)) for group in groups
        )
        self.heads = nn.ModuleList(
            Head(
                channels[k + 1],
                len(self.classes),
                config.heads,
                depth=depths[k],
                last_depth=depths[-1] if k < last else None,
            )
            for k in range(len(groups))
        )
        self.decoders = nn.ModuleList(
            Decoder(channels[k + 1], channels[k], side=config.reconstruction.side or side_for(depths[k]))
            for k in range(last if config.reconstruction.alpha > 0 else 0)
        )
        self.register_buffer("mean", torch.empty(3))
        self.register_buffer("std", torch.empty(3))
        self.set_input(inputs)
        self.train()
        self._made = self._layout()

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        *,
        classes: Sequence[str],
        inputs: InputConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Build the network; `generator` draws the weights that are not loaded (default: torch's own)."""
        with _drawing_from(generator):
            trunk = build_trunk(config.backbone)
            groups = cut(trunk.units, config.modules)
            return cls(trunk, groups, config, classes=classes, inputs=inputs or InputConfig())

    @classmethod
    def from_backbone(
        cls, name: str, *, classes: Sequence[str], modules: int = 4, weights: str = "default"
    ) -> Self:
        """The network by its name, all else by default."""
        backbone = BackboneConfig(name=name, weights=weights)
        return cls.from_config(ModelConfig(backbone=backbone, modules=modules), classes=classes)

    def forward(self, pixels_BCHW: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Logits (K, L) of one whole image (B = 1), normalised, untiled, every cell voting: the plain way."""
        features_BCHW = self.stem(pixels_BCHW)
        logits = []
        for part, head in zip(self.parts, self.heads, strict=True):
            features_BCHW = part(features_BCHW.detach())
            logits.append(head(features_BCHW, generator=generator))
        return torch.stack(logits)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's signature
        """Training or evaluation mode, which the backbone does not follow: its statistics are frozen."""
        super().train(mode)
        self.stem.eval()
        self.parts.eval()
        return self

    def set_input(self, inputs: InputConfig) -> None:
        """Say what rasters look like; `fit` does so from the training set."""
        self.inputs = inputs
        with torch.no_grad():
            self.mean.copy_(torch.tensor(inputs.mean, dtype=torch.float64))
            self.std.copy_(torch.tensor(inputs.std, dtype=torch.float64))

    @property
    def mpp(self) -> float | None:
        """Microns per raster pixel."""
        return self.inputs.mpp

    @property
    def glass(self) -> tuple[int, int, int]:
        """RGB outside the tissue."""
        return self.inputs.glass

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """For an optimiser: heads and decoders at `lr`, the backbone at half of it, what is frozen nowhere."""
        heads = [*self.heads.parameters(), *self.decoders.parameters()]
        return [
            {"name": name, "params": [p for p in parameters if p.requires_grad], "lr": rate}
            for name, parameters, rate in (
                ("heads", heads, lr),
                ("backbone", self.parts.parameters(), lr / 2),
            )
        ]

    def save(self, folder: str | Path) -> None:
        """Write a directory that `load` reads by itself: weights, and a card with all else.

        Decoders serve training alone and are left out; a training checkpoint holds them (`state_dict`). Raises
        `ModelError` as `refuse_changed`.
        """
        self.refuse_changed()
        folder = Path(folder)
        import pydantic  # here alone: training needs it not, and a machine lent for its GPU may lack it

        folder.mkdir(parents=True, exist_ok=True)
        card = {
            "format": FORMAT,
            "version": VERSION,
            "classes": list(self.classes),
            "inputs": pydantic.TypeAdapter(InputConfig).dump_python(self.inputs, mode="json"),
            "model": pydantic.TypeAdapter(ModelConfig).dump_python(self.config, mode="json"),
            "units": [list(names) for names in self.units],
        }
        (folder / CARD_FILE).write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")
        whole = torch.contiguous_format  # copied: safetensors takes no tensor that layers share
        state = {key: tensor.clone(memory_format=whole) for key, tensor in self._saved_state().items()}
        safetensors.torch.save_file(state, folder / WEIGHTS_FILE)

    def refuse_changed(self) -> None:
        """Raise `ModelError`, with its name, for a layer that is not the one that the settings make.

        A saved model is made again from its settings: it would come back as another network, or not at all.
        """
        now = self._layout()
        changed = [name for name in [*now, *self._made] if now.get(name) != self._made.get(name)]
        if changed:
            remedy = "give the network a name (timm.models.register_model), and that as model.backbone.name"
            if changed[0].startswith("heads."):
                remedy = "choose from what model.heads offers"
            what = "is not what the model's settings make, so that the saved model would be another"
            raise ModelError(changed[0], what, remedy)

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """The model that `save` wrote, on the CPU and in evaluation mode: a folder, or `hub:owner/name[@revision]`.

        Raises `CheckpointError` if the directory is not whole, or the hub has no such model.
        """
        folder = model_folder(source)
        card = read_card(folder)
        config: ModelConfig = _validate(ModelConfig, card["model"], folder / CARD_FILE)
        inputs: InputConfig = _validate(InputConfig, card["inputs"], folder / CARD_FILE)
        with _drawing_from(torch.Generator()):  # leave the caller's draws alone
            trunk = build_trunk(dataclasses.replace(config.backbone, weights="none"))
            groups = _regroup(trunk, card["units"], folder / CARD_FILE)
            model = cls(trunk, groups, config, classes=card["classes"], inputs=inputs)
        model._load_saved(folder / WEIGHTS_FILE)
        model.set_input(inputs)  # in the precision of the weights
        return model.eval()

    def _layout(self) -> dict[str, str]:
        """What each layer and each tensor that is saved is, without values, by name."""
        layers = {
            f"{part}.{name}": f"{type(layer).__name__}({layer.extra_repr()})"
            for part in ("stem", "parts", "heads")
            for name, layer in self.get_submodule(part).named_modules()
        }
        return layers | {name: str(tuple(tensor.shape)) for name, tensor in self._saved_state().items()}

    def _saved_state(self) -> dict[str, Tensor]:
        """Weights and statistics of backbone and heads."""
        return {k: v for k, v in self.state_dict().items() if k.startswith(("stem.", "parts.", "heads."))}

    def _load_saved(self, path: Path) -> None:
        try:
            state = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(path, f"cannot be read ({error})", "save the model anew") from error
        own = self._saved_state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
        if wrong:
            raise CheckpointError(
                path,
                f"does not fit {CARD_FILE} at {wrong[0]} and {len(wrong) - 1} more",
                "save the model anew",
            )
        self.to(next(tensor.dtype for tensor in state.values() if tensor.is_floating_point()))
        self.load_state_dict({**self.state_dict(), **state})


def _key(unit: Unit) -> str:
    return unit.name.replace(".", "_")


def _stride(group: Sequence[Unit]) -> int:
    stride = 1
    for unit in group:
        stride *= unit.stride
    return stride


def _checked_classes(classes: Sequence[str]) -> tuple[str, ...]:
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise ConfigError("classes", f"are {', '.join(classes) or 'none'}", "give two or more, all different")
    return tuple(classes)


def _regroup(trunk: Trunk, names: Sequence[Sequence[str]], where: Path) -> list[tuple[Unit, ...]]:
    """The units of a trunk in the groups of a saved model, so that no later change of `cut` alters the model."""
    if [name for group in names for name in group] != [unit.name for unit in trunk.units]:
        raise CheckpointError(
            where,
            f"{trunk.name} falls into other units here than where the model was saved",
            "install the versions of torchvision and timm that it was saved with",
        )
    units = iter(trunk.units)
    return [tuple(itertools.islice(units, len(group))) for group in names]


def read_card(folder: Path) -> dict[str, Any]:
    """What a saved model says of itself beside its weights. Raises `CheckpointError`."""
    path = folder / CARD_FILE
    try:
        card = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise CheckpointError(path, f"cannot be read ({line})", "give the folder of a saved model") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise CheckpointError(path, f"is not the card of a {FORMAT}", "give the folder of a saved model")
    if card.get("version") != VERSION:
        raise CheckpointError(
            path,
            f"has version {card.get('version')}, this holoslide reads {VERSION}",
            "install the holoslide that wrote it",
        )
    missing = {"classes", "inputs", "model", "units"} - card.keys()
    if missing:
        raise CheckpointError(path, f"lacks {', '.join(sorted(missing))}", "save the model anew")
    return card


def _validate(kind: type[Any], values: Mapping[str, Any], where: Path) -> Any:
    """A configuration from plain values, none of which may be unknown to it."""
    import pydantic  # here alone, as in `save`

    try:
        result = pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(where, f"{key}: {first['msg'].lower()}", "save the model anew") from error
    unknown = _unknown(values, pydantic.TypeAdapter(kind).dump_python(result, mode="json"))
    if unknown:
        raise CheckpointError(
            where,
            f"has settings that are unknown here: {', '.join(unknown)}",
            "install the holoslide that wrote it",
        )
    return result


def _unknown(values: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    names = [key for key in values if key not in known]
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(known.get(key), Mapping):
            names += [f"{key}.{name}" for name in _unknown(value, known[key])]
    return names


@contextmanager
def _drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let layers draw their first weights from a generator, and leave torch's own untouched."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
