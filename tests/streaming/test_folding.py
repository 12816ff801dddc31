"""A folded twin is its module, whatever is loaded into the module later, and whatever its weights are made of."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from holoslide.streaming.cost import PeakBytes
from holoslide.streaming.folding import Folded, find_pairs
from tests.streaming.oracle import randomise, relative_error


def made() -> nn.Module:
    """A BatchNorm before any convolution, which cannot be folded, and one after, which can."""
    layers = nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
    return nn.Sequential(*layers)


def test_what_is_loaded_into_the_module_reaches_its_twin() -> None:
    module = randomise(made(), torch.Generator().manual_seed(0))
    other = randomise(made(), torch.Generator().manual_seed(1))
    folded = Folded(module)
    module.load_state_dict(other.state_dict())
    folded.refresh()
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    assert relative_error(folded(x), other(x)) < 1e-12


def test_a_convolution_whose_weights_are_made_of_others_is_left_as_it_is() -> None:
    conv = weight_norm(nn.Conv2d(3, 4, 3, padding=1))
    module = randomise(nn.Sequential(conv, nn.BatchNorm2d(4)), torch.Generator().manual_seed(2))
    assert find_pairs(module) == []
    folded, x = Folded(module), torch.randn(1, 3, 9, 9, dtype=torch.float64)
    folded.refresh()
    folded(x).square().sum().backward()
    folded.pull_back()
    ours = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).square().sum().backward()
    for mine, plain in zip(ours, module.parameters(), strict=True):
        assert relative_error(mine, plain.grad) < 1e-12


def test_what_was_found_out_about_one_module_is_not_taken_for_another() -> None:
    """They differ in one layer's mode, in what takes a layer's output, in a hook."""

    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self[0](x)
            return self[1](y) + y

    def folds(
        kind: type[nn.Sequential] = nn.Sequential, *, training: bool = False, hooked: bool = False
    ) -> bool:
        module = kind(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).train(training))
        if hooked:
            module[0].register_forward_hook(lambda layer, inputs, output: 2 * output)
        return isinstance(Folded(module).twin[1], nn.Identity)

    for _ in range(2):
        assert folds()
        assert not folds(training=True)
        assert not folds(Twice)
        assert not folds(hooked=True)


def test_a_pass_without_gradients_keeps_no_second_copy_of_the_weights() -> None:
    module = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)).eval()
    folded, weights = Folded(module), 64 * 64 * 9 * 4
    alive = []
    for with_gradients in (False, True):
        with PeakBytes() as counted, torch.set_grad_enabled(with_gradients):
            folded.refresh()
            alive.append(counted.now)
    assert weights <= alive[0] < 1.1 * weights  # the twin's own, which were written
    assert alive[1] > 1.9 * weights  # and what the gradients go back through
