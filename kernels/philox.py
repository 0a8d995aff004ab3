"""Where dropout's random numbers come from.

A draw is named by logical coordinates, never by tiles. Two ways to draw:

- training on a CPU seeds a torch generator from seed, step, micro-batch, layer and call site;
- exact masks come from Philox-4x32 (Salmon et al. 2011), on any device and bit for bit the same
  in Triton (dropout.py) and here:

      subkey = philox(counter=(step, layer, site, 0), key=seed)
      words  = philox(counter=(column // 8, position, sequence id, head), key=subkey)

  Each of the eight 16-bit halves of the four words serves one column: word (column % 8) // 2, low
  half first. A column is kept where its 16 bits reach the threshold.

  Attention's scores have a query and a key, and keys start anywhere in a tile, so that neighbours
  cannot share a call. Each token draws a word for each of its two parts, once for all layers of a
  step; each layer and call site draws one; a hash mixes the words of a pair with the layer's, and
  the score is kept where all 32 bits reach the threshold:

      as_query, as_key, _, _ = philox((head, position, sequence id, 0), key=stepkey)
      stepkey  = philox(counter=(step, 0, 0, 1), key=seed), first two words
      of_layer = philox(counter=(step, layer, site, 0), key=seed), third word
      bits = hash32(as_query ^ as_key ^ of_layer)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastbert.kernels.transfer import sent

# the fewest rounds that pass BigCrush; Salmon et al. name 10 as the margin of the cautious
ROUNDS = 7
COLUMNS_PER_CALL = 8
THRESHOLD_BITS, SCORE_BITS = 16, 32
# C. Wellons' two-round 32-bit hash of least bias, found by search (hash-prospector, 2018 to 2022);
# its last shift is left out, since a threshold looks at high bits, and those it does not touch
HASH_A, HASH_B = 0x21F0AAAD, 0x735A2D97

_MASK = (1 << 64) - 1
_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85

# as wide as a dtype
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Words = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Rng:
    """Names one draw of random numbers; hand a different one to every call site.

    Attributes:
        seed: of the whole run.
        step: optimiser step.
        micro_batch: micro-batch within the step.
        layer: encoder layer; 0 is the embedding.
        site: call site within the layer.
        exact: draw by Philox on the reference path too; the Triton path always does.
        sequence_ids: [rows] int32, the global sample index of each row's sequence. Without them
            all rows count as one sequence, whose id is `micro_batch`.
        positions: [rows] int32, each row's place in its sequence; the row number where None.
        state: [3] int64 (seed, step, micro_batch) on the device of the draw. Kernels read it
            there, so that a replayed CUDA graph draws fresh masks once it is written to.
        words: [2, heads, rows] int32 of attention, drawn once for all layers of a step by
            ops.with_attention_words; a call draws its own where None.
    """

    seed: int
    step: int = 0
    micro_batch: int = 0
    layer: int = 0
    site: int = 0
    exact: bool = False
    sequence_ids: Tensor | None = field(default=None, compare=False, repr=False)
    positions: Tensor | None = field(default=None, compare=False, repr=False)
    state: Tensor | None = field(default=None, compare=False, repr=False)
    words: Tensor | None = field(default=None, compare=False, repr=False)

    def at(self, layer: int, site: int = 0) -> Rng:
        """The same step's numbers for another layer and call site."""
        return replace(self, layer=layer, site=site)

    def rows(self, sequence_ids: Tensor | None, positions: Tensor | None) -> Rng:
        """The same draw with these rows' coordinates, or None to number the rows."""
        return replace(self, sequence_ids=sequence_ids, positions=positions, words=None)

    def select(self, rows: Tensor) -> Rng:
        """The same draw for these of its rows, [selected] int64: each keeps its coordinates."""
        positions = rows if self.positions is None else self.positions.index_select(0, rows)
        ids = self.sequence_ids
        return self.rows(
            None if ids is None else ids.index_select(0, rows), positions.to(torch.int32)
        )

    def first(self, count: int | None) -> Rng:
        """The same draw for the first `count` of its rows."""
        ids, positions = self.sequence_ids, self.positions
        return self.rows(
            None if ids is None else ids[:count], None if positions is None else positions[:count]
        )

    def coordinates(self) -> tuple[Tensor | None, Tensor | None]:
        """sequence_ids and positions as kernels read them, one behind the other."""
        ids, positions = self.sequence_ids, self.positions
        return (
            None if ids is None else ids.contiguous(),
            None if positions is None else positions.contiguous(),
        )

    def on(self, device: torch.device | str) -> Rng:
        """The same draw with its state on `device`: once a step spares a copy a call."""
        return replace(self, state=self.device_state(torch.device(device)))

    def device_state(self, device: torch.device) -> Tensor:
        """[3] int64 (seed, step, micro_batch) on `device`."""
        if self.state is not None and _is_on(self.state, device):
            return self.state
        numbers = [_signed(self.seed), self.step, self.micro_batch]
        # in a graph that is being captured a copy would bring the host's memory of then at every
        # replay: there torch refuses one that is waited for
        if torch.compiler.is_compiling() or (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            return torch.tensor(numbers, device=device)
        return sent(torch.tensor(numbers), device, non_blocking=True)

    def generator(self) -> torch.Generator:
        """A CPU generator seeded by all five coordinates."""
        state = 0
        for coordinate in (self.seed, self.step, self.micro_batch, self.layer, self.site):
            state = _mix(state ^ (coordinate & _MASK))
        return torch.Generator().manual_seed(state & ((1 << 63) - 1))


def keep_mask(shape: tuple[int, ...], dropout_p: float, rng: Rng, like: Tensor) -> Tensor:
    """0 with probability `dropout_p`, else what keeps the mean: `shape`, dtype of `like`.

    `like` must be fp32 or wider: 16 bits would round the scale, and the mean with it.
    """
    if drawn_on_host(rng, like):
        return next(keep_masks([shape], dropout_p, rng, like))
    return exact_mask(shape, dropout_p, rng, like.device).to(like.dtype)


def drawn_on_host(rng: Rng, like: Tensor) -> bool:
    """Whether a mask is the CPU generator's: not where it must be the kernels', nor for rows on a
    GPU, which a draw on the host and its copy would hold up."""
    return not (rng.exact or (like.is_cuda and like.dim() == 2))


def kept(shape: tuple[int, ...], dropout_p: float, rng: Rng, like: Tensor) -> Tensor:
    """1 where `keep_mask` has its scale, else 0: `shape`, dtype of `like`."""
    return _as_numbers(_drawn(rng.generator(), shape, keep_threshold(dropout_p)), 1.0, like)


def keep_masks(
    shapes: Iterable[tuple[int, ...]], dropout_p: float, rng: Rng, like: Tensor
) -> Iterator[Tensor]:
    """Masks of one draw by the CPU's generator, one after the other, each made when asked for."""
    threshold, scale = keep_threshold(dropout_p), keep_scale(dropout_p)
    generator = rng.generator()
    for shape in shapes:
        yield _as_numbers(_drawn(generator, shape, threshold), scale, like)


def drop_signs(
    shapes: Iterable[tuple[int, ...]], dropout_p: float, rng: Rng, like: Tensor
) -> Iterator[Tensor]:
    """The same draw as integers: the sign bit of `like`'s dtype where `keep_masks` is zero."""
    threshold = keep_threshold(dropout_p)
    generator = rng.generator()
    for shape in shapes:
        words = _words(generator, math.prod(shape)).lt_(threshold - (1 << 15)).view(shape)
        yield as_signs(words, like)


def as_signs(dropped: Tensor, like: Tensor) -> Tensor:
    """The sign bit of `like`'s dtype for 1; `dropped` may be written over."""
    integer = _INTEGERS[like.dtype.itemsize]
    return dropped.to(like.device, integer).mul_(torch.iinfo(integer).min)


def _drawn(generator: torch.Generator, shape: tuple[int, ...], threshold: int) -> Tensor:
    """0 or 1 in int16, from 16 bits of a word each."""
    # numbers with a sign, in the same order; in place, because torch compares into bools one by one
    return _words(generator, math.prod(shape)).ge_(threshold - (1 << 15)).view(shape)


def _words(generator: torch.Generator, count: int) -> Tensor:
    """As many random int16."""
    words = torch.empty(-(-count // 4), dtype=torch.int64)
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:count]


def _as_numbers(drawn: Tensor, value: float, like: Tensor) -> Tensor:
    """`value` for 1, dtype and device of `like`; `drawn` is written over."""
    if like.dtype.itemsize == drawn.dtype.itemsize:
        # an integer that is multiplied by the number's bits
        bits = int(torch.tensor(value, dtype=like.dtype).view(drawn.dtype))
        return drawn.mul_(bits).view(like.dtype).to(like.device)
    return drawn.to(device=like.device, dtype=like.dtype).mul_(value)


def exact_mask(
    shape: tuple[int, ...], dropout_p: float, rng: Rng, device: torch.device | str = "cpu"
) -> Tensor:
    """The mask that kernels draw, as [rows, columns] fp32: 0 or `keep_scale(dropout_p)`.

    Raises:
        ValueError: not two dimensions, or an rng that names another number of rows.
    """
    if len(shape) != 2:
        raise ValueError(f"dropout: exact masks are for [rows, columns], got {list(shape)}")
    row_count, column_count = shape
    check_rows("dropout", rng, row_count)
    sequence, position = (ids[:, None] for ids in _coordinates(rng, row_count, device))
    groups = -(-column_count // COLUMNS_PER_CALL)
    group = torch.arange(groups, device=device)[None, :].expand(row_count, groups)
    words = philox((group, position, sequence, torch.zeros_like(group)), _key(rng))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(halves, dim=-1).flatten(1)[:, :column_count]
    return (bits >= keep_threshold(dropout_p)).float() * keep_scale(dropout_p)


def score_words(
    rng: Rng, token_count: int, heads: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Each token's word as a query and as a key of attention, [heads, tokens] int64 both."""
    check_rows("attention", rng, token_count)
    sequence, position = _coordinates(rng, token_count, device)
    head = torch.arange(heads, device=device)[:, None]
    key = _words_of(rng, 0, 0, 1)[:2]
    as_query, as_key, _, _ = philox((head, position, sequence, torch.zeros_like(head)), key)
    return as_query ^ _words_of(rng, rng.layer, rng.site, 0)[2], as_key


def score_mask(as_query: Tensor, as_key: Tensor, dropout_p: float) -> Tensor:
    """The mask of attention's probabilities, 0 or `keep_scale`.

    Args:
        as_query: [..., queries] from `score_words`.
        as_key: [..., keys].
        dropout_p: probability of a zero.

    Returns:
        [..., queries, keys] fp32.
    """
    word = as_query[..., :, None] ^ as_key[..., None, :]
    word = ((word ^ (word >> 16)) * HASH_A) & _WORD
    word = ((word ^ (word >> 15)) * HASH_B) & _WORD
    kept = word >= keep_threshold(dropout_p, SCORE_BITS)
    return kept.float() * keep_scale(dropout_p, SCORE_BITS)


def keep_threshold(dropout_p: float, bits: int = THRESHOLD_BITS) -> int:
    """The least number of that many bits that is kept."""
    steps = 1 << bits
    return min(round(dropout_p * steps), steps - 1)


def keep_scale(dropout_p: float, bits: int = THRESHOLD_BITS) -> float:
    """One over the share that `keep_threshold` keeps, so that the mean is unbiased."""
    steps = 1 << bits
    return steps / (steps - keep_threshold(dropout_p, bits))


def uniforms(rng: Rng, row_count: int, device: torch.device | str = "cpu") -> Tensor:
    """One number a row, [rows] float64, in (0, 1) in steps of 2^-52.

    Raises:
        ValueError: an rng that names another number of rows.
    """
    check_rows("uniforms", rng, row_count)
    sequence, position = _coordinates(rng, row_count, device)
    zero = torch.zeros_like(position)
    high, low, _, _ = philox((zero, position, sequence, zero), _key(rng))
    # the middle of each of 2^52 steps
    return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52


def check_rows(operator: str, rng: Rng, row_count: int) -> None:
    """Raise ValueError where the rng's row coordinates are for another number of rows."""
    for name, ids in (("sequence_ids", rng.sequence_ids), ("positions", rng.positions)):
        if ids is not None and tuple(ids.shape) != (row_count,):
            raise ValueError(
                f"{operator}: rng.{name} must be [{row_count}], one a row, got {list(ids.shape)}"
            )


def subkey(rng: Rng) -> tuple[int, int]:
    """The key of one layer's and call site's draw."""
    first, second, _, _ = _words_of(replace(rng, state=None), rng.layer, rng.site, 0)
    return int(first), int(second)


def _key(rng: Rng) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """`subkey`, from the state where there is one."""
    return subkey(rng) if rng.state is None else _words_of(rng, rng.layer, rng.site, 0)[:2]


def _words_of(rng: Rng, layer: int, site: int, last: int) -> Words:
    """Words of the step, from the state where there is one: a replayed CUDA graph draws anew."""
    key: tuple[int, int] | tuple[Tensor, Tensor]
    if rng.state is None:
        step = torch.tensor(rng.step)
        key = (rng.seed & _WORD, ((rng.seed & _MASK) >> 32))
    else:
        seed, step = rng.state[0], rng.state[1]
        key = (seed & _WORD, (seed >> 32) & _WORD)
    layer_word, site_word, last_word = (torch.full_like(step, n) for n in (layer, site, last))
    return philox((step, layer_word, site_word, last_word), key)


def philox(
    counter: Words, key: tuple[int, int] | tuple[Tensor, Tensor], rounds: int = ROUNDS
) -> Words:
    """Philox-4x32 (Salmon et al. 2011).

    Args:
        counter: four int64 tensors that hold 32-bit words; they broadcast.
        key: two 32-bit words, numbers or scalar int64 tensors.
        rounds: 10 and 7 have published test vectors.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = (word & _WORD for word in counter)
    k0, k1 = key
    for _ in range(rounds):
        high_a, low_a = _multiply(_ROUND_A, c0)
        high_b, low_b = _multiply(_ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    return c0, c1, c2, c3


def _coordinates(rng: Rng, row_count: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    sequence, position = rng.sequence_ids, rng.positions
    if position is None:
        position = torch.arange(row_count, device=device)
    if sequence is None:
        sequence = torch.full((row_count,), rng.micro_batch, device=device)
        if rng.state is not None:
            sequence = rng.state[2].to(device).expand(row_count)
    return sequence.to(device, torch.int64), position.to(device, torch.int64)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    # int64 has no room for the 64 bits of the product and no logical shift: go by halves
    low_part = (constant & 0xFFFF) * word
    high_part = (constant >> 16) * word + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    # a device without a number is the current one
    return tensor.device == device or tensor.device == torch.empty(0, device=device).device


def _signed(seed: int) -> int:
    # the same 64 bits as an int64 tensor holds them
    seed &= _MASK
    return seed - (1 << 64) if seed >> 63 else seed


def _mix(value: int) -> int:
    # splitmix64's finaliser (Steele, Lea, Flood 2014): every input bit reaches every output bit
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
