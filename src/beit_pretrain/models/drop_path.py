"""The random numbers of stochastic depth (Huang et al. 2016), keyed by the position in the run; blocks.py applies them.

Whether a residual branch is dropped for the image at position k is a function of (seed, k, branch): the same on any
number of processes, in any micro-batch, after any restart. Drawn on the training device without synchronisation.
Shapes: B batch, R residual branches (two a block).
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele et al. 2014): consecutive counters become independent 64-bit numbers.
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniforms(seed: int, position_B: Tensor, branches: int) -> Tensor:
    """Numbers (B, R) in [0, 1), float32, for the positions (B,) int64 of a run."""
    counter_R = torch.arange(1, branches + 1, device=position_B.device) * _signed(STEP)
    key_B = _mix(position_B + _signed((seed + 1) * STEP))
    return ((_mix(key_B.unsqueeze(1) + counter_R) >> 40) & 0xFFFFFF).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    # torch's >> keeps the sign of its 64-bit integers; SplitMix64 shifts in zeros.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    number %= 1 << 64
    return number - (1 << 64) if number >> 63 else number
