"""accelerate(model): a transformers model computes its layers packed, with its own parameters.

1. The encoder's model keeps the attention mask to itself.
2. A hook on the encoder drops the padding once, and hands the batch on in the mask's place.
3. Every layer computes [tokens, hidden_size] with our operators, reading its own modules.
4. Hooks put padding back: on the encoder's output, and on hidden states somebody asked for.

A model and its layers get a class of the same name before their own, and no parameter or name
changes: their files stay what they were.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

from torch import Tensor, nn

from fastbert import fast_layers
from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.families import FAMILIES
from fastbert.family import Family
from fastbert.packed_call import Packed
from fastbert.pre_norm import PreNormSettings, rotary_tables

M = TypeVar("M", bound=nn.Module)

_HANDLES, _SETTINGS = "_fastbert_handles", "_fastbert_settings"


class _Running(threading.local):
    """What one thread's forward pass keeps between hooks; replicas run in threads."""

    inside: bool = False
    mask: Tensor | None = None
    packed: Packed | None = None


_running = _Running()


def accelerate(model: M) -> M:
    """Let a transformers model, or anything that holds one, compute without padding.

    Models of BERT, RoBERTa, XLM-R, DistilBERT, ALBERT, ELECTRA and ModernBERT with any head, models
    of `peft`, SentenceTransformer and CrossEncoder, in training and in inference. The model is
    changed in place; `restore` undoes it.

    Hidden states at padding are zero, where transformers leaves what it computed there. In training
    mode dropout is drawn by our generator, seeded by torch's, so that masks are others; in the
    layers its probabilities are those of the model's configuration at the time of this call.

    Args:
        model: its parameters stay its own, and what it saves stays as it was.

    Returns:
        The same model.

    Raises:
        InputError: nothing in it that can be accelerated, or a configuration that is not an
            encoder's.
        ValueError: later, in a call: attention probabilities are asked for, or a mask that is not
            [batch, length].
    """
    found = list(_encoders(model))
    if not found:
        raise InputError(
            f"accelerate: no encoder of {', '.join(FAMILIES)} in {type(model).__name__}"
        )
    for encoder_model, family in found:
        if not hasattr(encoder_model, _HANDLES):
            _install(encoder_model, family)
    return model


def restore(model: M) -> M:
    """Undo `accelerate`; a model that was not accelerated stays as it is."""
    for module in model.modules():
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
        if isinstance(module, _Fast):
            module.__class__ = module.stock_class  # type: ignore[assignment]
        module.__dict__.pop(_SETTINGS, None)
    return model


def _encoders(model: nn.Module) -> Iterator[tuple[nn.Module, Family]]:
    """The encoders in a model, with their families."""
    by_class = {family.heads["BertModel"].architecture: family for family in FAMILIES.values()}
    for module in model.modules():
        for ancestor in type(module).__mro__:
            # a class of the same name elsewhere is another thing
            if ancestor.__module__.startswith("transformers.") and ancestor.__name__ in by_class:
                yield module, by_class[ancestor.__name__]
                break


def _install(model: Any, family: Family) -> None:
    config = EncoderConfig.from_dict(model.config.to_dict(), where=type(model).__name__)
    # where layers stand beside the embeddings, the whole model is what holds them
    path = "" if family.pre_norm else family.layer_path.partition(".")[0]
    encoder = model.get_submodule(path)
    settings = PreNormSettings.of(config) if family.pre_norm else None
    layers = [
        module for module in encoder.modules() if all(_has(module, part) for part in family.qkv)
    ]
    for number, layer in enumerate(layers, start=1):
        layer.__dict__[_SETTINGS] = _Settings(config, number, settings)
        layer.__class__ = _fast_class(_FastLayer, type(layer))
    if settings is not None:
        model.__dict__[_SETTINGS] = _Settings(config, 0, settings)
        inner = [
            model.embeddings.register_forward_hook(_after_embeddings),
            model.get_submodule(str(family.final_norm)).register_forward_hook(_after_final_norm),
        ]
    else:
        inner = [
            encoder.register_forward_pre_hook(_before_encoder, with_kwargs=True),
            encoder.register_forward_hook(_after_encoder),
        ]
    model.__dict__[_HANDLES] = inner
    model.__class__ = _fast_class(_FastModel, type(model))


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _before_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keep the mask: transformers would make [batch, heads, length, length] of it."""
    wanted = kwargs.get("output_attentions")
    if wanted or (wanted is None and getattr(model.config, "output_attentions", False)):
        raise ValueError(
            "accelerate: output_attentions is set, and attention probabilities are never made; "
            "fastbert.restore(model) gives them back"
        )
    if kwargs.get("encoder_hidden_states") is not None or kwargs.get("past_key_values") is not None:
        raise ValueError(
            "accelerate: only encoders are supported, without cross-attention or cache"
        )
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"accelerate: attention_mask must be [batch, length], got {list(mask.shape)}"
        )
    _running.inside, _running.mask, _running.packed = True, mask, None
    instead = None
    if _SETTINGS in model.__dict__:
        instead = _masks_by_layer_type(model, mask, args, kwargs)
    if len(args) > 1:
        args = (args[0], instead, *args[2:])
    else:
        kwargs = {**kwargs, "attention_mask": instead}
    return args, kwargs


def _masks_by_layer_type(model: Any, mask: Tensor | None, args: Any, kwargs: Any) -> dict[str, Any]:
    """What ModernBERT takes for masks already made: the plan itself, for every type of layer."""
    if kwargs.get("position_ids") is not None:
        raise ValueError("accelerate: position_ids of ModernBERT are its own to count")
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    settings: _Settings = model.__dict__[_SETTINGS]
    assert settings.pre_norm is not None and tokens is not None
    shape = (tokens.shape[0], tokens.shape[1])
    packed = Packed.of(mask, shape, tokens.device, training=model.training)
    positions, head_dim = settings.config.max_position_embeddings, settings.config.head_dim
    for kind, theta in settings.pre_norm.thetas.items():
        cos, sin = (table[: shape[1]] for table in _tables(positions, head_dim, theta))
        packed.tables[kind] = cos.to(tokens.device), sin.to(tokens.device)
    _running.packed = packed
    return dict.fromkeys(settings.pre_norm.thetas, packed)


_tables = lru_cache(maxsize=8)(rotary_tables)


def _after_embeddings(embeddings: Any, args: Any, output: Tensor) -> Tensor:
    packed = _running.packed
    return output if packed is None else packed.pack(output)


def _after_final_norm(norm: Any, args: Any, output: Tensor) -> Tensor:
    packed = _running.packed
    return output if packed is None else packed.unpack(output)


def _before_encoder(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Drop the padding, once."""
    if not _running.inside:
        raise ValueError("accelerate: an accelerated encoder is called through its model alone")
    padded = args[0] if args else kwargs["hidden_states"]
    shape = (padded.shape[0], padded.shape[1])
    packed = Packed.of(_running.mask, shape, padded.device, training=encoder.training)
    _running.packed = packed
    rest = {name: value for name, value in kwargs.items() if name not in ("hidden_states",)}
    # ids of padded places, which nothing past the embeddings reads
    rest.pop("position_ids", None)
    return (packed.pack(padded),), {**rest, "attention_mask": packed}


def _after_encoder(encoder: Any, args: tuple[Any, ...], output: Any) -> Any:
    packed = _running.packed
    assert packed is not None
    if isinstance(output, tuple):
        return (packed.unpack(output[0]), *output[1:])
    output.last_hidden_state = packed.unpack(output.last_hidden_state)
    return output


def _after_model(output: Any, packed: Packed | None) -> Any:
    """Put padding back into the hidden states that transformers collected on the way."""
    if packed is None:
        return output
    if isinstance(output, tuple):
        return tuple(_padded(value, packed) for value in output)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = _padded(output.hidden_states, packed)
    return output


def _padded(value: Any, packed: Packed) -> Any:
    if not isinstance(value, tuple):
        return value
    tokens = packed.layout.capacity
    return tuple(
        packed.unpack(t) if isinstance(t, Tensor) and t.dim() == 2 and len(t) == tokens else t
        for t in value
    )


@dataclass(frozen=True)
class _Settings:
    """What a layer has no module for."""

    config: EncoderConfig
    number: int
    pre_norm: PreNormSettings | None


class _Fast(nn.Module):
    """Stands before the class of a module of transformers, under its name."""

    stock_class: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made here and cannot be found by its name
        kind = next(k for k in (_FastModel, _FastLayer) if isinstance(self, k))
        return _remade, (kind, self.stock_class), self.__dict__


class _FastModel(_Fast):
    """An encoder with its embeddings, which others call by `forward` as well as by its own call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _before_model(self, args, kwargs)
        try:
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
            return _after_model(output, _running.packed)
        finally:
            _running.inside, _running.mask, _running.packed = False, None, None


class _FastLayer(_Fast):
    """A layer: computes packed rows, and leaves anything else to its own class."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore
        settings: _Settings = self.__dict__[_SETTINGS]
        config, number = settings.config, settings.number
        if config.num_hidden_groups is not None:
            # one module's masks must not be the same at every depth
            attention_mask.steps += 1
            number = attention_mask.steps
        if settings.pre_norm is not None:
            return fast_layers.pre_norm_layer(
                self, hidden_states, attention_mask, config, settings.pre_norm, number
            )
        return fast_layers.post_norm_layer(self, hidden_states, attention_mask, config, number)


_CLASSES: dict[tuple[type, type], Any] = {}


def _fast_class(kind: type[_Fast], stock: Any) -> Any:
    if (kind, stock) not in _CLASSES:
        # their signature, which others inspect, and their name, which is written into files
        @wraps(stock.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return kind.forward(self, *args, **kwargs)

        members = {"stock_class": stock, "forward": forward, "__module__": stock.__module__}
        _CLASSES[kind, stock] = type(stock.__name__, (kind, stock), members)
    return _CLASSES[kind, stock]


def _remade(kind: type[_Fast], stock: Any) -> nn.Module:
    fast = _fast_class(kind, stock)
    remade: nn.Module = fast.__new__(fast)
    return remade
