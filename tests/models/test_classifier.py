"""The assembled model: its parts, what is trained, and saving and loading bit by bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from timm.models import register_model
from torch import nn

from holoslide.errors import CheckpointError, ConfigError, ModelError
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import (
    BackboneConfig,
    HeadConfig,
    InputConfig,
    ModelConfig,
    ReconstructionConfig,
)

CLASSES = ("LUAD", "LUSC", "other")
BACKBONE = BackboneConfig(name="resnet18", weights="none", stem_stride=3, truncate="layer3")
INPUTS = InputConfig(mpp=2.0, mean=(0.71, 0.53, 0.66), std=(0.1, 0.2, 1 / 3), glass=(243, 240, 244))


def make(seed: int = 0, **options: object) -> LocalClassifier:
    config = ModelConfig(**{"backbone": BACKBONE, "modules": 3, **options})  # type: ignore[arg-type]
    return LocalClassifier.from_config(
        config, classes=CLASSES, inputs=INPUTS, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="module")
def model() -> LocalClassifier:
    return make()


def test_parts_heads_and_decoders_fit_together(model: LocalClassifier) -> None:
    assert model.units == (("layer1.0",), ("layer1.1",), ("layer2.0", "layer2.1", "layer3.0", "layer3.1"))
    assert model.strides == (1, 1, 4)
    assert model.stem_channels == 64
    assert [head.stem.kernel_size[0] for head in model.heads] == [12, 12, 3]  # the same squares of tissue
    papers = make(heads=HeadConfig(kernel=None))
    assert [head.stem.kernel_size[0] for head in papers.heads] == [9, 9, 7]
    assert [head.readout.hidden.out_features for head in model.heads] == [128, 128, 512]
    assert [decoder.side for decoder in model.decoders] == [128, 128]
    assert all(type(part) is nn.Sequential for part in model.parts)
    assert model.mpp == 2.0
    assert model.glass == (243, 240, 244)
    assert model(torch.rand(1, 3, 240, 200)).shape == (3, 3)


def test_one_module_has_the_final_head_alone() -> None:
    model = make(modules=1)
    assert len(model.parts) == len(model.heads) == 1
    assert len(model.decoders) == 0
    assert model.heads[0].readout.hidden.out_features == 512


def test_no_decoders_without_reconstruction() -> None:
    assert len(make(reconstruction=ReconstructionConfig(alpha=0)).decoders) == 0
    assert [d.side for d in make(reconstruction=ReconstructionConfig(side=7)).decoders] == [7, 7]


def test_no_gradient_crosses_a_border(model: LocalClassifier) -> None:
    logits_KL = model(torch.rand(1, 3, 350, 350))  # four cells in the last head: a lone cell has no gradient
    logits_KL[2].sum().backward()
    assert not any(p.grad.any() for k in (0, 1) for p in model.parts[k].parameters() if p.grad is not None)
    assert model.parts[2][-1].conv2.weight.grad.any()
    model.zero_grad()


def test_the_backbone_stays_frozen_in_its_statistics(model: LocalClassifier) -> None:
    for mode in (True, False):
        assert model.train(mode).training is mode
        for norm in (m for part in (model.stem, model.parts) for m in part.modules()):
            assert not norm.training
    before = {k: v.clone() for k, v in model.train().state_dict().items() if "running" in k}
    model(torch.rand(1, 3, 160, 160))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert not any(p.requires_grad for p in model.stem.parameters())


def test_parameter_groups_hold_all_that_is_trained_once(model: LocalClassifier) -> None:
    heads, backbone = model.parameter_groups(2e-5)
    assert heads["lr"] == 2e-5
    assert backbone["lr"] == 1e-5
    grouped = [id(p) for group in (heads, backbone) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert id(model.parts[0].layer1_0.bn1.weight) in {id(p) for p in backbone["params"]}
    torch.optim.AdamW([heads, backbone])


def test_first_weights_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = make(1), make(1), make(2)
    assert torch.equal(torch.get_rng_state(), state)
    for (key, a), b in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert not torch.equal(first.heads[0].stem.weight, other.heads[0].stem.weight)
    assert not torch.equal(first.stem[0].weight, other.stem[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_model_comes_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make(heads=HeadConfig(pooling="attention", kernel=4), border="zeros", pool="all").to(dtype).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=dtype) / 7
    model.to(memory_format=torch.channels_last)
    model.set_input(INPUTS)
    model.save(tmp_path / "a" / "model")
    state = torch.get_rng_state()
    loaded = LocalClassifier.load(tmp_path / "a" / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in (tmp_path / "a" / "model").iterdir()) == [
        "model.safetensors",
        "model.yaml",
    ]
    assert (loaded.config, loaded.classes, loaded.inputs) == (model.config, model.classes, model.inputs)
    assert loaded.units == model.units
    assert not loaded.training
    own, theirs = model.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys()
    for key, tensor in own.items():
        if not key.startswith("decoders."):
            assert tensor.dtype == theirs[key].dtype
            assert torch.equal(tensor, theirs[key]), key
    image = torch.rand(1, 3, 150, 170, dtype=dtype)
    # The weights are the same bit for bit; sums over memory laid out otherwise are not, and a norm over a few
    # cells makes float32's rounding larger.
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(loaded(image), model(image), rtol=tolerance, atol=tolerance)


def test_a_model_whose_layers_share_weights_comes_back(tmp_path: Path) -> None:
    shared = make().eval()
    block = shared.parts[1].layer1_1
    block.conv2.weight = block.conv1.weight
    shared.save(tmp_path)
    image = torch.rand(1, 3, 240, 200)
    loaded = LocalClassifier.load(tmp_path)
    torch.testing.assert_close(loaded(image), shared(image), rtol=1e-3, atol=1e-3)


def test_decoders_are_in_the_training_state_but_not_in_the_saved_model(
    model: LocalClassifier, tmp_path: Path
) -> None:
    assert any(key.startswith("decoders.") for key in model.state_dict())
    model.save(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {key.partition(".")[0] for key in saved} == {"stem", "parts", "heads"}


class Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.BatchNorm2d(out)
        self.mix, self.act = nn.Conv2d(out, out, 3, padding=1), nn.SiLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.down(x)))
        return self.act(self.mix(x) + x)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            Block(8, 12),
            Block(12, 16),
        )
        self.classify = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.second(self.first(self.stem(x))).mean((2, 3)))


def test_a_network_of_ones_own_goes_by_the_name_it_is_given(tmp_path: Path) -> None:
    def network_of_a_test(**options: object) -> nn.Module:
        return Own()

    register_model(network_of_a_test)
    model = make(backbone=BackboneConfig(name="network_of_a_test", weights="none"), modules=2).eval()
    assert model.units == (("first",), ("second",))
    assert model.strides == (2, 2)
    model.save(tmp_path)
    image = torch.rand(1, 3, 150, 160)
    torch.testing.assert_close(LocalClassifier.load(tmp_path)(image), model(image), rtol=1e-3, atol=1e-3)


def smoother(model: LocalClassifier) -> None:
    """Nothing in the weights would tell."""
    model.parts[1].layer1_1.relu = nn.SiLU()


def wider(model: LocalClassifier) -> None:
    model.heads[2].readout.hidden.weight = nn.Parameter(torch.zeros(9, 256))


def dropping(model: LocalClassifier) -> None:
    model.parts[0].append(nn.Dropout())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (smoother, "parts.1.layer1_1.relu: is not what the model's settings make.*register_model"),
        (wider, "heads.2.readout.hidden.weight: is not.*choose from what model.heads offers"),
        (dropping, r"parts\.0\.1: is not what"),
    ],
)
def test_a_model_that_would_come_back_as_another_is_not_saved(
    change: Callable[[LocalClassifier], None], said: str, tmp_path: Path
) -> None:
    changed = make()
    changed.decoders.append(nn.Identity())  # is not saved
    changed.eval().requires_grad_(requires_grad=False).double().refuse_changed()
    change(changed)
    with pytest.raises(ModelError, match=f"^{said}"):
        changed.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_loading_needs_no_weights_of_the_library(
    model: LocalClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path)
    card = yaml.safe_load((tmp_path / "model.yaml").read_text())
    card["model"]["backbone"]["weights"] = "default"
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    assert LocalClassifier.load(tmp_path).config.backbone.weights == "default"


def test_a_directory_that_is_not_whole_is_refused(model: LocalClassifier, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            LocalClassifier.load(tmp_path)

    refused("model.yaml: cannot be read .*; give the folder of a saved model")
    model.save(tmp_path)
    card, weights = tmp_path / "model.yaml", tmp_path / "model.safetensors"
    good = yaml.safe_load(card.read_text())

    def write(**changes: object) -> None:
        card.write_text(yaml.safe_dump({**good, **changes}))

    write(format="other")
    refused("is not the card of a holoslide model")
    write(version=2)
    refused("has version 2, this holoslide reads 1; install")
    write(units=[["layer1.0"], ["layer1.1"], ["layer2.0"]])
    refused("falls into other units here")
    write(model={**good["model"], "heads": {"pooling": "gated", "gates": 3}})
    refused("has settings that are unknown here: heads.gates; install")
    write(inputs={**good["inputs"], "mean": "grey"})
    refused("mean: ")
    write(classes=["a", "b"])
    refused(r"does not fit model.yaml at heads\.")
    write()
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("model.safetensors: cannot be read")
    weights.unlink()
    refused("model.safetensors: cannot be read")


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.modules: is 0; give 1 or more"):
        ModelConfig(modules=0)
    with pytest.raises(ConfigError, match=r"classes: are a, a; give two or more, all different"):
        LocalClassifier.from_config(ModelConfig(backbone=BACKBONE), classes=["a", "a"])
    with pytest.raises(ConfigError, match=r"input.std: is .*; give numbers above 0"):
        InputConfig(std=(0.1, 0.0, 0.2))


def test_a_backbones_name_is_enough() -> None:
    model = LocalClassifier.from_backbone("squeezenet1_1", classes=CLASSES, modules=2, weights="none")
    assert len(model.parts) == len(model.heads) == 2
    assert model.config == ModelConfig(
        backbone=BackboneConfig(name="squeezenet1_1", weights="none"), modules=2
    )
    assert model.mpp is None
