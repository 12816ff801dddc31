"""Names are looked up in torchvision, then timm; weights fit exactly or are refused by key."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from holoslide.errors import ConfigError, ModelError
from holoslide.models.backbone import create
from holoslide.models.options import BackboneConfig
from holoslide.models.partition import build_trunk


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet43", "resnet43: is not a network in torchvision nor in timm; choose resnet34 or"),
        ("timm/convnext_tinny", "timm/convnext_tinny: is not a network in timm; choose convnext_tiny"),
        ("torchvision/resnet26d", "torchvision/resnet26d: is not a network in torchvision; choose resnet"),
        ("keras/resnet50", "keras/resnet50: keras is no known library; use torchvision/"),
    ],
)
def test_an_unknown_name_gets_its_nearest(name: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        create(BackboneConfig(name=name, weights="none"))
    assert str(caught.value).startswith(message)


def test_a_prefix_forces_the_library() -> None:
    def library(name: str) -> str:
        return type(create(BackboneConfig(name=name, weights="none"))).__module__.partition(".")[0]

    assert library("resnet18") == library("torchvision/resnet18") == "torchvision"
    assert library("timm/resnet18") == library("resnet26d") == "timm"


def test_pretrained_weights_that_are_not_to_be_had_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        message = "<urlopen error [Errno -2] Name or service not known>"
        raise OSError(message)

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(
        ModelError, match=r"^resnet18: its pretrained weights are not to be had \(.*known>\); give"
    ):
        create(BackboneConfig(name="resnet18"))


def test_options_are_checked_when_made() -> None:
    with pytest.raises(ConfigError, match=r"model.backbone.stem_stride: is 0; give 1 or more"):
        BackboneConfig(stem_stride=0)


@pytest.mark.parametrize(
    ("file", "name", "truncate", "units"),
    [
        ("resnet18_imagenet_bnfolded_stem_to_layer3.pth", "resnet18", "layer3", 6),
        ("mobilenet_v2_imagenet_onnxzoo_bnfolded_noclassifier.pth", "mobilenet_v2", None, 18),
        ("squeezenet1_1_imagenet_onnxzoo.pth", "squeezenet1_1", None, 8),
    ],
)
def test_real_weights_load_with_their_exact_keys(
    data_dir: Path, file: str, name: str, truncate: str | None, units: int
) -> None:
    path = data_dir / "weights" / file
    trunk = build_trunk(BackboneConfig(name=name, weights=str(path), truncate=truncate))
    assert len(trunk.units) == units
    real = torch.load(path, weights_only=True)
    plain = torchvision.models.get_model(name).eval()
    plain.load_state_dict({**plain.state_dict(), **real})
    plain.stages = None
    image, seen = torch.rand(1, 3, 96, 96), []
    end = plain.get_submodule(truncate or "features")
    end.register_forward_hook(lambda module, given, made: seen.append(made.clone()))
    with torch.no_grad():
        plain(image)
        result = trunk.stem(image)
        for unit in trunk.units:
            result = unit.module(result)
    torch.testing.assert_close(result, seen[0])


def test_missing_stages_are_named_with_the_way_out(data_dir: Path) -> None:
    path = data_dir / "weights" / "resnet18_imagenet_bnfolded_stem_to_layer3.pth"
    with pytest.raises(
        ModelError, match=r"lacks layer4.0.conv1.weight.* more; .* or set model.backbone.truncate"
    ):
        build_trunk(BackboneConfig(name="resnet18", weights=str(path)))


def save_changed(path: Path, **changes: torch.Tensor | None) -> BackboneConfig:
    """A squeezenet's weights with some keys changed, or dropped (None)."""
    state = dict(torchvision.models.squeezenet1_1().state_dict())
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return BackboneConfig(name="squeezenet1_1", weights=str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_classifier_may_be_missing_extra_or_of_other_classes(tmp_path: Path, suffix: str) -> None:
    for changes in (
        {"classifier__1__weight": None, "classifier__1__bias": None},
        {"classifier__1__weight": torch.rand(7, 512, 1, 1), "classifier__1__bias": torch.rand(7)},
        {"classifier__9__weight": torch.rand(2)},
    ):
        config = save_changed(tmp_path / f"weights{suffix}", **changes)
        trunk = build_trunk(config)
        state = (
            safetensors.torch.load_file(config.weights)
            if suffix == ".safetensors"
            else torch.load(config.weights)
        )
        assert torch.equal(trunk.stem[0].weight, state["features.0.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features__3__squeeze__bias": None}, "lacks features.3.squeeze.bias; give"),
        ({"module__fc__weight": torch.rand(1)}, "has unknown module.fc.weight; give"),
        ({"features__0__bias": torch.rand(3)}, "has another shape for features.0.bias; give"),
    ],
)
def test_keys_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_trunk(save_changed(tmp_path / "weights.pth", **changes))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    cases = {
        "absent.pth": (None, "no such file"),
        "text.pth": (b"no weights", "cannot be read as weights"),
        "hello.pth": (b"hello world", "cannot be read as weights"),
        "dot.pth": (b".", "cannot be read as weights"),
        "text.safetensors": (b"no weights", "cannot be read as weights"),
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        "page.pth": (b"<!DOCTYPE html><html>", "is a web page"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=message):
            build_trunk(BackboneConfig(name="squeezenet1_1", weights=str(tmp_path / name)))
    torch.save({"model": {"a": torch.rand(1)}}, tmp_path / "nested.pth")
    with pytest.raises(ModelError, match="is not a plain state dict; save the network's state_dict"):
        build_trunk(BackboneConfig(name="squeezenet1_1", weights=str(tmp_path / "nested.pth")))
