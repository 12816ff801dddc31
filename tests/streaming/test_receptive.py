"""Receptive fields found by experiment; whatever is not the same function everywhere is refused by its name."""

import warnings

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from holoslide.errors import NotLocal
from holoslide.streaming.probe import probe
from holoslide.streaming.receptive import Receptive


class Dilated(nn.Module):
    """Its reach does not show in its text."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self._reach = reach
        self.weight = nn.Parameter(torch.ones(2, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=self._reach, dilation=self._reach)


class Coordinates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.linspace(0, 1, x.shape[3], dtype=x.dtype, device=x.device)


class Map(nn.Module):
    """A map that is stretched over whatever comes; it is 0 until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(1, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(self.map, size=x.shape[2:], mode="bilinear")


class Checkered(nn.Module):
    """The same after one step down and one across, but not after either."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
        return x * (1 + (rows[:, None] + columns) % 2)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3)


class Beside(nn.Module):
    """Less the mean of all that is run with it."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Swallowing(nn.Module):
    """Lets no NaN through where it reads most."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 2:-2, 2:-2] + self.conv((x > 0.5).to(x.dtype))


class Seldom(nn.Module):
    """Reads around itself where there is much, and lets no NaN through from there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        nn.init.constant_(self.conv.weight, 1 / 27)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.conv(x)
        return x + torch.where(mean > 1.2, mean, 0)


class Counting(nn.Module):
    """Keeps a mean of what went through it, and makes no use of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.mean((0, 2, 3)).to(self.mean), 0.1)
        return self.conv(x)


class Late(nn.Module):
    """Makes its gain when it first runs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._buffers:
            self.register_buffer("gain", torch.full((3, 1, 1), 2.0, dtype=x.dtype, device=x.device))
        return x * self.gain


class Unknown(nn.Module):
    """Trains what an optimiser is never told of."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.ones(3, 1, 1, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Steered(nn.Module):
    """Reads where a convolution says; at first that is nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Conv2d(3, 2, 1)
        nn.init.zeros_(self.steps.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.grid_sample(x, self.steps(x).permute(0, 2, 3, 1), align_corners=False)


class DeformConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.conv = nn.Conv2d(3, 18, 1), torchvision.ops.DeformConv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.steps(x))


class Asking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 0 else -x


class Windows(nn.Module):
    """The mean of fixed squares of four cells, given back to each of them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("kernel", "stride", "low", "high"),
    [((3, 1), 2, -1, 1), ((1, 5), 2, -2, 2), ((1, 5), 1, -2, 2), ((5, 2), 3, -2, 2), ((1, 1), 2, 0, 0)],
)
def test_kernels_longer_one_way_than_the_other_reach_as_far_as_the_longer(
    kernel: tuple[int, int], stride: int, low: int, high: int
) -> None:
    """A strided one skips rows, or columns, altogether."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    assert probe(nn.Conv2d(3, 4, kernel, stride, padding)) == Receptive(stride, low, high)


def test_layers_of_one_text_and_another_reach_are_told_apart() -> None:
    fields = [probe(Dilated(reach), 2) for reach in (1, 3, 1)]
    assert str(Dilated(1)) == str(Dilated(3))
    assert fields == [Receptive(1, -1, 1), Receptive(1, -3, 3), Receptive(1, -1, 1)]


class Own(nn.Module):
    """A convolution whose size only its weights tell, and something that drops, but not now."""

    runs = 0

    def __init__(self, side: int, drop: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, side, side))
        self.drop = nn.Dropout(drop).eval()

    def forward(self, x: Tensor) -> Tensor:
        Own.runs += 1
        return self.drop(F.conv2d(x, self.weight, padding=self.weight.shape[2] // 2))


def test_modules_that_do_the_same_need_one_probe_and_others_their_own() -> None:
    assert [probe(Own(side, 0.1).eval(), 2).high for side in (3, 5)] == [1, 2]
    runs = Own.runs
    assert probe(Own(3, 0.2).eval(), 2).high == 1
    assert Own.runs == runs


def test_a_class_made_anew_under_its_old_name_is_probed_anew() -> None:
    def make(reach: int) -> nn.Module:
        class Block(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.max_pool2d(x, 2 * reach + 1, stride=1, padding=reach)

        return Block()

    assert [probe(make(reach), 1).high for reach in (1, 2)] == [1, 2]


class Pooled(nn.Module):
    """Its reach stands in a function, a text with an address, or in a tensor, whose text is cut short."""

    def __init__(self, reach: int, *, in_tensor: bool) -> None:
        super().__init__()
        if in_tensor:
            self.ones = torch.ones(1, 1, 2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
        else:
            self.pool = lambda x: F.max_pool2d(x, 2 * reach + 1, stride=1, padding=reach)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            return self.pool(x)
        return F.conv2d(x, self.ones.to(x.dtype), padding=self.ones.shape[2] // 2)


class Again(nn.Module):
    """One layer, which stands there a second time or does not."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.register_module("second", self.first if twice else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if self.second is None else self.second(x)


def test_modules_that_look_the_same_and_are_not_are_probed_each() -> None:
    assert [probe(Pooled(reach, in_tensor=False), 1).high for reach in (1, 2, 3)] == [1, 2, 3]
    assert [probe(Pooled(reach, in_tensor=True), 1).high for reach in (16, 17)] == [16, 17]
    assert [probe(Again(twice=twice), 2).high for twice in (False, True, False)] == [1, 2, 1]


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            scripted(),
            "RecursiveScriptModule: is TorchScript, which cannot be looked into; give what it was made",
        ),
        (nn.BatchNorm2d(3), "BatchNorm2d: sees the whole map; freeze it, put it in evaluation mode"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4).eval()),
            r"1 \(GroupNorm\): sees the whole map",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)),
            r"1 \(AdaptiveAvgPool2d\): sees the whole",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), r"1 \(Flatten\): does not give one feature map"),
        (nn.Sequential(nn.ReLU(), Twice()), r"1 \(Twice\): does not give one feature map"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()), r"1(\..*)?: draws random numbers of its own"),
        (nn.Conv2d(3, 4, 3, stride=(1, 2), padding=1), "another stride down than across; give both the same"),
        (
            nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
            r"1 \(Conv2d\): pads one edge of the map with the other",
        ),
        (nn.Upsample(scale_factor=2), "its stride is not a whole number"),
        (Coordinates(), "Coordinates: gives a window other values than the same place of the whole map"),
        (Windows(), "Windows: gives a window other values.*attention in fixed windows"),
        (Map(), "Map: gives a window other values"),
        (Checkered(), "Checkered: gives a window other values"),
        (Transposed(), "Transposed: gives a window other values"),
        (Beside(), "Beside: gives a window other values.*leave out what depends on the batch"),
        (Swallowing(), "Swallowing: gives a window other values"),
        (Seldom(), "Seldom: gives a window other values"),
        (
            nn.Sequential(nn.ReLU(), Counting()),
            r"1 \(Counting\): writes into its buffer mean, which each tile",
        ),
        (Late(), "Late: makes its gain when it first runs; run it once, on any map, before"),
        (Unknown(), r"Unknown: trains a tensor that is no parameter.*make it an nn\.Parameter"),
        (Steered(), "Steered: reads where its input says, however far that is; use another layer"),
        (DeformConv(), "DeformConv: reads where its input says"),
        (Asking(), r"Asking: cannot be tried on maps of 3 channels and of several sizes \(Tensor.item\(\)"),
        (nn.Conv2d(4, 3, 1), r"Conv2d: cannot be tried on maps of 3 channels.*\(Segment's `channels`\)"),
        (
            nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(3, track_running_stats=True).eval()),
            r"1 \(InstanceNorm2d\): is what BatchNorm is in evaluation mode.*make it a BatchNorm2d",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused_by_name(module: nn.Module, text: str) -> None:
    with pytest.raises(NotLocal, match=text):
        probe(module, 3)
