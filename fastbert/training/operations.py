"""What a training step has to compute, and what a device could."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastbert.packing import PackedBatch

# dense bf16 and fp16 operations a second, in 1e12, by what the device calls itself: the vendors'
# data sheets; the first that is part of the name counts
PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "A10G": 70,
    "A40": 150,
    "L40S": 362,
    "L4": 121,
    "V100": 125,
    "T4": 65,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
    "MI250X": 383,
}


def training_operations(config: Any, batches: Sequence[PackedBatch]) -> float:
    """Of forward and backward pass: three times the forward pass's products, padding not counted.

    Args:
        config: of the model, an EncoderConfig.
        batches: on the host; attention counts the sum of squared lengths, the masked-LM head the
            targets.
    """
    hidden = config.hidden_size
    linear = 2 * hidden * (4 * hidden + 2 * config.intermediate_size)
    total = 0.0
    for batch in batches:
        lengths = np.diff(batch.cu_seqlens.numpy()).astype(np.float64)
        layers = linear * lengths.sum() + 4 * hidden * np.square(lengths).sum()
        head = batch.num_masked * 2 * hidden * (hidden + config.vocab_size)
        total += 3 * (config.num_hidden_layers * layers + head)
    return float(total)


def peak_operations(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second in 16 bits that the device's maker states; None where unknown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)
