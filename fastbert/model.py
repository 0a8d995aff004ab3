"""What every model shares: an encoder, files in Hugging Face's layout, the padded call."""

from __future__ import annotations

import importlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastbert import checkpoint
from fastbert.checkpoint import NameMap
from fastbert.config import EncoderConfig
from fastbert.encoder import Encoder, initialise
from fastbert.errors import InputError
from fastbert.families import head_of
from fastbert.heads import Pooler
from fastbert.kernels.ops import Rng
from fastbert.packing import IGNORE_INDEX, PackedBatch, pack, unpack
from fastbert.pre_norm import PreNormEncoder, PreNormSettings
from fastbert.segments import segment_sum

M = TypeVar("M", bound="Model")
_HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", "vocab.txt", "merges.txt"]


def resolve_model(path: str | os.PathLike[str]) -> Path:
    """The model folder of a run, `path` itself where it is one, or the copy of a hub's model.

    Raises:
        InputError: none of them.
    """
    for folder in (Path(path) / "model", Path(path)):
        if (folder / "config.json").is_file():
            return folder
    if Path(path).exists():
        raise InputError(
            f"{path}: no model here: config.json is in neither it nor its model folder"
        )
    return local_folder(path, "no model here")


@dataclass
class Call:
    """One call's batch, and where its tokens stood if it was padded.

    Attributes:
        batch: packed.
        rng: names the dropout draws; None for no dropout.
        rows: [tokens] int64 into the flattened padded batch; None for a packed call.
        shape: (batch, length) of a padded call.
    """

    batch: PackedBatch
    rng: Rng | None
    rows: Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    def as_called(self, states: Tensor, at_padding: float = 0.0) -> Tensor:
        """[tokens, ...] as the caller holds tokens: packed, or padded."""
        if self.rows is None:
            return states
        return unpack(states, self.rows, self.shape, at_padding)

    def label_rows(self, labels: Tensor | None) -> None:
        """Padded labels [batch, length] of single tokens, -100 where there is no target."""
        if labels is None or self.rows is None:
            return
        flat = labels.flatten()[self.rows]
        positions = (flat != IGNORE_INDEX).nonzero().squeeze(1)
        self.batch.masked_positions, self.batch.labels = positions, flat[positions]
        self.batch.num_masked = positions.shape[0]

    def label_sequences(self, labels: Tensor | None) -> None:
        """Labels of a padded call's sequences: [batch] or [batch, numbers]."""
        if labels is None or self.rows is None:
            return
        self.batch.sequence_labels = labels
        if labels.is_floating_point():
            present = ~labels.isnan().flatten(1).all(dim=1) if labels.dim() > 1 else ~labels.isnan()
        else:
            present = labels != IGNORE_INDEX
        self.batch.num_labelled = int(present.sum())

    def label_spans(self, starts: Tensor | None, ends: Tensor | None) -> None:
        """Where the answers of a padded call start and end, [batch] each, as padded columns."""
        if starts is None or ends is None or self.rows is None:
            return
        sequences, length = self.shape
        columns = torch.stack([starts, ends], dim=1)
        inside = (columns >= 0) & (columns < length)
        places = torch.full((sequences * length,), IGNORE_INDEX, device=self.rows.device)
        first = self.batch.cu_seqlens[self.rows // length].long()
        places[self.rows] = torch.arange(len(self.rows), device=self.rows.device) - first
        own = torch.arange(sequences, device=columns.device)[:, None] * length
        spans = places[own + columns.masked_fill(~inside, 0)].masked_fill(~inside, IGNORE_INDEX)
        self.batch.span_labels = spans
        self.batch.num_labelled = int((spans >= 0).all(dim=1).sum())


class Model(nn.Module):
    """What all models share.

    Attributes:
        name: under which `fastbert.families` describes the model.
        config: of the encoder.
        fresh_parameters: names that the checkpoint lacked and that were drawn.
    """

    name: ClassVar[str]
    encoder: Encoder
    # of the masked-LM and of the sequence objective, in their sum
    loss_weights: tuple[float, float] = (1.0, 1.0)

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.head = head_of(config.model_type, self.name)
        for field, value in self.head.required.items():
            if config.extra.get(field, value) != value:
                raise InputError(
                    f"config: {field} must be {value!r} for {self.name} of family "
                    f"{config.model_type}, got {config.extra[field]!r}"
                )
        self.fresh_parameters: list[str] = []
        self.encoder = PreNormEncoder(config) if config.family.pre_norm else Encoder(config)
        self.mean_pooling = config.family.pre_norm and PreNormSettings.of(config).mean_pooling
        self.pooler: Pooler | None = None
        if self.head.pooling:
            self.pooler = Pooler(config, self.head.pooling, config.dropout(self.head.dropout))

    @classmethod
    def from_config(cls: type[M], config: EncoderConfig, seed: int = 0) -> M:
        """A model with fresh weights, drawn from `seed`, in evaluation mode."""
        model = cls(config)
        initialise(model, config, seed)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls: type[M],
        folder: str | os.PathLike[str],
        *,
        config: EncoderConfig | None = None,
        new_heads: bool = False,
        seed: int = 0,
    ) -> M:
        """Read a model in Hugging Face's layout: config.json and weights.

        Args:
            folder: a local folder, or the name of a model on the hub (needs huggingface_hub).
            config: replaces the folder's, e.g. with other labels or dropout.
            new_heads: draw what the checkpoint lacks besides the encoder from `seed`, instead of
                refusing; `model.fresh_parameters` then names it.
            seed: of fresh weights.

        Returns:
            The model in fp32, whatever the file's dtype, and in evaluation mode.

        Raises:
            InputError: missing, damaged or foreign files.
        """
        folder = local_folder(folder)
        config = config or EncoderConfig.from_pretrained(folder)
        names = NameMap.of(config, cls.name)
        checkpoint.refuse_other_sizes(folder, config, names)
        model = cls.from_config(config, seed)
        where = str(checkpoint.weights_files(folder)[0])
        state, missing = checkpoint.from_hugging_face(
            checkpoint.read_weights(folder), model.state_dict(), names, where
        )
        of_encoder = [name for name in missing if name.startswith("encoder.")]
        if of_encoder or (missing and not new_heads):
            absent = [names.theirs(name, prefixed=False)[0] for name in of_encoder or missing]
            raise InputError(
                f"{where}: no {checkpoint.summarise(absent)}: not a checkpoint of {cls.__name__}"
            )
        model.load_state_dict(state, strict=False)
        model.fresh_parameters = missing
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, as transformers reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = checkpoint.to_hugging_face(self.state_dict(), self.names)
        checkpoint.write_weights(folder, tensors)
        config = self.config if self.head.labels else self.config.without_labels()
        config.save_pretrained(folder, architecture=self.head.architecture)

    def push_to_hub(self, name: str, *, private: bool = True, **options: Any) -> str:
        """Upload what `save_pretrained` writes.

        Args:
            name: of the repository, "user/model"; made where it does not exist.
            private: of a repository that is made.
            options: of huggingface_hub's `upload_folder`, e.g. `token`, `commit_message`.

        Returns:
            The address of the commit.

        Raises:
            InputError: huggingface_hub is not installed.
        """
        hub = _hub()
        api = hub.HfApi(token=options.pop("token", None))
        api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(folder_path=folder, repo_id=name, **options))

    @property
    def has_head(self) -> bool:
        """Whether there is more than the encoder and its pooler."""
        return self.name != "BertModel"

    @property
    def names(self) -> NameMap:
        """Our names and Hugging Face's for this model's tensors."""
        return NameMap.of(self.config, self.name)

    @property
    def word_weight(self) -> Tensor:
        """The word embedding, which is also the masked-LM decoder."""
        return self.encoder.embeddings.word_embeddings.weight

    def pooled_sequences(self, call: Call) -> Tensor:
        """[sequences, hidden_size]; the last layer computes no other rows than it must."""
        first = not self.mean_pooling
        hidden_states, batch = self.encoder.selected(call.batch, call.rng, first=first)
        return self.pooled(hidden_states, batch, call.rng)

    def pooled(self, hidden_states: Tensor, batch: PackedBatch, rng: Rng | None) -> Tensor:
        """One vector a sequence: [rows, hidden_size] -> [sequences, hidden_size]."""
        if self.mean_pooling:
            vectors = mean_of_tokens(hidden_states, batch).to(hidden_states.dtype)
        else:
            vectors = hidden_states[batch.first_tokens]
        return vectors if self.pooler is None else self.pooler(vectors, rng)

    def token_states(self, call: Call) -> Tensor:
        """[tokens, hidden_size] that a head of single tokens projects."""
        hidden_states = self.encoder(call.batch, call.rng)
        return hidden_states if self.pooler is None else self.pooler(hidden_states, call.rng)

    def call(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        rng: Rng | None,
    ) -> Call:
        """The batch of a packed or a padded call.

        A padded call in training mode draws its dropout from torch's default generator where
        nobody names the draw, as other people's training code expects.

        Raises:
            ValueError: a packed batch with a mask; a mask without a token.
        """
        if isinstance(input_ids, PackedBatch):
            if attention_mask is not None or token_type_ids is not None:
                raise ValueError(
                    "a PackedBatch carries its own segments and needs no attention_mask"
                )
            return Call(input_ids, rng)
        batch, rows = pack(input_ids, attention_mask, token_type_ids)
        if not batch.num_tokens:
            raise ValueError(
                f"the batch {list(input_ids.shape)} has no token: attention_mask must be 1 at one "
                "or more"
            )
        if self.config.position_offset:
            batch.position_ids = positions_of_tokens(input_ids, self.config.pad_token_id)[rows]
        if rng is None and self.training:
            rng = Rng(int(torch.randint(1 << 62, ())))
        return Call(batch, rng, rows, (input_ids.shape[0], input_ids.shape[1]))


def mean_of_tokens(hidden_states: Tensor, batch: PackedBatch) -> Tensor:
    """[tokens, hidden_size] -> [sequences, hidden_size], fp32 at least; zeros for empty sequences.

    Tail rows are not looked at.
    """
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).clamp(min=1)
    # a sum in bf16 stops growing after some hundred tokens
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    return segment_sum(wide, batch.cu_seqlens, batch.sequence_of_token) / lengths[:, None]


def positions_of_tokens(input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Each token's place among its row's tokens that are no padding, -1 for padding ids.

    Args:
        input_ids: [batch, length].

    Returns:
        [batch * length], as fairseq counts.
    """
    real = (input_ids != pad_token_id).long()
    return (real.cumsum(dim=1) * real - 1).flatten()


def local_folder(folder: str | os.PathLike[str], absent: str = "no such folder") -> Path:
    """A folder that is there, or the local copy of a model on the hub.

    Args:
        folder: or the model's name.
        absent: what is said where there is none.

    Raises:
        InputError: neither; huggingface_hub is not installed.
    """
    path = Path(folder)
    name = str(folder)
    if path.is_dir():
        return path
    # a hub name is one or two plain words
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise InputError(f"{folder}: {absent}; expected a saved model's folder")
    hub = _hub(f"{folder}: {absent}, and no name that can be asked of the hub: ")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder}: {absent}, and not from the hub: {reason}") from None


def _hub(before: str = "") -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise InputError(
            f"{before}huggingface_hub is not installed: pip install 'fastbert[hub]'"
        ) from None
