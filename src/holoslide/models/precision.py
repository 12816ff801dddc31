"""The precision of a pass: parameters stay float32, autocast computes in bf16 where the device has it."""

from __future__ import annotations

import torch

from holoslide.models.options import Precision


def mixed_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast; None computes in the parameters' own. "auto" is bf16 where the device has it."""
    if precision == "32":
        return None
    if precision == "bf16" or _computes_bf16(device):
        return torch.bfloat16
    return None


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
