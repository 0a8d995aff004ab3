from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_harness import DEVICE, DTYPES, by, few_examples, normal, runs_kernels
from oracle import SEEDS, ErrorRule, check_operator, poison, rounded
from torch import Tensor

from fastbert.kernels import launch, masked_lm, ops
from fastbert.kernels.launch import Launch

pytestmark = runs_kernels

IGNORED = -100
# label smoothing and z-loss weight
EXTRAS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)]
TOKENS = 30
# a block of columns that no vocabulary here fits into
NARROW = Launch(rows=1, columns=32, num_warps=1)


def some_labels(rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    labels[::3] = IGNORED
    return labels.to(DEVICE)


def inputs(rows: int, vocab_size: int, width: int = 40):
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "hidden": normal(generator, rows, width),
            "weight": normal(generator, vocab_size, width) * width**-0.5,
            "bias": normal(generator, vocab_size),
        }

    return make


def check(rows, vocab_size, dtype, smoothing=0.0, z_loss=0.0):
    constants = {
        "labels": some_labels(rows, vocab_size),
        "label_smoothing": smoothing,
        "z_loss": z_loss,
    }
    with poison():
        check_operator(
            by("triton", ops.linear_cross_entropy, **constants),
            by("reference", ops.linear_cross_entropy, **constants),
            inputs(rows, vocab_size),
            dtype,
            device=DEVICE,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing, z_loss", EXTRAS)
def test_every_dtype_and_extra(smoothing, z_loss, dtype):
    check(7, 67, dtype, smoothing, z_loss)


@pytest.mark.parametrize("vocab_size", [2, 31, 64, 65, 200])
def test_vocabularies_that_no_block_divides(vocab_size):
    with launch.trying("cross_entropy", NARROW):
        check(7, vocab_size, torch.float32, 0.1, 1e-2)


@few_examples
@given(rows=st.sampled_from([0, 1, 2, 7, 9]), vocab_size=st.integers(2, 130))
def test_any_shape(rows, vocab_size):
    check(rows, vocab_size, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_chunks(dtype, monkeypatch):
    monkeypatch.setattr(masked_lm, "CHUNK_BYTES", 72 * 8 * dtype.itemsize)
    monkeypatch.setattr(masked_lm, "ALIGNMENT", 8)
    assert masked_lm.rows_at_once(21, 72, torch.empty(0, dtype=dtype)) == 8
    check(21, 67, dtype, 0.1, 1e-2)


@pytest.mark.parametrize(
    "rows, vocab_size, chunks", [(2458, 30528, 3), (16384, 30528, 4), (100, 30528, 1)]
)
def test_chunks_are_few_and_bounded(rows, vocab_size, chunks):
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    at_once = masked_lm.rows_at_once(rows, vocab_size, like)
    assert math.ceil(rows / at_once) == chunks
    most = max(masked_lm.CHUNK_BYTES, rows * vocab_size * 2 // masked_lm.MOST_CHUNKS)
    # equal chunks, rounded up to whole tiles
    assert (at_once - masked_lm.ALIGNMENT) * vocab_size * 2 < most


def test_the_head_of_a_large_model_stays_within_an_eighth_of_eager():
    """By the arithmetic of rows_at_once, in bytes."""
    rows, width, vocab_size = 16384, 1024, 30528
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    at_once = masked_lm.rows_at_once(rows, vocab_size, like)
    logits, copy, total = at_once * vocab_size * 2, vocab_size * width * 2, vocab_size * width * 4
    assert logits + copy + total <= 3 * rows * vocab_size * 4 / 8


def test_a_small_card_gets_small_chunks(monkeypatch):
    monkeypatch.setattr(launch, "memory_bytes", lambda device: 4 << 30)
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    assert masked_lm.rows_at_once(65536, 119552, like) * 119552 * 2 < 80 << 20


def run(tensors: dict[str, Tensor], labels: Tensor, **options) -> list[Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    with ops.use_backend("triton"):
        loss, correct = ops.linear_cross_entropy(labels=labels, **leaves, **options)
    loss.backward(torch.tensor(0.7, device=DEVICE))
    return [loss.detach(), correct, *(t.grad for t in leaves.values())]


def drawn(rows=21, vocab_size=67, dtype=torch.float32, width=40) -> dict[str, Tensor]:
    made = inputs(rows, vocab_size, width)(torch.Generator().manual_seed(1))
    return {name: t.to(DEVICE, dtype) for name, t in made.items()}


def test_a_repeat_is_the_same_bit_for_bit():
    first, second = (run(drawn(), some_labels(21, 67)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing, z_loss", [EXTRAS[0], EXTRAS[-1]])
def test_poisoned_ignored_rows_reach_nothing(smoothing, z_loss, dtype):
    labels = some_labels(21, 67)
    results = []
    for filling in (0.0, math.nan, math.inf):
        tensors = drawn(dtype=dtype)
        tensors["hidden"][labels == IGNORED] = filling
        with poison():
            results.append(run(tensors, labels, label_smoothing=smoothing, z_loss=z_loss))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    gradient = results[1][2]
    assert (gradient[labels == IGNORED] == 0).all() and (gradient[labels != IGNORED] != 0).any()


def test_right_answers_are_counted_in_the_same_pass():
    tensors = drawn()
    best = (tensors["hidden"] @ tensors["weight"].t() + tensors["bias"]).argmax(dim=1)
    labels = best.clone()
    labels[::2] = (best[::2] + 1) % 67
    labels[1] = IGNORED
    correct = run(tensors, labels)[1]
    assert correct == 9 and correct.dtype == torch.int64


def test_all_rows_ignored():
    loss, correct, *gradients = run(drawn(), torch.full((21,), IGNORED, device=DEVICE))
    assert loss == 0 and correct == 0 and all((g == 0).all() for g in gradients)


def test_no_bias_is_a_bias_of_zeros_and_another_ignore_index():
    tensors, labels = drawn(), some_labels(21, 67)
    zeros = {**tensors, "bias": torch.zeros(67, device=DEVICE)}
    del tensors["bias"]
    labels_of_minus_one = torch.where(labels == IGNORED, -1, labels)
    expected = run(zeros, labels)
    for found in (run(tensors, labels), run(tensors, labels_of_minus_one, ignore_index=-1)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected[:-1], strict=True))


@pytest.mark.parametrize("label", [-1, 67, 10**6])
def test_a_label_that_is_none_makes_loss_and_gradients_nan(label):
    labels = some_labels(21, 67)
    labels[1] = label
    loss, _, dhidden, dweight, dbias = run(drawn(), labels)
    assert loss.isnan()
    # so that a step that looks at its gradients is not taken
    assert dhidden[1].isnan().all() and dweight.isnan().all() and dbias.isnan().all()
    assert dhidden[2].isfinite().all()


def test_strided_labels_and_positions():
    labels = some_labels(21, 67)
    expected = run(drawn(), labels)
    found = run(drawn(), torch.stack([labels, labels * 0 + 3], dim=1)[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    constants = head_constants()
    spread = {
        name: torch.stack([constants[name], constants[name] * 0], dim=1)[:, 0]
        for name in ("masked_positions", "labels")
    }
    expected, found = run_head(drawn_head()), run_head(drawn_head(), **spread)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_logits_far_from_zero_do_not_overflow():
    hidden, weight = torch.full((2, 32), 100.0), torch.full((5, 32), 100.0)
    with ops.use_backend("triton"):
        loss, _ = ops.linear_cross_entropy(
            hidden.to(DEVICE), weight.to(DEVICE), torch.tensor([0, 3], device=DEVICE)
        )
    torch.testing.assert_close(loss.cpu(), torch.tensor(5.0).log() * 2)


def test_a_master_weight_gets_a_gradient_of_its_own_dtype():
    tensors = drawn()
    tensors["hidden"] = tensors["hidden"].bfloat16()
    loss, _, hidden, weight, bias = run(tensors, some_labels(21, 67))
    assert hidden.dtype == torch.bfloat16
    assert loss.dtype == weight.dtype == bias.dtype == torch.float32


# the whole head


def head_constants(activation: str = "gelu", vocab_size: int = 67) -> dict:
    generator = torch.Generator().manual_seed(3)
    positions = 1 + torch.randperm(TOKENS - 1, generator=generator)[:9]
    # unused slots repeat a row that is used elsewhere, and one that is not there at all
    positions[[0, 3, 6]] = torch.tensor([int(positions[1]), 0, 10**6])
    labels = some_labels(9, vocab_size)
    used = {"masked_positions": positions.to(DEVICE), "labels": labels}
    return {**used, "activation": activation, "eps": 1e-12}


def head_inputs(width: int = 36, hidden_size: int = 40, vocab_size: int = 67):
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "hidden_states": normal(generator, TOKENS, hidden_size),
            "dense_weight": normal(generator, width, hidden_size) * hidden_size**-0.5,
            "dense_bias": normal(generator, width),
            "norm_weight": 1 + normal(generator, width) / 8,
            "norm_bias": normal(generator, width),
            "decoder_weight": normal(generator, vocab_size, width) * width**-0.5,
            "decoder_bias": normal(generator, vocab_size),
        }

    return make


def reference_head(masked_positions, **rest):
    # it reads rows of unused slots, and so wants them to be there
    return ops.masked_lm_loss(masked_positions=masked_positions.clamp(max=TOKENS - 1), **rest)


def by_row(head):
    """The losses of five slots, each alone: for one sum the rule would judge by five numbers."""

    def call(labels, **rest):
        losses = []
        for slot in range(1, 6):
            alone = torch.full_like(labels, IGNORED)
            alone[slot] = slot
            losses.append(head(labels=alone, **rest).loss_sum)
        return torch.stack(losses)

    return call


def gradients_of(head):
    """A loss of zero with the gradients of the head's."""

    def call(**tensors):
        loss = head(**tensors).loss_sum
        return loss - loss.detach()

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_gradients_of_the_whole_head(activation, dtype):
    constants = {**head_constants(activation), "label_smoothing": 0.1, "z_loss": 1e-2}
    with poison():
        check_operator(
            by("triton", gradients_of(ops.masked_lm_loss), **constants),
            by("reference", gradients_of(reference_head), **constants),
            head_inputs(),
            dtype,
            device=DEVICE,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_the_whole_head(dtype):
    constants = {**head_constants(), "label_smoothing": 0.1, "z_loss": 1e-2}
    constants["masked_positions"] = 3 * torch.arange(9, device=DEVICE)
    rule = ErrorRule()
    for seed in SEEDS:
        drawn = rounded(head_inputs()(torch.Generator().manual_seed(seed)), dtype)
        with torch.no_grad():
            found = [
                by(backend, by_row(operator), **constants)(
                    **{name: t.to(DEVICE, precision) for name, t in drawn.items()}
                )
                for backend, operator, precision in (
                    ("triton", ops.masked_lm_loss, dtype),
                    ("reference", reference_head, dtype),
                    ("reference", reference_head, torch.float64),
                )
            ]
        rule.compare("losses", *found)
    rule.assert_within()


@pytest.mark.parametrize("absent", ["dense_bias", "decoder_bias"])
def test_heads_without_a_bias(absent):
    def make(generator):
        return {n: t for n, t in head_inputs()(generator).items() if n != absent}

    constants = {**head_constants(), absent: None}
    check_operator(
        by("triton", gradients_of(ops.masked_lm_loss), **constants),
        by("reference", gradients_of(reference_head), **constants),
        make,
        torch.float32,
        device=DEVICE,
    )


def run_head(tensors: dict[str, Tensor], **options) -> list[Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    with ops.use_backend("triton"):
        loss, correct = ops.masked_lm_loss(**leaves, **{**head_constants(), **options})
    loss.backward()
    return [loss.detach(), correct, *(t.grad for t in leaves.values())]


def drawn_head(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = head_inputs()(torch.Generator().manual_seed(1))
    return {name: t.to(DEVICE, dtype) for name, t in made.items()}


def test_rows_that_are_not_asked_for_may_hold_anything():
    constants = head_constants()
    used = constants["masked_positions"][constants["labels"] != IGNORED]
    assert 0 not in used
    others = torch.ones(TOKENS, dtype=torch.bool, device=DEVICE)
    others[used] = False
    results = []
    for filling in (0.0, math.nan):
        tensors = drawn_head()
        tensors["hidden_states"][others] = filling
        with poison():
            results.append(run_head(tensors))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    gradient = results[1][2]
    assert (gradient[others] == 0).all() and (gradient[used] != 0).any(dim=1).all()


def test_the_head_repeats_itself_bit_for_bit():
    first, second = (run_head(drawn_head()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_slots_are_a_valid_no_op():
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    loss, correct, *gradients = run_head(drawn_head(), masked_positions=nothing, labels=nothing)
    assert loss == 0 and correct == 0 and all((g == 0).all() for g in gradients)


def head(**tensors):
    return ops.masked_lm_loss(**tensors, **head_constants()).loss_sum


def cross_entropy(**tensors):
    return ops.linear_cross_entropy(**tensors, labels=some_labels(21, 67)).loss_sum


OPERATORS = [(head, drawn_head), (cross_entropy, drawn)]


def results_of(operator, tensors):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    output = operator(**leaves)
    output.backward()
    return [output.detach(), *(t.grad for t in leaves.values())]


@pytest.mark.parametrize("operator, make", OPERATORS)
def test_compiled_in_one_graph_with_the_same_results(operator, make):
    tensors = make()
    eager = results_of(operator, tensors)
    torch._dynamo.reset()
    constants = head_constants(), some_labels(21, 67)

    def call(**leaves):
        if operator is head:
            return ops.masked_lm_loss(**leaves, **constants[0]).loss_sum
        return ops.linear_cross_entropy(**leaves, labels=constants[1]).loss_sum

    compiled = results_of(torch.compile(call, backend="aot_eager", fullgraph=True), tensors)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("operator, make", OPERATORS)
def test_autocast(operator, make):
    tensors = {name: t.requires_grad_() for name, t in make().items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = operator(**tensors)
    output.backward()
    assert output.dtype == torch.float32
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())
    # the same as with the products' inputs cast by hand
    cast = {"hidden", "hidden_states", "dense_weight"}
    by_hand = {n: t.detach().bfloat16() if n in cast else t.detach() for n, t in tensors.items()}
    assert torch.equal(operator(**by_hand), output)


@pytest.mark.parametrize("operator, make", OPERATORS)
def test_a_second_derivative_is_refused_by_name(operator, make):
    tensors = {name: t.requires_grad_() for name, t in make().items()}
    output = operator(**tensors)
    name = "hidden_states" if operator is head else "hidden"
    with pytest.raises(RuntimeError, match=r"no second derivative .*use_backend\('reference'\)"):
        torch.autograd.grad(output, tensors[name], create_graph=True)


@pytest.mark.parametrize("operator, make", OPERATORS)
def test_without_gradients_the_loss_is_the_same_and_nothing_is_kept(operator, make):
    tensors = make()
    loss = operator(**tensors)
    assert loss.grad_fn is None
    with_gradients = results_of(operator, tensors)[0]
    assert torch.equal(loss, with_gradients)


def test_opcheck():
    from fastbert.kernels import autograd_masked_lm as autograd

    constants = head_constants()
    positions, labels = constants["masked_positions"], constants["labels"]
    tensors, numbers = drawn(9), (IGNORED, 0.1, 1e-2)
    hidden, weight, bias = tensors.values()
    calls = [
        (autograd.gather_rows, (drawn_head()["hidden_states"], positions, labels, IGNORED)),
        (autograd.scatter_rows, (hidden, positions, labels, IGNORED, TOKENS)),
        (autograd.linear_cross_entropy, (hidden, weight, labels, bias, *numbers, True)),
        (autograd.linear_cross_entropy, (hidden, weight, labels, None, *numbers, True)),
        (autograd.linear_cross_entropy, (hidden, weight, labels, bias, *numbers, False)),
    ]
    for call, arguments in calls:
        torch.library.opcheck(call.operator, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": lambda t: t[:3]}, r"hidden must be \[21, 40\], got \[3, 40\]"),
        ({"bias": lambda t: t[:3]}, r"bias must be \[67\], got \[3\]"),
        ({"weight": lambda t: t.double()}, "weight must be float32, float16 or bfloat16"),
        ({"hidden": lambda t: t.t().contiguous().t()}, "hidden must be contiguous in its last"),
    ],
)
def test_bad_input(change, message):
    tensors = drawn()
    for name, spoil in change.items():
        tensors[name] = spoil(tensors[name])
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        cross_entropy(**tensors)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_states": lambda t: t[:, :3]}, r"hidden_states must be \[30, 40\], got \[30, 3\]"),
        ({"dense_bias": lambda t: t[:3]}, r"dense_bias must be \[36\], got \[3\]"),
        ({"decoder_bias": lambda t: t[:3]}, r"decoder_bias must be \[67\], got \[3\]"),
        ({"norm_bias": lambda t: t.double()}, "norm_bias must be float32, float16 or bfloat16"),
    ],
)
def test_bad_input_of_the_head(change, message):
    tensors = drawn_head()
    for name, spoil in change.items():
        tensors[name] = spoil(tensors[name])
    with pytest.raises(ValueError, match=f"^masked_lm_loss: {message}"):
        head(**tensors)
