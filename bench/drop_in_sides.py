"""Who takes part in the drop-in bench: stock transformers and the same model accelerated."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fastbert
from fastbert.bench import peers
from fastbert.bench.drop_in_text import ORDERS, Batch, Case, padded_batches
from fastbert.bench.parity import Parity
from fastbert.config import EncoderConfig
from fastbert.training.loop import autocast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARITY_BATCHES, PARITY_SEQUENCES = 5, 4
LEARNING_RATE = 2e-5


@dataclass(frozen=True)
class Side:
    """One program in one dtype and order, ready for a pass over the batches."""

    name: str
    order: str
    dtype: str
    step: Callable[[], object]

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype} {self.order}"


def _load(task: str, model: str, device: torch.device) -> Any:
    package = peers.transformers()
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {
        "attn_implementation": "sdpa",
        "dtype": torch.float32,
        "local_files_only": True,
    }
    torch.manual_seed(0)
    if task == "encode":
        found = package.AutoModel.from_pretrained(model, **options)
    else:
        options["num_labels"] = 1 if task == "cross-encoder" else 2
        found = package.AutoModelForSequenceClassification.from_pretrained(model, **options)
    return found.to(device).eval()


def make_sides(
    task: str,
    case: Case,
    model: str,
    sequences: list[list[int]],
    dtypes: Iterable[str],
    compiled: bool,
    device: torch.device,
) -> list[Side]:
    """Every program in every dtype and order; torch.compile of stock, sorted, where asked for."""
    pad = EncoderConfig.from_pretrained(model).pad_token_id
    orders = {
        order: [
            {name: tensor.to(device) for name, tensor in batch.items()}
            for batch in padded_batches(sequences, case, pad, order)
        ]
        for order in ORDERS
    }
    sides = []
    for dtype in dtypes:
        stock = _load(task, model, device)
        programs: dict[str, tuple[Any, Sequence[str]]] = {"stock": (stock, ORDERS)}
        if compiled:
            fused = torch.compile(copy.deepcopy(stock), dynamic=True)
            programs["compiled"] = (fused, ("sorted",))
        programs["fast"] = (fastbert.accelerate(copy.deepcopy(stock)), ORDERS)
        for name, (program, wanted) in programs.items():
            for order in wanted:
                step = _passes(task, program, orders[order], dtype, device)
                sides.append(Side(name, order, dtype, step))
    return sides


def _passes(
    task: str, model: Any, batches: list[Batch], dtype: str, device: torch.device
) -> Callable[[], object]:
    if task == "fine-tune":
        model = model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

        def train() -> None:
            for batch in batches:
                labels = batch["attention_mask"].sum(dim=1) % 2
                with autocast(device, DTYPES[dtype]):
                    loss = model(**batch, labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return train
    model = model.to(DTYPES[dtype])

    @torch.no_grad()
    def infer() -> None:
        for batch in batches:
            output = model(**batch)
            if task == "encode":
                mask = batch["attention_mask"][..., None].to(output.last_hidden_state.dtype)
                (output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)

    return infer


def check_parity(
    case: Case,
    model: str,
    sequences: list[list[int]],
    dtype: str,
    device: torch.device,
    report: dict[str, Any],
) -> list[str]:
    """Hold accelerated hidden states to the error rule; enters the dtype, returns what fails."""
    stock = _load("encode", model, device)
    fast = fastbert.accelerate(copy.deepcopy(stock))
    oracle = copy.deepcopy(stock).double()
    parity = Parity(DTYPES[dtype])
    small = dataclasses.replace(case, batch_size=PARITY_SEQUENCES)
    pad = EncoderConfig.from_pretrained(model).pad_token_id
    chosen = padded_batches(sequences[: PARITY_BATCHES * PARITY_SEQUENCES], small, pad, "unsorted")
    for batch in chosen:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        real = batch["attention_mask"] != 0
        sides = []
        with torch.no_grad():
            for side in (fast.to(DTYPES[dtype]), stock.to(DTYPES[dtype]), oracle):
                sides.append({"hidden states": side(**batch).last_hidden_state[real]})
        parity.add(*sides)
    report[dtype] = {
        "batches": len(chosen),
        "failures": parity.failures(),
        "worst_share_of_allowed": round(parity.worst(), 3),
        "rms_error_beside_peer": round(parity.beside_peer()[-1], 3),
    }
    failures: list[str] = report[dtype]["failures"]
    return failures
