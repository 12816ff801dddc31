"""A backbone by its name in torchvision or timm, with the library's weights, a local file's, or none."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from holoslide.errors import ModelError
from holoslide.files import UNREADABLE
from holoslide.models.options import BackboneConfig

_COUNTER = "num_batches_tracked"  # BatchNorm counts its training steps; frozen, it never reads the count


def create(config: BackboneConfig) -> nn.Module:
    """The whole network in evaluation mode; weights from a file are not loaded yet (see `load_file`)."""
    make = _maker(config.name)
    pretrained = config.weights == "default"
    try:
        network = make(pretrained)
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        if not pretrained:
            raise ModelError(config.name, f"cannot be built ({_line(error)})", "choose another") from error
        raise ModelError(
            config.name,
            f"its pretrained weights are not to be had ({_line(error)})",
            "give a local file as model.backbone.weights, or none for random weights",
        ) from error
    if config.stem_stride is not None:
        first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            raise ModelError(config.name, "has no convolution", "choose a convolutional network")
        first.stride = (config.stem_stride, config.stem_stride)
    return network.eval()


def load_file(network: nn.Module, path: Path, *, kept: Iterable[str], head: Iterable[str]) -> None:
    """Give the layers named in `kept` the weights of a file.

    Keys must be those of the kept layers exactly. Keys of the network's other layers, and any under the
    top-level modules named in `head`, may be there or not. Raises `ModelError` with the keys that do not fit.
    """
    state, own = read_state(path), network.state_dict()
    needed = {key for key in own if _under(key, kept)}
    missing = [key for key in own if key in needed and key not in state and not key.endswith(_COUNTER)]
    unexpected = [key for key in state if key not in own and not _under(key, head)]
    misshapen = [key for key in own if key in needed & state.keys() and state[key].shape != own[key].shape]
    faults = [
        f"{what} {_some(keys)}"
        for what, keys in (
            ("lacks", missing),
            ("has unknown", unexpected),
            ("has another shape for", misshapen),
        )
        if keys
    ]
    if faults:
        remedy = "give the weights of this very network"
        if missing and not unexpected:
            remedy += ", or set model.backbone.truncate to the last stage that they have"
        raise ModelError(path, "; ".join(faults), remedy)
    own.update({key: state[key] for key in needed & state.keys()})
    network.load_state_dict(own)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict (.pth, without running any code in it) or of a .safetensors file."""
    if not path.is_file():
        raise ModelError(path, "there is no such file of weights", "give default, none or a local file")
    _refuse_no_weights(path)
    try:
        if path.suffix == ".safetensors":
            state: object = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (*UNREADABLE, safetensors.SafetensorError) as error:
        raise ModelError(
            path, f"cannot be read as weights ({_line(error)})", "give a state dict or .safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(path, "is not a plain state dict", "save the network's state_dict() alone")
    return state


def _refuse_no_weights(path: Path) -> None:
    """What people have in place of weights, where a download went wrong."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(path, "is a pointer of Git LFS, not the weights", "fetch them with git lfs pull")
    if start.lstrip()[:1] == b"<":
        raise ModelError(path, "is a web page, not weights", "download the file itself")


def _maker(name: str) -> Callable[[bool], nn.Module]:
    """The library function that builds a network, by argument with or without pretrained weights."""
    library, _, bare = name.rpartition("/")
    in_torchvision = torchvision.models.list_models(module=torchvision.models)
    if library in ("", "torchvision") and bare in in_torchvision:
        return lambda pretrained: torchvision.models.get_model(
            bare, weights="DEFAULT" if pretrained else None
        )
    import timm  # takes half a second, which torchvision's networks are spared

    if library in ("", "timm") and timm.is_model(bare):
        return lambda pretrained: timm.create_model(bare, pretrained=pretrained)
    known = {"torchvision": in_torchvision, "timm": timm.list_models()}
    if library not in ("", *known):
        raise ModelError(name, f"{library} is no known library", "use torchvision/..., timm/... or no prefix")
    names = known[library] if library else sorted(set(known["torchvision"]) | set(known["timm"]))
    near = difflib.get_close_matches(bare, names, n=3)
    where = library or "torchvision nor in timm"
    raise ModelError(
        name, f"is not a network in {where}", f"choose {' or '.join(near)}" if near else "choose another name"
    )


def _under(key: str, names: Iterable[str]) -> bool:
    return any(key.startswith(f"{name}.") or key == name for name in names)


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
