"""A run's settings: the components' own dataclasses, read from YAML and `--set`, with unknown keys refused."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import pydantic
import yaml

from holoslide.errors import ConfigError
from holoslide.evaluation.options import EvaluateConfig
from holoslide.models.options import ModelConfig, StreamConfig
from holoslide.slides.augment import AugmentConfig
from holoslide.slides.cohort import SplitConfig
from holoslide.slides.prepare import PrepareConfig
from holoslide.training.options import TrainConfig

_INT = "tag:yaml.org,2002:int"
_MOST = 2**31 - 1  # of a size or a count: no library counts further, and what each says of it helps nobody
_RECONSTRUCTION = ("alpha", "patches", "side", "share")
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The paper's own settings where ours differ (arXiv 2207.08267): zero padding, every cell pooled, pixels scaled
    # by the cohort, larger cells that know of each other, patches to reconstruct as large on a small slide, many
    # epochs at a low rate.
    "paper": {
        "model": {
            "backbone": {"name": "resnet34", "stem_stride": 3, "scale": "cohort"},
            "modules": 8,
            "border": "zeros",
            "pool": "all",
            "heads": {"norm": "slide", "kernel": None},
            "reconstruction": {"share": None},
        },
        "train": {
            "epochs": 55,
            "lr": 2e-5,
            "backbone_lr_ratio": 0.5,
            "heads_first": 0.0,
            "schedule": "step",
            "accumulate": 8,
            "average": 0,
        },
    },
}
# What a setting leaves without effect while it is so; `...` is anything but null.
_SWITCHES: dict[tuple[str, Any], tuple[str, ...]] = {
    ("prepare.tissue.skip_blur", False): ("prepare.tissue.focus_mpp", "prepare.tissue.least_sharpness"),
    ("augment.crop", 0): ("augment.crop_least", "augment.crop_least_small", "augment.small_px"),
    ("augment.contrast", 0): ("augment.pivot",),
    ("model.backbone.weights", "none"): ("model.backbone.scale",),
    ("model.modules", 1): (
        "model.barrier_every",
        *(f"model.reconstruction.{key}" for key in _RECONSTRUCTION),
    ),
    ("model.reconstruction.alpha", 0): tuple(f"model.reconstruction.{key}" for key in _RECONSTRUCTION[1:]),
    ("stream.tile_cells", None): ("stream.batch", "stream.keep"),
    ("stream.tile_cells", ...): ("stream.memory_gib",),
    ("train.schedule", "cosine"): ("train.milestones", "train.gamma"),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result: a part of it for each of a run's stages."""

    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How slides become rasters."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """How patients are drawn into the parts, where the table names none."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training slides are varied."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network: a backbone cut into modules, with a head for each."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How a slide runs through the network, tile by tile, and in how much memory."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the network is trained."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """What an evaluation is asked for, beside the measures that it always gives."""

    @classmethod
    def load(
        cls, path: str | Path | None = None, *, preset: str = "default", sets: Sequence[str] = ()
    ) -> RunConfig:
        """A preset, changed by a YAML file, changed by `a.b=c` settings. Raises `ConfigError`."""
        if preset not in PRESETS:
            raise ConfigError(
                "preset", f"there is no preset {preset!r}", f"choose one of {', '.join(PRESETS)}"
            )
        values = PRESETS[preset]
        if path is not None:
            values = _merge(values, _checked(cls, _read(Path(path)), str(path), ""))
        for setting in sets:
            values = _merge(values, _checked(cls, _parse(setting), f"--set {setting}", ""))
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "configuration") -> RunConfig:
        """Raises `ConfigError` that names an unknown key's nearest match, or a value of the wrong kind."""
        return pydantic.TypeAdapter(cls).validate_python(_checked(cls, values, where, ""))

    def idle(self, usual: RunConfig) -> list[str]:
        """Settings that are not as usual, and that another leaves without effect; each in a line.

        >>> RunConfig.load(sets=["train.gamma=0.5"]).idle(RunConfig())
        ['train.gamma has no effect: train.schedule is cosine']
        """
        found = []
        for (switch, off), keys in _SWITCHES.items():
            value = attrgetter(switch)(self)
            is_off = (value is not None) if off is ... else (value == off)
            if is_off:
                given = [key for key in keys if attrgetter(key)(self) != attrgetter(key)(usual)]
                shown = json.dumps(value).strip('"')
                found += [f"{key} has no effect: {switch} is {shown}" for key in given]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        result: dict[str, Any] = pydantic.TypeAdapter(RunConfig).dump_python(self, mode="json")
        return result

    def to_yaml(self) -> str:
        """The whole configuration, defaults included."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(
            path, f"cannot be read ({error.strerror})", "give the path of a YAML file"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a date that there is not
        raise ConfigError(
            path, f"is not YAML ({' '.join(str(error).split())})", "mend the line it names"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(path, "does not hold settings", "write `part:` and under it `key: value`")
    return values


def _parse(setting: str) -> dict[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {setting}", "is not a setting", "write --set part.key=value")
    try:
        value: Any = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"--set {setting}", "has no readable value", "write --set part.key=value"
        ) from error
    for part in reversed(key.split(".")):
        value = {part: value}
    result: dict[str, Any] = value
    return result


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


class _Loader(yaml.SafeLoader):
    """YAML that does not let the second of two equal keys win in silence, nor take 010 for 8 and 1:30 for 90."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - as PyYAML has it
        """As its parent's, for keys that all differ."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != _INT]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))


def _checked(kind: type, values: Mapping[str, Any], where: str, prefix: str) -> dict[str, Any]:
    """The values, without parts that are empty; refuses keys that there are not, and numbers that are none."""
    known = {f.name for f in dataclasses.fields(kind)}
    hints, checked = get_type_hints(kind), dict[str, Any]()
    for key, value in values.items():
        if key not in known:
            raise ConfigError(where, f"there is no setting {prefix}{key}", _meant(str(key), known, prefix))
        if not dataclasses.is_dataclass(hints[key]):
            checked[key] = _fitted(hints[key], value, where, f"{prefix}{key}")
        elif isinstance(value, Mapping):
            part = cast("type", hints[key])
            checked[key] = _checked(part, value, where, f"{prefix}{key}.")
        elif value is not None:  # nothing below it: its defaults
            raise ConfigError(
                where,
                f"{prefix}{key} is a part, and was given {value!r}",
                f"name a setting of it: {prefix}{key}.…",
            )
    return checked


def _meant(key: str, known: set[str], prefix: str) -> str:
    """What to do about a key that there is not: it stands elsewhere, or is close to one that is here."""
    elsewhere = [path for path in _paths(RunConfig, "") if path.rpartition(".")[2] == key]
    close = difflib.get_close_matches(key.lower(), known, n=1)
    if not elsewhere and not close:
        return f"known: {', '.join(sorted(known))}"
    return f"did you mean {' or '.join(elsewhere or [prefix + close[0]])}?"


def _paths(kind: type, prefix: str) -> Iterator[str]:
    """All keys, parts included."""
    for name, hint in get_type_hints(kind).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _paths(cast("type", hint), f"{prefix}{name}.")


def _fitted(hint: Any, value: Any, where: str, key: str) -> Any:
    """A value of the kind that its setting takes. Refused is also what pydantic would take: true for 1."""
    if isinstance(value, list | tuple):
        meant: Any = [_as_meant(hint, one, where, key) for one in value]
    else:
        meant = _as_meant(hint, value, where, key)
    try:
        fitted = _adapter(hint).validate_python(meant)
    except pydantic.ValidationError as error:
        shown = {str: repr(value), type(None): "empty"}.get(type(value), str(value))
        raise ConfigError(where, f"{key}: is {shown}", f"it takes: {takes(hint).replace('`', '')}") from error
    is_size = isinstance(fitted, int) and str not in get_args(hint) and not key.endswith("seed")
    if is_size and abs(fitted) > _MOST:
        raise ConfigError(where, f"{key}: is {value}", f"give a whole number up to {_MOST}")
    return fitted


def _as_meant(hint: Any, value: Any, where: str, key: str) -> Any:
    """YAML takes 2e-5 for text, and the word 32 for a number. Infinity is no number of a setting."""
    kinds = {hint, *get_args(hint)}
    if str in kinds and isinstance(value, bool | int | float | date) and type(value) not in kinds:
        remedy = (
            f"it was {value}: put the word in quotation marks, behind --set in two pairs: '{key}=\"...\"'"
        )
        raise ConfigError(where, f"{key}: should be text", remedy)
    if isinstance(value, bool) and kinds & {int, float}:
        raise ConfigError(where, f"{key}: should be a number", f"it was {value}")
    if isinstance(value, str) and kinds & {int, float} and str not in kinds:
        value = _number(value)
    elif isinstance(value, int) and str(value) in kinds:  # one of the words to choose from
        value = str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(where, f"{key}: is {value}", "give a finite number")
    return value


def takes(hint: Any) -> str:
    """A type in words: a choice's words, or what kind of value it is.

    >>> takes(int | None)
    'whole number or `null`'
    """
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "`null`"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {takes(get_args(hint)[0])}s"
    return " or ".join(takes(one) for one in get_args(hint))


@cache
def _adapter(hint: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(hint)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
