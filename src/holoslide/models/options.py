"""The settings of a model, and of how it is streamed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from holoslide.errors import ConfigError
from holoslide.geometry import Border

Scale = Literal["weights", "cohort"]
Pooling = Literal["auto", "gated", "attention", "mean"]
Norm = Literal["slide", "cohort"]
Pool = Literal["tissue", "all"]
Precision = Literal["auto", "32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which network, and which of its weights."""

    name: str = "resnet34"
    """A network of torchvision's or else timm's; `torchvision/...` or `timm/...` forces one."""
    weights: str = "default"
    """`default` (the library's pretrained ones, downloaded), `none` (random) or a local file: a state dict
    (.pth) or .safetensors."""
    truncate: str | None = None
    """The last layer or stage that is kept; null keeps all."""
    stem_stride: int | None = None
    """Replaces the stride of the first convolution (the paper's ResNet-34 takes 3 instead of 2); null leaves
    the network as it is."""
    scale: Scale = "weights"
    """What pixels are normalised by: `cohort` (the paper's, and of random weights the only one) mean and deviation
    of the training slides' tissue, `weights` ImageNet's, as pretrained weights learned them."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("model.backbone.name", "is empty", "name a network of torchvision or timm")
        if not self.weights:
            raise ConfigError("model.backbone.weights", "is empty", "give default, none or a file")
        if self.scale not in get_args(Scale):
            raise ConfigError("model.backbone.scale", f"is {self.scale}", "choose weights or cohort")
        if self.stem_stride is not None and self.stem_stride < 1:
            raise ConfigError(
                "model.backbone.stem_stride", f"is {self.stem_stride}", "give 1 or more, or null"
            )

    @property
    def by_cohort(self) -> bool:
        """Whether pixels are normalised by the cohort's own."""
        return self.scale == "cohort" or self.weights == "none"

    @property
    def file(self) -> Path | None:
        """The local file of weights, if that is what `weights` names."""
        return None if self.weights in ("default", "none") else Path(self.weights)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """All heads of a model."""

    pooling: Pooling = "gated"
    """How cells become one answer. `gated` (the paper's) and `attention`: the cells are pooled to one vector by
    learned weights, which is classified; `mean`: by equal weights. `auto`: each cell is classified, and each
    class's logits are pooled by a softmax over them; a small lesion teaches from the first step."""
    norm: Norm = "cohort"
    """With `cohort` the stem's input is normalised by statistics measured once on the training slides, and a cell
    speaks for what it sees alone. `slide` is the paper's GroupNorm over all cells of a slide. It lets each cell
    know of all others, so that evidence may stand beside what it is about, or everywhere but on it."""
    kernel: int | None = 3
    """Side of the last head's stem, in cells of the last map. The earlier heads' are larger by as much as their
    maps are finer, so that the cells of all heads are the same squares of tissue. null takes the paper's for
    each map's depth: 9, 9, 7, 5 in layer1 to layer4 of a ResNet."""
    max_channels: int = 512
    """A head keeps its map's channels, but at most so many: the paper's networks end in 512, and a 5 x 5
    convolution from 2,048 channels to as many would alone outweigh the backbone."""
    dropout: float = 0.2
    """Falls on the attention weights, in training only."""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ConfigError(
                "model.heads.pooling", f"is {self.pooling}", f"choose {', '.join(get_args(Pooling))}"
            )
        if self.norm not in get_args(Norm):
            raise ConfigError("model.heads.norm", f"is {self.norm}", f"choose {', '.join(get_args(Norm))}")
        if self.kernel is not None and self.kernel < 1:
            raise ConfigError("model.heads.kernel", f"is {self.kernel}", "give 1 or more, or null")
        if self.max_channels < 2:
            raise ConfigError("model.heads.max_channels", f"is {self.max_channels}", "give 2 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError("model.heads.dropout", f"is {self.dropout}", "give a number from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """The second local loss: a module's input, made again from its output (RFR)."""

    alpha: float = 1.0
    """Weighs the loss, a mean absolute difference; 0: none, and no decoders."""
    patches: int = 10
    """How many are drawn of each slide in each module."""
    side: int | None = None
    """Of a patch, in cells of the module's output; null takes the paper's for the map's depth: 128 in layer1,
    64 in layer2, 32 in layer3."""
    share: float | None = 0.25
    """All patches together take at most this share of a slide's tissue, and are made smaller for that: on a small
    slide they would be more cells than there are. null: never smaller, as the paper."""

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ConfigError("model.reconstruction.alpha", f"is {self.alpha}", "give 0 or more")
        if self.patches < 2:  # of a map of one cell, a single patch has no variance to normalise by
            raise ConfigError("model.reconstruction.patches", f"is {self.patches}", "give 2 or more")
        if self.side is not None and self.side < 1:
            raise ConfigError("model.reconstruction.side", f"is {self.side}", "give 1 or more, or null")
        if self.share is not None and self.share <= 0:
            raise ConfigError("model.reconstruction.share", f"is {self.share}", "give more than 0, or null")

    def side_in(self, tissue_cells: float, *, largest: int) -> int:
        """Side of the patches in a map with so many cells of tissue, where `largest` is the map's own.

        >>> [ReconstructionConfig().side_in(cells, largest=128) for cells in (1_000_000, 62_500, 10)]
        [128, 39, 1]
        """
        if self.share is None:
            return largest
        return max(1, min(largest, math.isqrt(int(self.share * tissue_cells / self.patches))))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a backbone cut into modules, each with a head and, but for the last, a decoder."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Which network, and which of its weights."""
    modules: int = 4
    """K, the number of locally trained modules; 1 is end-to-end training."""
    barrier_every: int = 1
    """A gradient barrier follows every so many modules. 1 is the paper's local learning; with `modules` or more
    there is none: end-to-end training, which the auxiliary heads and reconstruction supervise on its way."""
    border: Border = "glass"
    """What lies around a slide: `glass` takes it to go on for ever as glass, `zeros` pads as the paper does."""
    pool: Pool = "tissue"
    """Heads pool over the cells whose own square of the raster holds tissue, or over `all`."""
    heads: HeadConfig = field(default_factory=HeadConfig)
    """All heads of a model."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """The second local loss: a module's input, made again from its output."""

    def __post_init__(self) -> None:
        if self.modules < 1:
            raise ConfigError("model.modules", f"is {self.modules}", "give 1 or more")
        if self.barrier_every < 1:
            raise ConfigError("model.barrier_every", f"is {self.barrier_every}", "give 1 or more")
        for name, choices in (("border", get_args(Border)), ("pool", get_args(Pool))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"model.{name}", f"is {getattr(self, name)}", f"choose {' or '.join(choices)}"
                )


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What the model expects of a raster: microns per pixel, and the colours it is normalised by.

    `mean` and `std` are per channel, of pixels from 0 to 1 (default: ImageNet's); `glass` is the RGB that
    stands outside the tissue. `mpp` is None until the model has been trained.
    """

    mpp: float | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    glass: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        for name, kind in (("mean", float), ("std", float), ("glass", int)):  # from NumPy's numbers, too
            object.__setattr__(self, name, tuple(kind(value) for value in getattr(self, name)))
        if self.mpp is not None and self.mpp <= 0:
            raise ConfigError("input.mpp", f"is {self.mpp}", "give microns per pixel above 0")
        if min(self.std) <= 0:
            raise ConfigError("input.std", f"is {self.std}", "give numbers above 0")
        if not all(0 <= value <= 255 for value in self.glass):
            raise ConfigError("input.glass", f"is {self.glass}", "give RGB from 0 to 255")


@dataclass(frozen=True)
class StreamConfig:
    """How a slide is streamed."""

    memory_gib: float | None = None
    """The budget that tiles are planned for; null takes most of what is free when a run starts. Past it,
    feature maps go to a file."""
    folder: str | None = None
    """Where that file is; null takes the system's folder for temporary files."""
    tile_cells: int | None = None
    """Tiles of this side, in cells of any map, instead of a plan."""
    batch: int = 1
    """With `tile_cells`: how many tiles are run together."""
    keep: int = 0
    """With `tile_cells`: how many batches' graphs are kept from the forward pass for the backward one."""
    segment_units: int = 0
    """Units of the backbone that run as one segment inside a module; 0: all of the module's."""

    def __post_init__(self) -> None:
        for name in ("memory_gib", "tile_cells", "batch"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"stream.{name}", f"is {value}", "give a number above 0")
        for name in ("keep", "segment_units"):
            if getattr(self, name) < 0:
                raise ConfigError(f"stream.{name}", f"is {getattr(self, name)}", "give 0 or more")
