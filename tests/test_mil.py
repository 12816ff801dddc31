"""The opponents of the benchmarks: they do not care for the order of patches, and learn what there is to learn."""

import pytest
import torch
from benchmarks.mil import Bag, train
from benchmarks.mil_models import MODELS, ClamSb

FEATURES = 16


def bags(count: int, *, seed: int) -> list[Bag]:
    """Of every other slide one patch in twelve has another mean: what a sum can just see."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in range(count):
        bag = torch.randn(24, FEATURES, generator=generator)
        bag[:2, :4] += 4.0 * (n % 2)
        found.append(Bag(bag, n % 2, f"p{n}"))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_an_aggregator_learns_and_is_blind_to_order(name: str) -> None:
    given = {"train": bags(40, seed=0), "valid": bags(20, seed=1), "test": bags(20, seed=2)}
    assert train(name, given, rate=1e-3, epochs=12, seed=0).valid[0] > 0.9
    if name in ("transmil", "dtfd"):  # these see places in the bag, or draw parts of it
        return
    model = MODELS[name](FEATURES, 2).eval()
    bag = given["test"][1].features_ND
    torch.testing.assert_close(model(bag)[0], model(bag.flip(0))[0])


def test_clam_trains_the_patches_it_attends_to() -> None:
    model, bag = ClamSb(FEATURES, 2), bags(2, seed=0)[1].features_ND
    _, extra = model(bag, 1)
    extra.backward()
    assert model.instances[1].weight.grad.abs().sum() > 0
    assert model.instances[0].weight.grad is None
