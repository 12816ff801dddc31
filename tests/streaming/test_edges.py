"""What a map's edge shows: layers whose padding no window can repeat are refused there, and streamed on glass."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holoslide.errors import NotLocal
from holoslide.streaming import Segment


class Joined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.roll(x, 1, dims=2)


class Same(nn.Conv2d):
    """Pads as TensorFlow does: where the first cell reads depends on whether the map's side is odd."""

    def forward(self, x: Tensor) -> Tensor:
        down, across = (1 + n % 2 for n in x.shape[2:])
        return super().forward(F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2)))


@pytest.mark.parametrize(
    ("module", "where"),
    [
        (
            nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReflectionPad2d(3), nn.Conv2d(2, 2, 5)),
            r"1 \(ReflectionPad2d\)",
        ),
        (nn.Conv2d(2, 2, 1, padding=2, padding_mode="reflect"), "Conv2d"),
        (nn.Sequential(nn.ReLU(), Joined()), r"1 \(Joined\)"),
        (Same(2, 2, 3, stride=2), "Same"),
    ],
)
def test_padding_that_no_window_can_repeat_is_refused_at_the_edge(module: nn.Module, where: str) -> None:
    text = f"^{where}: gives a window at the map's edge other values than the whole map; stream it with"
    with pytest.raises(NotLocal, match=text):
        Segment(module, border="zeros", channels=2)
    assert Segment(module, channels=2).border == "glass"
