"""transformers' own small models of every family, and what the tests of families ask of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import ErrorRule
from tiny import gradients, stirred
from torch import Tensor, nn

from fastbert import models
from fastbert.families import FAMILIES, head_of
from fastbert.models import Model
from fastbert.packing import IGNORE_INDEX, Examples, PackedBatch

transformers = pytest.importorskip("transformers")

LENGTHS = [9, 14, 1, 6]
VOCABULARY, CLASSES, PAD = 61, 3, 3
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "pad_token_id": PAD,
}
# what a family's own class wants to be told otherwise
OWN: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 40,
        "max_position_embeddings": 20,
        "pad_token_id": PAD,
    },
    "albert": {"embedding_size": 10, "num_hidden_layers": 3, "num_hidden_groups": 2},
    "electra": {"embedding_size": 10},
    # a full layer and sliding ones that see less than a sequence; heads of an even width
    "modernbert": {
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "local_attention": 6,
        "classifier_bias": True,
        "cls_token_id": 0,
        "sep_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
# every model of every family
CASES = [(family, name) for family, data in FAMILIES.items() for name in data.heads]
# what a model returns; the rest of its results are its loss and its gradients
OUTPUTS = ("states", "pooled", "logits", "relationship", "starts", "ends")
# biases that shift all rivals alike: their gradient is zero but for rounding
SHIFTED = {
    "BertForMultipleChoice": ("classifier.dense.bias",),
    "BertForQuestionAnswering": ("span.dense.bias", "encoder.layers.1.output_norm.bias"),
}


def their_config(family: str, **fields: Any) -> Any:
    """The family's own configuration class, small and odd."""
    shape = OWN[family] if family == "distilbert" else {**_SHAPE, **OWN[family]}
    return transformers.AutoConfig.for_model(family, **{**shape, **fields})


def their_model(family: str, name: str, seed: int = 0, **fields: Any) -> nn.Module:
    """Random weights of the family's own class, in evaluation mode."""
    architecture = head_of(family, name).architecture
    if name in ("BertForSequenceClassification", "BertForTokenClassification"):
        fields = {"num_labels": CLASSES, **fields}
    config = their_config(family, **fields)
    # eager softmax of ModernBERT is fp32 in any dtype, and NaN for fp64's mask
    config._attn_implementation = "sdpa" if family == "modernbert" else "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config)
    if architecture == "XLMRobertaForMultipleChoice" and model.roberta.pooler is None:
        pytest.skip("this transformers' XLMRobertaForMultipleChoice lacks the pooler it reads")
    return stirred(model, seed).eval()


def our_class(name: str) -> type[Model]:
    return getattr(models, name)


def padded_batch(family: str, name: str, seed: int) -> dict[str, Tensor]:
    """Rows of several lengths, padded on the right; questions of two choices where wanted."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    # the padding id stands at padding alone, since transformers gives it no gradient
    ids = torch.randint(PAD + 1, VOCABULARY, shape, generator=generator)
    batch = {"input_ids": ids.where(mask != 0, PAD), "attention_mask": mask}
    if their_config(family).to_dict().get("type_vocab_size", 1) > 1:
        halves = torch.tensor(LENGTHS)[:, None] // 2
        batch["token_type_ids"] = (torch.arange(shape[1]) >= halves).long() * mask
    if name == "BertForMultipleChoice":
        batch = {key: tensor.unflatten(0, (-1, 2)) for key, tensor in batch.items()}
    return batch


def labels_for(name: str, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Targets of a padded batch for the model that wants them; {} for the bare encoder."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(LENGTHS)
    if name == "BertModel":
        return {}
    if name == "BertForQuestionAnswering":
        spans = torch.tensor(LENGTHS)[:, None] * torch.rand(rows, 2, generator=generator)
        starts, ends = spans.long().sort(dim=1).values.unbind(1)
        return {"start_positions": starts, "end_positions": ends}
    if name in ("BertForSequenceClassification", "BertForNextSentencePrediction"):
        classes = CLASSES if name == "BertForSequenceClassification" else 2
        return {"labels": torch.randint(0, classes, (rows,), generator=generator)}
    if name == "BertForMultipleChoice":
        return {"labels": torch.randint(0, 2, (rows // 2,), generator=generator)}
    mask = batch["attention_mask"]
    # replaced or not, one of some classes, or any word
    named = {"BertForReplacedTokenDetection": 2, "BertForTokenClassification": CLASSES}
    classes = named.get(name, VOCABULARY)
    labels = torch.randint(0, classes, mask.shape, generator=generator)
    chosen = torch.rand(mask.shape, generator=generator) < 0.4
    chosen[0, 0] = True
    if name == "BertForReplacedTokenDetection":
        # theirs knows no ignored label, and takes every token
        chosen[:] = True
    labels[~(chosen & (mask != 0))] = IGNORE_INDEX
    found = {"labels": labels}
    if name == "BertForPreTraining":
        found["next_sentence_label"] = torch.randint(0, 2, (rows,), generator=generator)
    return found


def packed_batch(name: str, batch: dict[str, Tensor], labels: dict[str, Tensor]) -> PackedBatch:
    """The padded batch and its targets, packed by hand."""
    ids, mask = batch["input_ids"].view(-1, max(LENGTHS)), batch["attention_mask"]
    types = batch.get("token_type_ids", torch.zeros_like(ids)).view(ids.shape)

    def real(tensor: Tensor) -> list[list[int]]:
        return [row[:length].tolist() for row, length in zip(tensor, LENGTHS, strict=True)]

    examples = Examples.from_lists(real(ids), real(types))
    if "start_positions" in labels:
        spans = torch.stack([labels["start_positions"], labels["end_positions"]], dim=1)
        examples.span_labels = spans.numpy()
    elif name == "BertForMultipleChoice":
        examples.num_choices = 2
        classes = torch.stack([labels["labels"], torch.full((2,), IGNORE_INDEX)], dim=1)
        examples.sequence_labels = classes.flatten().numpy()
    elif "labels" in labels and labels["labels"].dim() == 1:
        examples.sequence_labels = labels["labels"].numpy()
    elif "labels" in labels:
        flat = labels["labels"][mask != 0]
        examples.masked_positions = (flat != IGNORE_INDEX).nonzero().squeeze(1).numpy()
        examples.labels = flat[flat != IGNORE_INDEX].numpy()
    if "next_sentence_label" in labels:
        examples.sequence_labels = labels["next_sentence_label"].numpy()
    return examples.batch(range(len(LENGTHS)))


def their_labels(family: str, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """ALBERT calls its second objective otherwise."""
    names = {"next_sentence_label": "sentence_order_label"} if family == "albert" else {}
    return {names.get(name, name): tensor for name, tensor in labels.items()}


def outputs_of(output: Any, mask: Tensor | None) -> dict[str, Tensor]:
    """Every floating output by name; of tokens, those that are not padding."""
    names = {
        "states": ("last_hidden_state",),
        "pooled": ("pooler_output",),
        "logits": ("logits", "prediction_logits"),
        "relationship": ("seq_relationship_logits", "sop_logits"),
        "starts": ("start_logits",),
        "ends": ("end_logits",),
    }
    found = {}
    for name, keys in names.items():
        values = [value for key in keys if isinstance(value := getattr(output, key, None), Tensor)]
        if values:
            by_token = mask is not None and values[0].shape[:2] == mask.shape
            found[name] = values[0][mask != 0] if by_token else values[0]
    return found


def their_loss(model: nn.Module, batch: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Their loss; of answers among the sequence's own tokens alone, which theirs is not."""
    output = model(**batch, **labels)
    if "start_positions" not in labels:
        if output.loss.dtype == next(model.parameters()).dtype:
            return output.loss
        # in fp64, the oracle's, ELECTRA rounds the loss to fp32, and ModernBERT its logits
        if output.logits.dim() == 2:
            real = batch["attention_mask"] != 0
            wanted = labels["labels"][real].to(output.logits.dtype)
            return nn.functional.binary_cross_entropy_with_logits(output.logits[real], wanted)
        return nn.functional.cross_entropy(output.logits.flatten(0, 1), labels["labels"].flatten())
    padding = batch["attention_mask"] == 0
    pairs = ((output.start_logits, "start_positions"), (output.end_logits, "end_positions"))
    losses = [
        nn.functional.cross_entropy(logits.masked_fill(padding, float("-inf")), labels[name])
        for logits, name in pairs
    ]
    return sum(losses) / 2


def flow(outputs: dict[str, Tensor], seed: int) -> None:
    """A gradient that fits no loss, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("states", "pooled"):
        if name in outputs:
            weights = torch.randn(outputs[name].shape, generator=generator).bfloat16()
            outputs[name].backward(weights.to(outputs[name]), retain_graph=True)


def named_as_ours(tensors: dict[str, Tensor], ours: Model) -> dict[str, Tensor]:
    """Their tensors under our names, the three projections joined."""
    result = {}
    for name in ours.state_dict():
        parts = [tensors.get(theirs) for theirs in ours.names.theirs(name)]
        if all(part is not None for part in parts):
            result[name] = torch.cat(parts)
    return result


def their_results(
    model: nn.Module, ours: Model, family: str, batch: dict, labels: dict, seed: int
) -> dict[str, Tensor]:
    """Outputs, loss and gradients under our names."""
    result = outputs_of(model(**batch), batch["attention_mask"])
    labels = their_labels(family, labels)
    _go_back(result, their_loss(model, batch, labels) if labels else None, seed)
    # a tied tensor under both of its names
    parameters = model.named_parameters(remove_duplicate=False)
    grads = {key: p.grad for key, p in parameters if p.grad is not None}
    return result | _unshifted(ours, named_as_ours(grads, ours))


def our_results(model: Model, batch: Any, labels: dict, seed: int) -> dict[str, Tensor]:
    """The same of ours; `batch` padded with its labels, or packed with them inside."""
    model.zero_grad()
    if isinstance(batch, PackedBatch):
        plain = Examples(
            batch.input_ids.numpy(), batch.token_type_ids.numpy(), batch.cu_seqlens.numpy()
        )
        plain.num_choices = batch.num_choices
        result = outputs_of(model(plain.batch(range(len(plain)))), None)
        loss = model(batch).loss if labels else None
    else:
        result = outputs_of(model(**batch), batch["attention_mask"])
        loss = model(**batch, **labels).loss if labels else None
    _go_back(result, loss, seed)
    return result | _unshifted(model, gradients(model))


def compare_all(
    rule: ErrorRule,
    ours: dict[str, Tensor],
    baseline: dict[str, Tensor],
    oracle: dict[str, Tensor],
    where: str = "",
) -> None:
    """Hold outputs together, and loss and gradients together, to the rule.

    Each tensor is divided by the oracle's size, so that each counts alike. A tensor by itself would
    be too few numbers: the errors of a whole small model go up and down together, and of two fp32
    programs now one is nearer to the truth, now the other.
    """
    assert ours.keys() == baseline.keys() == oracle.keys()
    outputs = [name for name in oracle if name in OUTPUTS]
    rest = [name for name in oracle if name not in OUTPUTS]
    sizes = {name: truth.square().mean().sqrt() for name, truth in oracle.items()}
    assert all(size > 0 for size in sizes.values()), "a gradient that is zero holds rounding alone"
    for kind, names in (("outputs", outputs), ("gradients", rest)):
        if names:
            columns = (
                torch.cat([(side[name].double() / sizes[name]).flatten() for name in names])
                for side in (ours, baseline, oracle)
            )
            own, other, truth = columns
            dtype = ours[names[0]].dtype
            # rounded to their dtype again, whose eps the rule goes by
            rule.compare(f"{where} {kind}", own.to(dtype), other.to(dtype), truth)


def _go_back(result: dict[str, Tensor], loss: Tensor | None, seed: int) -> None:
    if loss is None:
        flow(result, seed)
    else:
        loss.backward()
        result["loss"] = loss


def _unshifted(ours: Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in tensors if name not in SHIFTED.get(ours.name, ())}
