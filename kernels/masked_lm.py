"""The ends of the masked-LM head: rows gathered and scattered, logits turned into their gradient.

    lse = log sum_v exp(x_v);  p_v = exp(x_v - lse)
    loss = lse - (1 - e) x_y - e mean_v x_v + z lse^2
    dx_v = p_v (1 + 2 z lse) - (1 - e) [v = y] - e / V

with e the label smoothing, z the weight of the z-loss, y the label, V the vocabulary. Products are
the vendor's; a chunk of logits is overwritten in place by its own gradient, from which the products
of dhidden and dweight follow at once, so that logits never exist in full and are never made twice.
Saved for backward: those gradients, to be scaled by the loss's own. Making them in the forward
pass holds dweight a moment longer, at the one point where backward begins anyway; making logits
anew instead would cost a fourth product of rows x vocabulary x width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch

# rows of the decoder's copy and of the logits are padded to a multiple of this: 128 bytes of bf16,
# which vendor products need to run at full speed
ALIGNMENT = 64
# a chunk's logits: at least this, or else a quarter of them all, if that is no more than one part
# in CARD_SHARE of the card's memory. What is free is not asked: the order of sums would follow it
CHUNK_BYTES = 64 << 20
MOST_CHUNKS = 4
CARD_SHARE = 64
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# finite: a column that has seen nothing yet makes no NaN
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


# one program copies ROWS rows; slots without a label get zeros and read nothing
@triton.jit(do_not_specialize=["slots", "ignore_index"])
def _gather_rows_kernel(
    source_ptr, positions_ptr, labels_ptr, out_ptr,
    source_row_stride,
    slots, ignore_index,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (slot < slots)[:, None] & (column < WIDTH)[None, :]
    label = tl.load(labels_ptr + slot, mask=slot < slots, other=0)
    used = (slot < slots) & (label != ignore_index)
    position = tl.load(positions_ptr + slot, mask=used, other=0).to(tl.int64)
    values = tl.load(
        source_ptr + position[:, None] * source_row_stride + column[None, :],
        mask=mask & used[:, None], other=0.0,
    )  # fmt: skip
    tl.store(out_ptr + slot.to(tl.int64)[:, None] * WIDTH + column[None, :], values, mask=mask)


# the way back; positions of used slots differ, so no two programs meet
@triton.jit(do_not_specialize=["slots", "ignore_index"])
def _scatter_rows_kernel(
    rows_ptr, positions_ptr, labels_ptr, out_ptr,
    slots, ignore_index,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    label = tl.load(labels_ptr + slot, mask=slot < slots, other=0)
    used = (slot < slots) & (label != ignore_index)
    mask = used[:, None] & (column < WIDTH)[None, :]
    position = tl.load(positions_ptr + slot, mask=used, other=0).to(tl.int64)
    values = tl.load(
        rows_ptr + slot.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=mask, other=0.0
    )
    tl.store(out_ptr + position[:, None] * WIDTH + column[None, :], values, mask=mask)


# one program owns a row: a first walk along it for maximum and sum, a second, out of the cache,
# that writes the gradient; columns past the vocabulary become zeros
@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr, correct_ptr,
    row_stride,
    ignore_index,
    VOCAB: tl.constexpr, PADDED: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    label = tl.load(labels_ptr + row)
    column = tl.arange(0, BLOCK)
    if label == ignore_index:
        if WANTS_GRADIENT:
            for first in range(0, PADDED, BLOCK):
                place = logits_ptr + first + column
                tl.store(place, tl.zeros([BLOCK], tl.float32), mask=first + column < PADDED)
        tl.store(loss_ptr + row, 0.0)
        tl.store(correct_ptr + row, 0)
    else:
        # each column of the block keeps a maximum and a sum of its own: threads meet once a row
        largest = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        plain_sum = tl.zeros([BLOCK], tl.float32)
        # places move with the loop: made of column numbers, they would widen these to 64 bits
        place = logits_ptr + column
        for first in range(0, VOCAB, BLOCK):
            mask = first + column < VOCAB
            # whole aligned lines are read, padding too
            values = tl.load(place, mask=first + column < PADDED, other=0.0)
            place += BLOCK
            values = tl.where(mask, values.to(tl.float32), float("-inf"))
            above = values - largest
            # of the two, the larger one is shifted to zero: one exponential serves
            ratio = tl.exp2(tl.abs(above) * -LOG2_E)
            total = tl.where(above > 0.0, total * ratio + 1.0, total + ratio)
            largest = tl.maximum(largest, values)
            if SMOOTHING > 0.0:
                plain_sum += tl.where(mask, values, 0.0)
        row_largest = tl.max(largest, axis=0)
        row_total = tl.sum(total * tl.exp2((largest - row_largest) * LOG2_E), axis=0)
        lse = row_largest + tl.log(row_total)
        # a label that is none makes loss and gradient NaN, where a host would raise
        known = (label >= 0) & (label < VOCAB)
        at_label = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        # the shifted terms first: digits are lost where large numbers meet
        loss = tl.log(row_total) - (1.0 - SMOOTHING) * (at_label - row_largest)
        if SMOOTHING > 0.0:
            loss -= SMOOTHING * (tl.sum(plain_sum, axis=0) / VOCAB - row_largest)
        share = 1.0 / row_total
        if Z_LOSS > 0.0:
            loss += Z_LOSS * lse * lse
            share *= 1.0 + 2.0 * Z_LOSS * lse
        share = tl.where(known, share, float("nan"))
        tl.store(loss_ptr + row, loss)
        tl.store(correct_ptr + row, (at_label >= row_largest).to(tl.int32))
        if WANTS_GRADIENT:
            narrow_label = label.to(tl.int32)
            place = logits_ptr + column
            # the label's logit has been read by all before one of them overwrites it
            tl.debug_barrier()
            for first in range(0, PADDED, BLOCK):
                padded = first + column < PADDED
                values = tl.load(place, mask=padded, other=0.0)
                gradient = tl.exp2((values.to(tl.float32) - row_largest) * LOG2_E) * share
                gradient -= tl.where(first + column == narrow_label, 1.0 - SMOOTHING, 0.0)
                if SMOOTHING > 0.0:
                    gradient -= SMOOTHING / VOCAB
                gradient = tl.where(first + column < VOCAB, gradient, 0.0)
                tl.store(place, gradient, mask=padded)
                place += BLOCK


# one program owns COLUMNS columns and walks down the chunk's rows
@triton.jit(do_not_specialize=["rows"])
def _bias_gradient_kernel(
    gradient_ptr, out_ptr,
    row_stride,
    rows,
    VOCAB: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        # padding is read too: an odd vocabulary would cut the loads into pairs of elements
        mask = (row < rows)[:, None] & (column < PADDED)[None, :]
        place = gradient_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(out_ptr + column, mask=column < VOCAB, other=0.0)
    tl.store(out_ptr + column, before + tl.sum(total, axis=0), mask=column < VOCAB)


def gather_rows(source: Tensor, positions: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """[slots, width]: rows of `source` at `positions`, zeros where the label does not count."""
    slots, width = len(labels), source.shape[1]
    out = torch.empty((slots, width), dtype=source.dtype, device=source.device)
    if slots == 0:
        return out
    chosen = launch.configure("gather_rows", source, width)
    launch.run(
        _gather_rows_kernel,
        (triton.cdiv(slots, chosen.rows), triton.cdiv(width, chosen.columns)),
        source, positions, labels, out,
        source.stride(0),
        slots, ignore_index,
        launch=chosen, WIDTH=width, ROWS=chosen.rows, COLUMNS=chosen.columns,
    )  # fmt: skip
    return out


def scatter_rows(
    rows: Tensor, positions: Tensor, labels: Tensor, ignore_index: int, tokens: int
) -> Tensor:
    """[tokens, width]: the rows at their positions, zeros elsewhere."""
    slots, width = rows.shape
    out = torch.zeros((tokens, width), dtype=rows.dtype, device=rows.device)
    if slots == 0:
        return out
    chosen = launch.configure("gather_rows", rows, width)
    launch.run(
        _scatter_rows_kernel,
        (triton.cdiv(slots, chosen.rows), triton.cdiv(width, chosen.columns)),
        rows, positions, labels, out,
        slots, ignore_index,
        launch=chosen, WIDTH=width, ROWS=chosen.rows, COLUMNS=chosen.columns,
    )  # fmt: skip
    return out


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    wants_gradient: bool,
) -> None:
    """Fill losses [rows] fp32 and correct [rows] int32; logits become their gradient if wanted."""
    rows, padded = logits.shape
    chosen = launch.configure("cross_entropy", logits, vocab_size)
    launch.run(
        _cross_entropy_kernel,
        (rows,),
        logits, labels, losses, correct,
        logits.stride(0),
        ignore_index,
        launch=chosen,
        VOCAB=vocab_size, PADDED=padded, SMOOTHING=label_smoothing, Z_LOSS=z_loss,
        WANTS_GRADIENT=wants_gradient,
        BLOCK=chosen.columns,
    )  # fmt: skip


def add_bias_gradient(gradient: Tensor, out: Tensor) -> None:
    """Add the sums of gradient's first len(out) columns to `out`, fp32."""
    vocab_size = out.shape[0]
    chosen = launch.configure("bias_gradient", gradient, vocab_size)
    launch.run(
        _bias_gradient_kernel,
        (triton.cdiv(vocab_size, chosen.columns),),
        gradient, out,
        gradient.stride(0),
        gradient.shape[0],
        launch=chosen, VOCAB=vocab_size, PADDED=gradient.shape[1],
        ROWS=chosen.rows, COLUMNS=chosen.columns,
    )  # fmt: skip


def rows_at_once(rows: int, padded: int, logits: Tensor) -> int:
    """Rows of a chunk: chunks are of equal size, and the same wherever memory stands.

    One to four chunks while a quarter of the logits is within the card's share; more on small cards
    (16 GiB: from 1 GiB of logits on). Beside eager PyTorch, with L the bytes of all 16-bit logits:
    its backward holds log-softmax, the gradient at it and the gradient at the logits in fp32, 6 L.
    A quarter and the decoder's padded copy (L * width / rows) and fp32 sum (twice that) are 0.44 L
    at 16,384 rows of width 1,024, where an eighth of eager's is 0.75 L; at 2,458 rows of width 768
    the copy and the sum alone are 0.94 L, so that there no number of chunks reaches an eighth.
    """
    row_bytes = padded * logits.element_size()
    card = launch.memory_bytes(logits.device)
    most = max(CHUNK_BYTES, min(rows * row_bytes // MOST_CHUNKS, card // CARD_SHARE))
    chunks = triton.cdiv(rows * row_bytes, most)
    return min(rows, triton.cdiv(triton.cdiv(rows, chunks), ALIGNMENT) * ALIGNMENT)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Summed loss and right answers, and the gradients of that sum, empty where not wanted.

    Args:
        hidden: [rows, width]; rows that do not count are zeros.
        weight: [vocab_size, width]; bias: [vocab_size].
        labels: [rows] int64.
        ignore_index: label of rows that do not count.
        label_smoothing, z_loss: see above.
        wants_gradient: whether to make the gradients.

    Returns:
        loss_sum fp32, correct int64, dhidden in the dtype of `hidden`, dweight in that of
        `weight`, dbias fp32 (empty without a bias).
    """
    rows, width = hidden.shape
    vocab_size = weight.shape[0]
    padded = triton.cdiv(vocab_size, ALIGNMENT) * ALIGNMENT
    decoder = _padded(weight, padded, hidden.dtype)
    offset = None if bias is None else _padded(bias, padded, hidden.dtype)
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(rows, dtype=torch.int32, device=hidden.device)
    gradients = wants_gradient and rows > 0
    dhidden = torch.empty_like(hidden) if gradients else hidden.new_zeros(0, width)
    dbias = torch.zeros(
        0 if bias is None or not wants_gradient else vocab_size,
        dtype=torch.float32,
        device=hidden.device,
    )
    dweight = None
    at_once = rows_at_once(rows, padded, hidden) if rows else 1
    logits = torch.empty((at_once, padded), dtype=hidden.dtype, device=hidden.device)
    for first in range(0, rows, at_once):
        chunk = slice(first, min(first + at_once, rows))
        part = logits[: chunk.stop - chunk.start]
        if offset is None:
            torch.mm(hidden[chunk], decoder.t(), out=part)
        else:
            torch.addmm(offset, hidden[chunk], decoder.t(), out=part)
        cross_entropy(
            part, labels[chunk], losses[chunk], correct[chunk], vocab_size, ignore_index,
            label_smoothing, z_loss, wants_gradient,
        )  # fmt: skip
        if not wants_gradient:
            continue
        if bias is not None:
            add_bias_gradient(part, dbias)
        torch.mm(part, decoder, out=dhidden[chunk])
        dweight = _accumulated(dweight, part, hidden[chunk], single=at_once == rows, like=weight)
    if dweight is None:
        dweight = weight.new_zeros(weight.shape if wants_gradient else (0, width))
    return (
        losses.sum(),
        correct.sum(),
        dhidden,
        dweight[:vocab_size].to(weight.dtype),
        dbias,
    )


def _padded(parameter: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """A copy of `parameter` in `dtype` with zeros below; itself where nothing has to change."""
    if parameter.dtype == dtype and parameter.shape[0] == rows and parameter.is_contiguous():
        return parameter
    copy = torch.empty((rows, *parameter.shape[1:]), dtype=dtype, device=parameter.device)
    copy[: parameter.shape[0]].copy_(parameter)
    copy[parameter.shape[0] :].zero_()
    return copy


def _accumulated(
    total: Tensor | None, gradient: Tensor, hidden: Tensor, *, single: bool, like: Tensor
) -> Tensor:
    """total + gradient' hidden in fp32; one chunk that is all goes straight to `like`'s dtype."""
    narrow = gradient.dtype
    if narrow == torch.float32:
        return gradient.t() @ hidden if total is None else total.addmm_(gradient.t(), hidden)
    if single and like.dtype == narrow:
        return gradient.t() @ hidden
    makes, adds = launch.wide_products(gradient.device, narrow)
    if adds and total is not None:
        return torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)
    if makes:
        product = torch.mm(gradient.t(), hidden, out_dtype=torch.float32)
    else:
        product = (gradient.t() @ hidden).float()
    return product if total is None else total.add_(product)
