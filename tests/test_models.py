from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from families import SHIFTED
from oracle import SEEDS, ErrorRule
from tiny import gradients, stirred, tiny_config, tiny_examples
from torch import Tensor, nn

from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.losses import span_loss
from fastbert.models import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Model,
    Targets,
    resolve_model,
)
from fastbert.packing import IGNORE_INDEX, Capacity, Examples, PackedBatch

transformers = pytest.importorskip("transformers")

ARCHITECTURES = [
    BertModel,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForNextSentencePrediction,
    BertForTokenClassification,
    BertForQuestionAnswering,
    BertForMultipleChoice,
]
HEADS = ARCHITECTURES[1:]
LENGTHS = [12, 30, 1, 17]


def theirs_of(architecture: type[nn.Module]) -> type[nn.Module]:
    return getattr(transformers, architecture.__name__)


def fresh(architecture: type, seed: int = 0, **fields) -> nn.Module:
    return stirred(architecture.from_config(tiny_config(**fields), seed), seed).eval()


def load_theirs(architecture: type, folder) -> tuple[nn.Module, dict]:
    model, info = theirs_of(architecture).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), info


def named_as_ours(tensors: dict[str, Tensor], ours: nn.Module) -> dict[str, Tensor]:
    """Their gradients under our names, the three projections joined."""
    result = {}
    for name, _ in ours.named_parameters():
        parts = [tensors.get(n) for n in ours.names.theirs(name)]
        if all(part is not None for part in parts):
            result[name] = torch.cat(parts)
    return result


def without_shifts(ours: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but a bias that shifts all rivals alike: its gradient is zero but for rounding."""
    return {name: tensors[name] for name in tensors if name not in SHIFTED.get(ours.name, ())}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_finds_every_tensor_and_no_other(architecture, tmp_path):
    ours = fresh(architecture)
    ours.save_pretrained(tmp_path)
    theirs, info = load_theirs(architecture, tmp_path)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    state = named_as_ours(theirs.state_dict(), ours)
    assert state.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_we_find_every_tensor_of_transformers(architecture, tmp_path):
    ours = fresh(architecture)
    ours.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = stirred(theirs_of(architecture)(config), seed=3)
    theirs.save_pretrained(tmp_path)
    ours = architecture.from_pretrained(tmp_path)
    assert ours.fresh_parameters == []
    state = named_as_ours(theirs.state_dict(), ours)
    assert state.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(state[name], tensor), name


def padded_batch(seed: int, holes: bool) -> dict[str, Tensor]:
    """Rows of different lengths; id 0 is padding alone, since transformers gives it no gradient."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    if holes:
        # the first position stays: it is what is pooled
        mask[1, 5:9] = 0
        mask[3, 1] = 0
    ids = torch.randint(1, 67, shape, generator=generator) * (mask != 0)
    types = (torch.arange(shape[1]) >= torch.tensor(LENGTHS)[:, None] // 2).long() * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def labels_for(architecture: type, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sequences = len(LENGTHS)
    if architecture is BertForSequenceClassification:
        return {"labels": torch.randint(0, 3, (sequences,), generator=generator)}
    if architecture is BertForNextSentencePrediction:
        return {"labels": torch.randint(0, 2, (sequences,), generator=generator)}
    if architecture is BertForMultipleChoice:
        return {"labels": torch.randint(0, 2, (sequences // 2,), generator=generator)}
    if architecture is BertForQuestionAnswering:
        spans = torch.tensor(LENGTHS)[:, None] * torch.rand(sequences, 2, generator=generator)
        starts, ends = spans.long().sort(dim=1).values.unbind(1)
        return {"start_positions": starts, "end_positions": ends}
    chosen = torch.rand(batch["input_ids"].shape, generator=generator) < 0.3
    classes = 3 if architecture is BertForTokenClassification else 67
    labels = torch.randint(0, classes, chosen.shape, generator=generator)
    labels[~(chosen & (batch["attention_mask"] != 0))] = IGNORE_INDEX
    labels[0, 0] = 2
    found = {"labels": labels}
    if architecture is BertForPreTraining:
        found["next_sentence_label"] = torch.randint(0, 2, (sequences,), generator=generator)
    return found


def real_logits(output, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every floating output by name; of tokens, those that are not padding."""
    real = batch["attention_mask"] != 0
    names = {
        "logits": ("logits", "prediction_logits"),
        "starts": ("start_logits",),
        "ends": ("end_logits",),
        "relationship": ("seq_relationship_logits",),
        "states": ("last_hidden_state",),
        "pooled": ("pooler_output",),
    }
    found = {}
    for name, keys in names.items():
        values = [value for key in keys if isinstance(value := getattr(output, key, None), Tensor)]
        if values:
            by_token = values[0].shape[:2] == real.shape
            found[name] = values[0][real] if by_token else values[0]
    return found


def loss_of(model: nn.Module, batch: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """The loss; of answers among the sequence's own tokens alone, which is not transformers'."""
    output = model(**batch, **labels)
    if "start_positions" not in labels or isinstance(model, Model):
        return output.loss
    padding = batch["attention_mask"] == 0
    pairs = ((output.start_logits, "start_positions"), (output.end_logits, "end_positions"))
    losses = [
        nn.functional.cross_entropy(logits.masked_fill(padding, float("-inf")), labels[name])
        for logits, name in pairs
    ]
    return sum(losses) / 2


def shaped_for(architecture: type, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two questions of two choices, for the model that wants them."""
    if architecture is not BertForMultipleChoice:
        return batch
    return {name: tensor.unflatten(0, (-1, 2)) for name, tensor in batch.items()}


@pytest.mark.parametrize(
    "architecture, activation, holes",
    [(architecture, "gelu", False) for architecture in ARCHITECTURES]
    + [(BertForPreTraining, "gelu_new", True), (BertModel, "gelu", True)],
)
def test_outputs_losses_and_gradients_are_those_of_transformers(
    architecture, activation, holes, tmp_path
):
    rule = ErrorRule()
    for seed in SEEDS:
        ours = fresh(architecture, seed, hidden_act=activation)
        ours.save_pretrained(tmp_path)
        batch = padded_batch(seed, holes)
        labels = labels_for(architecture, batch, seed) if ours.has_head else {}
        results = []
        models = [ours, load_theirs(architecture, tmp_path)[0]]
        models.append(load_theirs(architecture, tmp_path)[0].double())
        batch = shaped_for(architecture, batch)
        for model in models:
            result = real_logits(model(**batch), batch)
            if labels:
                loss = loss_of(model, batch, labels)
                loss.backward()
                result["loss"] = loss
            else:
                flowing = torch.Generator().manual_seed(seed)
                for tensor in list(result.values()):
                    weights = torch.randn(tensor.shape, generator=flowing).bfloat16()
                    tensor.backward(weights.to(tensor), retain_graph=True)
            grads = gradients(model)
            grads = grads if model is ours else named_as_ours(grads, ours)
            result |= without_shifts(ours, grads)
            results.append(result)
        assert results[0].keys() == results[1].keys() == results[2].keys()
        assert results[0].keys() >= without_shifts(ours, dict(ours.named_parameters())).keys()
        for name, oracle in results[2].items():
            rule.compare(name, results[0][name], results[1][name], oracle)
    rule.assert_within()


@pytest.mark.parametrize(
    "architecture, dtype",
    [(architecture, torch.float32) for architecture in ARCHITECTURES]
    + [(BertForPreTraining, torch.bfloat16)],
)
def test_packed_is_one_at_a_time(architecture, dtype):
    """Losses and all gradients; the fp64 oracle and the baseline take one sequence at a time."""
    rule = ErrorRule()
    for seed in SEEDS:
        examples = examples_for(architecture, seed)
        packed = [examples.batch([2, 3, 0, 1], Capacity(70, 6, 20))]
        step = examples.num_choices
        singles = [examples.batch(range(n, n + step)) for n in range(0, len(LENGTHS), step)]
        results = []
        for precision, batches in ((dtype, packed), (dtype, singles), (torch.float64, singles)):
            model = fresh(architecture, seed).to(dtype).to(precision)
            results.append(summed(model, batches))
        assert results[0].keys() == results[1].keys() == results[2].keys()
        for name, oracle in results[2].items():
            rule.compare(name, results[0][name], results[1][name], oracle)
    rule.assert_within()


def examples_for(architecture: type, seed: int = 0) -> Examples:
    """With the targets that the model wants."""
    examples = tiny_examples(LENGTHS, seed=seed, spans=architecture is BertForQuestionAnswering)
    if architecture is BertForMultipleChoice:
        examples.num_choices = 2
        examples.sequence_labels[1::2] = IGNORE_INDEX
    return examples


def summed(model: nn.Module, batches: list[PackedBatch]) -> dict[str, Tensor]:
    """Loss and gradients over all batches, which count as one step."""
    targets = Targets.of(*batches)
    total = 0.0
    for batch in batches:
        if model.has_head:
            total = total + model(batch, targets=targets).loss
        else:
            total = total + model(batch).pooler_output[: batch.num_sequences].sum()
    total.backward()
    return {"loss": total.detach()} | without_shifts(model, gradients(model))


def test_padded_and_packed_logits_agree_bitwise_in_one_layout():
    batch = padded_batch(0, holes=False)
    for architecture in (BertForMaskedLM, BertForPreTraining):
        model = fresh(architecture)
        padded = model(**batch).logits
        examples = [row[:n].tolist() for row, n in zip(batch["input_ids"], LENGTHS, strict=True)]
        types = [row[:n].tolist() for row, n in zip(batch["token_type_ids"], LENGTHS, strict=True)]
        packed = model(Examples.from_lists(examples, types).batch(range(len(LENGTHS)))).logits
        assert torch.equal(padded[batch["attention_mask"] != 0], packed)
        assert not padded[batch["attention_mask"] == 0].any()


def test_what_is_not_asked_for_is_not_computed():
    examples = tiny_examples(LENGTHS)
    batch = examples.batch([0, 1])
    model = fresh(BertForPreTraining)
    output = model(batch)
    assert output.logits is None and output.loss is not None
    assert output.masked_lm_correct is not None and output.sequence_correct is not None
    batch.labels = batch.sequence_labels = None
    output = model(batch)
    assert output.loss is None and output.logits.shape == (42, 67)
    assert output.prediction_logits is output.logits
    assert output.seq_relationship_logits.shape == (2, 2)


def test_the_joint_loss_is_the_sum_of_both():
    batch = tiny_examples(LENGTHS).batch([0, 1, 2, 3])
    model = fresh(BertForPreTraining)
    both = model(batch)
    masked = model(dataclasses.replace(batch, sequence_labels=None, num_labelled=0))
    pairs = model(dataclasses.replace(batch, labels=None, masked_positions=None, num_masked=0))
    assert both.loss == masked.loss + pairs.loss
    assert masked.loss == masked.masked_lm_loss_sum / batch.num_masked
    assert pairs.loss == pairs.sequence_loss_sum / 4
    assert not both.masked_lm_loss_sum.requires_grad and not both.sequence_loss_sum.requires_grad


def test_sequence_correct_counts_real_labels_alone():
    examples = tiny_examples([9, 9, 9], masked=False, classes=3)
    model = fresh(BertForSequenceClassification)
    best = model(examples.batch([0, 1, 2])).logits.argmax(dim=1)
    examples.sequence_labels = best.numpy().copy()
    examples.sequence_labels[1] = IGNORE_INDEX
    batch = examples.batch([0, 1, 2], Capacity(40, 6, 0))
    output = model(batch)
    assert output.sequence_correct == 2 and batch.num_labelled == 2
    assert output.loss == output.sequence_loss_sum / 2


@pytest.mark.parametrize("architecture", HEADS)
def test_targets_scale_the_loss(architecture):
    batch = examples_for(architecture).batch([0, 1])
    model = fresh(architecture)
    own = model(batch).loss
    twice = model(batch, targets=Targets(2 * batch.num_masked, 2 * batch.num_labelled)).loss
    # halving is exact
    assert own == 2 * twice


def test_targets_of_a_step():
    examples = tiny_examples(LENGTHS)
    batches = [examples.batch([0, 2]), examples.batch([1])]
    assert Targets.of(*batches) == Targets(masked=5, labelled=3)
    assert Targets.of() == Targets()


def test_a_batch_without_any_target_has_loss_zero():
    batch = tiny_examples(LENGTHS, masked=False).batch([0])
    batch.masked_positions = torch.zeros(4, dtype=torch.int64)
    batch.labels = torch.full((4,), IGNORE_INDEX)
    model = fresh(BertForMaskedLM)
    loss = model(batch).loss
    loss.backward()
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_named_by_rng(architecture):
    batch = examples_for(architecture).batch([0, 1])
    model = fresh(architecture)

    def first(rng):
        return model(batch, rng=rng)[0]

    assert torch.equal(first(None), first(None))
    assert torch.equal(first(Rng(0)), first(Rng(0)))
    assert not torch.equal(first(Rng(0)), first(None))
    assert not torch.equal(first(Rng(0)), first(Rng(0, step=1)))


def test_outputs_read_by_position_key_and_attribute():
    output = fresh(BertModel)(tiny_examples(LENGTHS).batch([0]))
    assert output[0] is output.last_hidden_state is output["last_hidden_state"]
    assert output[1] is output.pooler_output
    output = fresh(BertForSequenceClassification)(
        tiny_examples(LENGTHS).batch([0]), targets=Targets(1, 1)
    )
    assert output[0] is output.loss and output[1] is output.logits


@pytest.mark.parametrize("mask", [torch.zeros(2, 3, dtype=torch.long), None])
def test_a_padded_call_without_a_token_is_refused(mask):
    ids = torch.ones(2, 3 if mask is not None else 0, dtype=torch.long)
    with pytest.raises(ValueError, match=r"the batch \[2, [03]\] has no token: attention_mask"):
        fresh(BertModel)(ids, mask)


def test_a_packed_batch_takes_no_mask():
    batch = tiny_examples([4]).batch([0])
    with pytest.raises(ValueError, match="a PackedBatch carries its own segments"):
        fresh(BertModel)(batch, torch.ones(1, 4))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fresh_weights_follow_the_seed(architecture):
    states = [architecture.from_config(tiny_config(), seed).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(
        states[0]["encoder.layers.0.qkv.weight"], states[2]["encoder.layers.0.qkv.weight"]
    )


def test_the_decoder_is_the_word_embedding():
    model = fresh(BertForMaskedLM)
    assert model.word_weight is model.encoder.embeddings.word_embeddings.weight
    names = [name for name, parameter in model.named_parameters() if parameter.shape[0] == 67]
    assert names == ["encoder.embeddings.word_embeddings.weight", "masked_lm.bias"]


def test_a_model_of_a_run_or_a_folder(tmp_path):
    with pytest.raises(InputError, match="no model here"):
        resolve_model(tmp_path)
    (tmp_path / "model").mkdir()
    tiny_config().save_pretrained(tmp_path / "model")
    assert resolve_model(tmp_path) == tmp_path / "model"
    assert resolve_model(tmp_path / "model") == tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vocab_size", "word_embeddings"),
        ("max_position_embeddings", "position_embeddings"),
        ("type_vocab_size", "token_type_embeddings"),
        ("intermediate_size", r"intermediate\.dense"),
        ("hidden_size", "word_embeddings"),
        ("num_hidden_layers", "2 layers in the file"),
    ],
)
def test_sizes_beyond_all_memory_are_refused_before_any_is_taken(name, theirs, tmp_path):
    fresh(BertForMaskedLM).save_pretrained(tmp_path)
    size = 3 * 10**12
    config = dataclasses.replace(tiny_config(), **{name: size})
    with pytest.raises(InputError, match=rf"{theirs}.*config\.json says .*{size}") as failure:
        BertForMaskedLM.from_pretrained(tmp_path, config=config)
    assert "\n" not in str(failure.value)


def test_models_run_in_bf16_autocast_with_master_weights():
    for architecture in HEADS:
        batch = examples_for(architecture).batch(np.arange(4))
        model = fresh(architecture)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch).loss
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_padded_call_in_training_mode_drops_out_as_torch_is_seeded():
    batch = padded_batch(0, holes=False)
    model = fresh(BertForSequenceClassification)
    plain = model(**batch).logits
    model.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(**batch).logits)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], plain)
    # who names the draw gets it, and a packed batch is never surprised
    assert torch.equal(model(**batch, rng=Rng(3)).logits, model(**batch, rng=Rng(3)).logits)
    packed = tiny_examples(LENGTHS).batch([0])
    assert torch.equal(model(packed).logits, model.eval()(packed).logits)


@pytest.mark.parametrize("outputs, kind", [(1, "number"), (3, "several")])
def test_numbers_as_targets(outputs, kind, tmp_path):
    """Squared error of one output, binary cross-entropy of several, as transformers has them."""
    rule = ErrorRule()
    for seed in SEEDS:
        ours = fresh(BertForSequenceClassification, seed, labels=["x", "y", "z"][:outputs])
        ours.save_pretrained(tmp_path)
        theirs = [load_theirs(BertForSequenceClassification, tmp_path)[0] for _ in range(2)]
        batch = padded_batch(seed, holes=False)
        labels = torch.rand(4, outputs)
        results = []
        for model in (ours, theirs[0], theirs[1].double()):
            wanted = labels[:, 0] if kind == "number" else (labels > 0.5).float()
            wanted = wanted.double() if model is theirs[1] else wanted
            loss = model(**batch, labels=wanted).loss
            loss.backward()
            grads = gradients(model)
            grads = grads if model is ours else named_as_ours(grads, ours)
            results.append({"loss": loss.detach()} | grads)
        for name, oracle in results[2].items():
            rule.compare(name, results[0][name], results[1][name], oracle)
    rule.assert_within()


def _alone(model: nn.Module, examples: Examples) -> Tensor:
    return sum(model(examples.batch([n])).sequence_loss_sum for n in (0, 2))


def test_a_row_of_nan_has_no_target():
    examples = tiny_examples([5, 6, 7], masked=False)
    examples.sequence_labels = np.array([0.5, np.nan, 0.1], dtype=np.float32)
    batch = examples.batch([0, 1, 2], Capacity(20, 4, 0))
    assert batch.num_labelled == 2
    rule = ErrorRule()
    for seed in SEEDS:
        model = fresh(BertForSequenceClassification, seed, labels=["score"])
        together, alone = model(batch).sequence_loss_sum, _alone(model, examples)
        rule.compare("loss", together, alone, _alone(model.double(), examples))
    rule.assert_within()
    with pytest.raises(ValueError, match=r"must be \[3, 3\], or \[rows\]"):
        fresh(BertForSequenceClassification)(examples.batch([0, 1, 2]))


def test_answers_outside_the_sequence_are_no_targets():
    model = fresh(BertForQuestionAnswering)
    batch = padded_batch(0, holes=True)
    # of row 1 the answer is in a hole, of row 2 past the end, of row 3 nobody gave one
    starts, ends = torch.tensor([2, 6, 0, IGNORE_INDEX]), torch.tensor([4, 7, 1, 3])
    alone = {name: tensor[:1] for name, tensor in batch.items()}
    output = model(**batch, start_positions=starts, end_positions=ends)
    rule = ErrorRule()
    for seed in SEEDS:
        one = fresh(BertForQuestionAnswering, seed)
        together = one(**batch, start_positions=starts, end_positions=ends).loss
        single = one(**alone, start_positions=starts[:1], end_positions=ends[:1]).loss
        exact = one.double()(**alone, start_positions=starts[:1], end_positions=ends[:1]).loss
        rule.compare("loss", together, single, exact)
    rule.assert_within()
    assert output.start_logits.shape == batch["input_ids"].shape
    lowest = torch.finfo(torch.float32).min
    assert (output.start_logits[batch["attention_mask"] == 0] == lowest).all()
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_a_poisoned_tail_leaves_an_answer_s_loss_alone():
    examples = tiny_examples([5, 7], masked=False, spans=True)
    model = fresh(BertForQuestionAnswering)
    losses = []
    for capacity in (None, Capacity(20, 4, 0)):
        batch = examples.batch([0, 1], capacity)
        logits = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
        logits = torch.cat([logits, torch.full((batch.capacity - 12, 2), float("nan"))])
        logits.requires_grad_()
        loss, correct = span_loss(logits, batch)
        loss.backward()
        losses.append((loss.detach(), correct, logits.grad[:12]))
        assert (logits.grad[12:] == 0).all()
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))
    assert model(examples.batch([0, 1])).sequence_correct <= 2


def test_choices_must_fill_the_batch():
    examples = examples_for(BertForMultipleChoice)
    model = fresh(BertForMultipleChoice)
    assert model(examples.batch([2, 3])).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="3 sequences are no multiple of 2 choices"):
        model(examples.batch([0, 1, 2]))
    with pytest.raises(ValueError, match=r"must be \[batch, choices, length\], got \[4, 30\]"):
        model(**padded_batch(0, holes=False))


def test_outputs_slice_and_name_what_is_there():
    output = fresh(BertForSequenceClassification)(tiny_examples(LENGTHS).batch([0]))
    assert output.keys()[:2] == ["loss", "logits"] and len(output) == len(output.keys())
    assert output[:2] == (output.loss, output.logits) == output.to_tuple()[:2]
    assert [value is not None for value in output] == [True] * len(output)


def test_an_answer_past_the_end_of_its_packed_sequence_is_no_target():
    model = fresh(BertForQuestionAnswering)
    batch = tiny_examples([5, 6], masked=False, spans=True).batch([0, 1])
    losses = []
    for answer in ([IGNORE_INDEX, IGNORE_INDEX], [1, 5]):
        batch.span_labels[0] = torch.tensor(answer)
        losses.append(model(batch).sequence_loss_sum)
    assert torch.equal(*losses)
