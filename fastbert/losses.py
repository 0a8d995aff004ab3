"""Summed losses of the heads that look at sequences; a mean is the model's to make.

Slots without a target hold -100, or NaN where targets are numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.packing import IGNORE_INDEX, PackedBatch
from fastbert.segments import segment_sum


def class_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, squared error or binary cross-entropy, by the labels' dtype and shape.

    Args:
        logits: [rows, labels].
        labels: [rows] int64, one class a row, -100 where there is none; [rows] floating, a number
            for the only logit; or [rows, labels] floating, a probability for every logit. A row
            of NaN has no target.

    Returns:
        The loss summed over rows (of several numbers a row their mean), and how many rows are
        right in all: the largest logit is the class, or every logit is on its side of 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not labels.is_floating_point():
        loss = F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return loss, (logits.argmax(dim=-1) == labels).sum()
    numbers = labels[:, None] if labels.dim() == 1 else labels
    if numbers.shape != logits.shape:
        raise ValueError(
            f"labels of dtype {labels.dtype} must be {list(logits.shape)}, or [rows] for one "
            f"logit, got {list(labels.shape)}"
        )
    numbers = numbers.to(wide.dtype)
    absent = numbers.isnan()
    numbers = numbers.masked_fill(absent, 0.0)
    if labels.dim() == 1:
        errors = (wide - numbers).square()
        right = torch.zeros_like(absent)
    else:
        errors = F.binary_cross_entropy_with_logits(wide, numbers, reduction="none")
        right = (wide > 0) == (numbers > 0.5)
    loss = errors.masked_fill(absent, 0.0).sum() / numbers.shape[1]
    return loss, (right & ~absent).all(dim=1).sum()


def detection_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of single tokens (Clark et al. 2020, equation 3).

    Args:
        logits: [rows].
        labels: [rows] int64, 1 for a replaced token, 0 for an original one, -100 for no target.

    Returns:
        The sum over targets, and how many logits are on their label's side of 0.
    """
    absent = labels == IGNORE_INDEX
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # a row without a target may hold anything
    wide = wide.masked_fill(absent, 0.0)
    wanted = labels.masked_fill(absent, 0).to(wide.dtype)
    errors = F.binary_cross_entropy_with_logits(wide, wanted, reduction="none")
    right = ((wide > 0) == (wanted > 0.5)) & ~absent
    return errors.masked_fill(absent, 0.0).sum(), right.sum()


def span_loss(logits: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of where an answer starts and ends (Devlin et al. 2018, section 4.2).

    The softmax runs over the sequence's own tokens; padding takes no part, where transformers lets
    it.

    Args:
        logits: [tokens, 2], of starts and of ends.
        batch: with `span_labels`.

    Returns:
        The sum over sequences of the mean of both, and of how many sequences both are right.
    """
    assert batch.span_labels is not None
    labels, starts = batch.span_labels, batch.cu_seqlens[:-1].long()
    slots = len(starts)
    lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]
    owner = batch.sequence_of_token
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # tail rows may hold anything, and go into a slot of their own
    wide = wide.masked_fill((owner == slots)[:, None], 0.0)
    index = owner[:, None].expand(-1, 2)
    top = wide.detach().new_full((slots + 1, 2), float("-inf"))
    top = top.scatter_reduce(0, index, wide.detach(), "amax")
    total = segment_sum((wide - top[owner]).exp(), batch.cu_seqlens, owner)
    log_sum = total.clamp_min(torch.finfo(total.dtype).tiny).log() + top[:slots]
    valid = ((labels >= 0) & (labels < lengths[:, None])).all(dim=1)
    rows = (starts[:, None] + labels).masked_fill(~valid[:, None], 0)
    chosen = wide.gather(0, rows)
    errors = (log_sum - chosen).masked_fill(~valid[:, None], 0.0)
    correct = ((chosen == top[:slots]).all(dim=1) & valid).sum()
    return errors.sum() / 2, correct
