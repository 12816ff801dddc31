"""Any chain of blocks falls into units that are the same function; K modules have like activation memory."""

import gc
import itertools

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from holoslide.errors import ConfigError, ModelError, NotLocal
from holoslide.models.options import BackboneConfig
from holoslide.models.partition import Appending, Trunk, build_trunk, cut
from holoslide.streaming.receptive import Receptive

STAGES_OF_RESNET34 = [f"layer{s}.{i}" for s, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for i in range(n)]


def trunk_of(name: str, **options: object) -> Trunk:
    return build_trunk(BackboneConfig(name=name, weights="none", **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def resnet34() -> Trunk:
    return trunk_of("resnet34", stem_stride=3)


def names(groups: list[tuple[object, ...]]) -> list[list[str]]:
    return [[unit.name for unit in group] for group in groups]  # type: ignore[attr-defined]


# Backbone, the layer whose output is compared (all but the last few are the features' end, by the library's own
# word), number of units, total stride.
BACKBONES = [
    ("resnet18", "layer4", 8, 32),
    ("regnet_x_400mf", "trunk_output", 22, 32),
    ("mobilenet_v2", "features", 18, 32),
    ("squeezenet1_1", "features", 8, 16),
    ("vgg11_bn", "features", 4, 32),
    ("densenet121", "features", 61, 32),
    ("timm/resnet26d", "forward_features", 8, 32),
    ("timm/regnetx_002", "forward_features", 13, 32),
    ("timm/efficientnet_lite0", "forward_features", 17, 32),
    ("timm/convnext_atto", "forward_features", 15, 32),
    ("torchvision/resnet50", "layer2", 7, 8),
    ("torchvision/resnext50_32x4d", "layer1", 3, 4),
    ("convnext_tiny", "features.3", 7, 8),
    ("timm/densenet121", "features.denseblock2", 19, 8),
    ("timm/darknet53", "stages.2", 13, 8),
]


@pytest.mark.parametrize(("name", "end", "units", "stride"), BACKBONES)
def test_stem_and_units_are_the_whole_network(name: str, end: str, units: int, stride: int) -> None:
    torch.manual_seed(0)
    trunk = trunk_of(name, truncate=None if end == "forward_features" else end)
    torch.manual_seed(0)  # the same weights again, in the network as its library runs it
    library, _, bare = name.rpartition("/")
    whole: nn.Module = timm.create_model(bare) if library == "timm" else torchvision.models.get_model(bare)
    whole, image = whole.eval().double(), torch.rand(1, 3, 65, 74, dtype=torch.float64)
    seen = []
    with torch.no_grad():
        if end == "forward_features":
            seen.append(whole.forward_features(image))
        else:
            whole.get_submodule(end).register_forward_hook(
                lambda module, given, made: seen.append(made.clone())
            )
            whole(image)
        result = trunk.stem.double()(image)
        assert result.shape[1] == trunk.stem_channels
        for unit in trunk.units:
            assert result.shape[1] == unit.in_channels
            result = unit.module.double()(result)
            assert result.shape[1] == unit.out_channels
    torch.testing.assert_close(result, seen[0], rtol=1e-12, atol=1e-12)
    assert len(trunk.units) == units
    total = trunk.stem_field
    for unit in trunk.units:
        total = total.then(unit.field)
    assert total.stride == stride


def test_the_papers_stem_has_stride_six(resnet34: Trunk) -> None:
    kinds = [type(layer) for layer in resnet34.stem]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    assert resnet34.stem[0].stride == (3, 3)
    assert resnet34.stem_field == Receptive(6, -6, 6)
    assert [unit.name for unit in resnet34.units] == STAGES_OF_RESNET34


@pytest.mark.parametrize(
    ("modules", "sizes"),
    [
        (8, [1, 1, 1, 2, 2, 3, 3, 3]),  # layer1.0|1.1|1.2 | layer2.0-1|2.2-3 | layer3.0-2|3.3-5 | layer4
        (4, [2, 3, 5, 6]),
        (2, [5, 11]),
        (1, [16]),
    ],
)
def test_resnet34_is_cut_into_the_papers_modules(resnet34: Trunk, modules: int, sizes: list[int]) -> None:
    rest = iter(STAGES_OF_RESNET34)
    assert names(cut(resnet34.units, modules)) == [list(itertools.islice(rest, n)) for n in sizes]


@pytest.mark.parametrize("name", ["resnet34", "mobilenet_v2", "timm/densenet121"])
def test_fewer_modules_only_take_borders_away(name: str) -> None:
    units = trunk_of(name).units
    borders = {}
    for modules in range(1, len(units) + 1):
        groups = cut(units, modules)
        assert len(groups) == modules
        assert [unit for group in groups for unit in group] == list(units)
        borders[modules] = set(itertools.accumulate(len(group) for group in groups))
        assert borders.get(modules - 1, set()) <= borders[modules]
        heaviest = max(sum(unit.activation_bytes for unit in group) for group in groups)
        # No cut's heaviest group can be lighter than the heaviest unit or than an equal share.
        share = sum(unit.activation_bytes for unit in units) / modules
        assert heaviest <= 2 * max(share, max(unit.activation_bytes for unit in units))


def test_a_number_of_modules_that_cannot_be_names_the_range(resnet34: Trunk) -> None:
    for modules in (0, 17):
        with pytest.raises(ConfigError, match=rf"model.modules: {modules} is out of range; choose 1 to 16"):
            cut(resnet34.units, modules)


def test_activation_bytes_are_those_of_a_hand_count(resnet34: Trunk) -> None:
    # A basic block keeps both convolutions' and both ReLUs' outputs, and a strided one its shortcut's, too.
    by_name = {unit.name: unit.activation_bytes for unit in resnet34.units}
    block = by_name["layer1.0"]
    assert by_name["layer1.2"] == block
    assert by_name["layer2.1"] * 2 == block
    assert by_name["layer2.0"] * 8 == block * 5
    assert by_name["layer4.2"] * 8 == block


def test_a_dense_block_is_cut_between_its_layers() -> None:
    trunk = trunk_of("densenet121", truncate="features.denseblock1")
    assert [unit.name for unit in trunk.units] == [f"features.denseblock1.denselayer{i}" for i in range(1, 7)]
    assert all(isinstance(unit.module, Appending) for unit in trunk.units)
    assert [unit.out_channels for unit in trunk.units] == [96, 128, 160, 192, 224, 256]


@pytest.mark.parametrize(
    ("name", "last", "final"),
    [
        ("resnet18", "layer3", "layer3.1"),
        ("resnet18", "layer2.0", "layer2.0"),
        ("vgg11_bn", "features.7", "features.4-features.7"),
        ("densenet121", "features.denseblock1.denselayer2", "features.denseblock1.denselayer2"),
    ],
)
def test_truncate_keeps_the_chain_up_to_a_layer(name: str, last: str, final: str) -> None:
    trunk = trunk_of(name, truncate=last)
    assert trunk.units[-1].name == final


def test_truncate_after_what_is_not_there_names_the_stages() -> None:
    with pytest.raises(ModelError, match=r"resnet18: has no layer layer5 .*; its stages are conv1, .*layer4"):
        trunk_of("resnet18", truncate="layer5")
    with pytest.raises(ModelError, match="has no blocks after its stem"):
        trunk_of("resnet18", truncate="bn1")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("mobilenet_v3_small", r"features\.1\.block\.1"),
        ("timm/mobilenetv3_small_050", r"blocks\.0\.0\.se \(SqueezeExcite\)"),
    ],
)
def test_layers_that_see_the_whole_map_are_refused_by_name(name: str, layer: str) -> None:
    with pytest.raises(NotLocal, match=rf"^{layer}.*sees the whole map"):
        trunk_of(name)


@pytest.mark.parametrize("name", ["vit_b_16", "timm/vit_tiny_patch16_224"])
def test_what_is_no_convolutional_network_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="cannot be run on images of any size"):
        trunk_of(name)


def test_a_network_that_branches_is_refused_at_the_branch() -> None:
    with pytest.raises(ModelError, match="is not a chain: stage2 does not read"):
        trunk_of("timm/hrnet_w18_small")


class Chain(nn.Module):
    """A stem and blocks; with `twice` the last runs twice, so that it is no chain."""

    def __init__(self, blocks: int, *, twice: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        for i in range(blocks):
            self.add_module(f"block{i}", BasicBlock(8, 8))
        if twice:
            self.add_module(f"block{blocks - 1}", self.get_submodule(f"block{blocks - 2}"))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        for layer in self._modules.values():
            image_BCHW = layer(image_BCHW)
        return image_BCHW


@pytest.mark.filterwarnings("ignore:Overwriting")
def test_a_name_that_another_network_got_since_stands_for_that_one() -> None:
    """What was found of the first is kept, for as long as the process lives."""

    def given(network: nn.Module) -> list[str]:
        def network_given_anew(**options: object) -> nn.Module:
            return network

        timm.models.register_model(network_given_anew)
        return [unit.name for unit in trunk_of("timm/network_given_anew").units]

    assert given(Chain(3)) == ["block0", "block1", "block2"]
    assert given(Chain(2)) == ["block0", "block1"]
    assert given(Chain(3)) == ["block0", "block1", "block2"]
    with pytest.raises(ModelError, match="is not a chain: block1 does not read"):
        given(Chain(3, twice=True))


def test_a_network_that_is_gone_leaves_nothing_behind() -> None:
    """A program that scores slide after slide builds it again and again."""

    def tensors_after_one_more() -> int:
        build_trunk(BackboneConfig(name="resnet18", weights="none", truncate="layer1"))
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    before = tensors_after_one_more()
    assert tensors_after_one_more() == before
