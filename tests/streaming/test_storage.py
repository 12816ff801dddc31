"""Where tiles live: each tier gives back what was put there, and its room when it is freed or forgotten."""

import os
from pathlib import Path

import pytest
import torch

from holoslide.errors import MemoryPlanError
from holoslide.streaming.storage import Storage, StorageConfig

TILE = (3, 4, 5)
TILE_BYTES = 60 * 2
CPU = torch.device("cpu")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("in_memory", [0, 2, 6])
def test_tiles_come_back_from_memory_and_file(in_memory: int) -> None:
    storage = Storage(StorageConfig(device_bytes=in_memory * TILE_BYTES), CPU)
    array = storage.array(6, TILE, torch.bfloat16, zero=True)
    assert array.in_file == (in_memory < 6)
    tiles = [torch.randn(TILE).bfloat16() for _ in range(6)]
    for number, tile in enumerate(tiles):
        assert not array.get(number).any()
        array.put(number, tile)
    part = torch.ones(2, 2, 5, dtype=torch.bfloat16)
    array.add(4, slice(1, 3), slice(0, 2), part)
    tiles[4][1:3, 0:2] += part
    array.put(5, part)
    assert torch.equal(array.get(5)[:2, :2], part)
    for number, tile in enumerate(tiles[:5]):
        assert torch.equal(array.get(number), tile)
        assert torch.equal(array.get(number, slice(1, 3)), tile[1:3])


@pytest.mark.parametrize("block_tiles", [1, 2, 4])
def test_tiles_beside_a_full_device_lie_in_blocks(block_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` is a device whose host memory is another's; of seven tiles five fit there, two are in the file."""
    monkeypatch.setattr("holoslide.streaming.storage._BLOCK_BYTES", block_tiles * TILE_BYTES + 7)
    storage = Storage(StorageConfig(0, host_bytes=5 * TILE_BYTES), torch.device("meta"))
    array = storage.array(7, TILE, torch.bfloat16, zero=True)
    tiles = [torch.randn(TILE).bfloat16() for _ in range(7)]
    for number, tile in enumerate(tiles):
        assert not array.get(number).any()
        array.put(number, tile)
    for number, tile in enumerate(tiles):
        assert torch.equal(array.get(number), tile)
        array.add(number, slice(1, 3), slice(0, 2), torch.ones(2, 2, 5, dtype=torch.bfloat16))
        tile[1:3, 0:2] += 1
        assert torch.equal(array.get(number, slice(1, 3)), tile[1:3])
    assert storage.array(1, TILE, torch.bfloat16).in_file, "the budget is taken"
    array.free()
    assert not storage.array(5, TILE, torch.bfloat16).in_file


def test_room_comes_back_when_an_array_is_freed_or_forgotten() -> None:
    storage, before = Storage(StorageConfig(device_bytes=2 * TILE_BYTES), CPU), open_files()
    for forget in (False, True):
        array = storage.array(3, TILE, torch.bfloat16)
        assert array.in_file
        assert storage.array(1, TILE, torch.bfloat16).in_file, "the budget is taken"
        if not forget:
            array.free()
            array.free()  # once is enough, twice does no harm
        del array
        assert not storage.array(2, TILE, torch.bfloat16).in_file
        assert open_files() == before


def test_a_file_that_cannot_be_written_names_its_folder_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StorageConfig(device_bytes=0, folder=str(tmp_path / "missing"))
    with pytest.raises(MemoryPlanError, match=r"missing: cannot hold the feature maps .*stream\.folder"):
        Storage(config, CPU).array(1, TILE, torch.float32)
    array = Storage(StorageConfig(device_bytes=0, folder=str(tmp_path)), CPU).array(1, TILE, torch.float32)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MemoryPlanError, match="No space left on device"):
        array.put(0, torch.zeros(TILE))
