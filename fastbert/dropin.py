"""accelerate(model): a transformers model computes its layers packed, with its own parameters.

1. The encoder's model plans its batch from the attention mask, once, and keeps the mask to itself.
2. A hook on the encoder drops the padding, and hands the plan on in the mask's place.
3. Every layer computes [tokens, hidden_size] with our operators, reading its own modules.
4. Hooks put padding back: on the encoder's output, and on hidden states somebody asked for.

A model and its layers get a class of the same name before their own, and no parameter or name
changes: their files stay what they were. A batch that packed layers would compute otherwise than
transformers goes through transformers' own layers, with a warning.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastbert import fast_layers
from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.families import FAMILIES
from fastbert.family import Family
from fastbert.packed_call import Packed
from fastbert.pre_norm import PreNormSettings, rotary_tables
from fastbert.stock_layers import changed_module, inner_modules, read_by_hooks

M = TypeVar("M", bound=nn.Module)

_HANDLES, _SETTINGS = "_fastbert_handles", "_fastbert_settings"


@dataclass
class _Call:
    """One forward pass of an accelerated model; without a plan it is transformers' own."""

    packed: Packed | None


class _Running(threading.local):
    """The innermost call of a thread; replicas run in threads."""

    call: _Call | None = None


_running = _Running()


def accelerate(model: M) -> M:
    """Let a transformers model, or anything that holds one, compute without padding.

    Models of BERT, RoBERTa, XLM-R, DistilBERT, ALBERT, ELECTRA and ModernBERT with any head, models
    of `peft`, SentenceTransformer and CrossEncoder, in training and in inference. The model is
    changed in place; `restore` undoes it.

    Hidden states at padding are zero, where transformers leaves what it computed there. In training
    mode dropout has the modules' probabilities and is drawn by our generator, seeded by torch's, so
    that masks are others. Under torch.compile the encoder stays as it is, between two graphs.

    With a warning, transformers' own layers compute: batches with padding before a sequence's first
    token, for ModernBERT also between its tokens; and every batch while a layer's inner modules
    were replaced or carry hooks, or somebody's own hook reads a layer.

    Args:
        model: its parameters stay its own, and what it saves stays as it was.

    Returns:
        The same model.

    Raises:
        InputError: nothing in it that can be accelerated, or a configuration or layers that are
            not such an encoder's.
        ValueError: later, in a call: attention probabilities are asked for, a mask that is not
            [batch, length], a decoder's arguments, or the call is being traced.
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
    # transformers before its masks were made outside of ModernBERT
    old = settings is not None and hasattr(model, "_update_attention_mask")
    if old and "flash" in str(model.config._attn_implementation):
        raise InputError(
            "accelerate: this transformers' ModernBERT drops padding itself under flash attention; "
            'call model.set_attn_implementation("sdpa") first'
        )
    layers = [
        module for module in encoder.modules() if all(_has(module, part) for part in family.qkv)
    ]
    for layer in layers:
        if not type(layer).__module__.startswith("transformers."):
            raise InputError(
                f"accelerate: {type(layer).__name__} of {type(layer).__module__} is no layer of "
                "transformers, and what it computes is not known"
            )
    for number, layer in enumerate(layers, start=1):
        layer.__dict__[_SETTINGS] = _LayerSettings(
            config, number, settings, inner_modules(layer, family), old
        )
        layer.__class__ = _fast_class(_FastLayer, type(layer))
    watched = encoder if settings is None else model.embeddings
    model.__dict__[_SETTINGS] = _ModelSettings(config, settings, layers, watched, old)
    if settings is not None:
        final_norm = model.get_submodule(str(family.final_norm))
        inner = [
            model.embeddings.register_forward_hook(_after_embeddings),
            # others' hooks on what comes out find it padded
            final_norm.register_forward_hook(_after_final_norm, prepend=True),
        ]
    else:
        inner = [
            encoder.register_forward_pre_hook(_before_encoder, with_kwargs=True),
            encoder.register_forward_hook(_after_encoder, prepend=True),
        ]
    model.__dict__[_HANDLES] = inner
    model.__class__ = _fast_class(_FastModel, type(model))


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


@dataclass(frozen=True)
class _LayerSettings:
    """What a layer has no module for."""

    config: EncoderConfig
    number: int
    pre_norm: PreNormSettings | None
    inner: tuple[tuple[tuple[str, ...], type], ...]
    returns_tuple: bool


@dataclass(frozen=True)
class _ModelSettings:
    """What a model's call needs: its layers, and the module between them and the embeddings."""

    config: EncoderConfig
    pre_norm: PreNormSettings | None
    layers: list[nn.Module]
    watched: nn.Module
    makes_masks: bool


def _refuse(model: Any, given: dict[str, Any]) -> None:
    """Raise ValueError for a call that is not a plain encoder's."""
    wanted = given.get("output_attentions")
    if wanted or (wanted is None and getattr(model.config, "output_attentions", False)):
        raise ValueError(
            "accelerate: output_attentions is set, and attention probabilities are never made; "
            "fastbert.restore(model) gives them back"
        )
    if given.get("encoder_hidden_states") is not None or given.get("past_key_values") is not None:
        raise ValueError(
            "accelerate: only encoders are supported, without cross-attention or cache"
        )
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"accelerate: attention_mask must be [batch, length], got {found}")
    if torch.jit.is_tracing():
        raise ValueError(
            "accelerate: a trace would keep this batch's lengths; fastbert.restore(model) first"
        )
    if _SETTINGS in model.__dict__ and model.__dict__[_SETTINGS].pre_norm is not None:
        for name in ("position_ids", "sliding_window_mask", "indices", "cu_seqlens"):
            if given.get(name) is not None:
                raise ValueError(f"accelerate: {name} of ModernBERT are its own to make")


def _plan(settings: _ModelSettings, given: dict[str, Any]) -> Packed:
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ValueError("accelerate: neither input_ids nor inputs_embeds")
    packed = Packed.of(
        given.get("attention_mask"), (tokens.shape[0], tokens.shape[1]), tokens.device
    )
    if settings.pre_norm is not None:
        config, length = settings.config, packed.shape[1]
        positions = max(length, config.max_position_embeddings)
        for kind, theta in settings.pre_norm.thetas.items():
            cos, sin = _tables(positions, config.head_dim, theta, tokens.device)
            packed.tables[kind] = cos[:length], sin[:length]
    return packed


@lru_cache(maxsize=16)
def _tables(
    positions: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    # training may save what inference has made
    with torch.inference_mode(False):
        cos, sin = rotary_tables(positions, head_dim, theta)
        return cos.to(device), sin.to(device)


def _why_stock(settings: _ModelSettings, packed: Packed) -> str | None:
    """Why transformers' own layers must compute this batch; None where ours may."""
    if packed.starts_late:
        # heads read a sequence's first column, where transformers computes something for padding
        return "attention_mask has padding before a sequence's first token"
    if packed.has_holes and settings.pre_norm is not None:
        return "attention_mask has padding between a sequence's tokens"
    watched = settings.watched
    hooks = watched._forward_pre_hooks if settings.pre_norm is None else watched._forward_hooks
    if read_by_hooks(hooks):
        return f"a hook on {type(watched).__name__} reads what is packed here"
    for layer in settings.layers:
        if read_by_hooks(layer._forward_hooks) or read_by_hooks(layer._forward_pre_hooks):
            return f"a hook on {type(layer).__name__} reads what is packed here"
        path = changed_module(layer, layer.__dict__[_SETTINGS].inner)
        if path is not None:
            return f"{'.'.join(path)} of {type(layer).__name__} was replaced or carries a hook"
    return None


def _after_embeddings(embeddings: Any, args: Any, output: Tensor) -> Tensor:
    call = _running.call
    return output if call is None or call.packed is None else call.packed.pack(output)


def _after_final_norm(norm: Any, args: Any, output: Tensor) -> Tensor:
    call = _running.call
    return output if call is None or call.packed is None else call.packed.unpack(output)


def _before_encoder(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Drop the padding, once."""
    if _running.call is None:
        raise ValueError("accelerate: an accelerated encoder is called through its model alone")
    packed = _running.call.packed
    if packed is None:
        return None
    padded = args[0] if args else kwargs["hidden_states"]
    rest = {name: value for name, value in kwargs.items() if name not in ("hidden_states",)}
    # ids of padded places, which nothing past the embeddings reads
    rest.pop("position_ids", None)
    return (packed.pack(padded),), {**rest, "attention_mask": packed}


def _after_encoder(encoder: Any, args: tuple[Any, ...], output: Any) -> Any:
    packed = _running.call.packed if _running.call else None
    if packed is None:
        return output
    if isinstance(output, tuple):
        return (packed.unpack(output[0]), *output[1:])
    output.last_hidden_state = packed.unpack(output.last_hidden_state)
    return output


def _after_model(output: Any, packed: Packed) -> Any:
    """Put padding back into the hidden states that transformers collected on the way."""
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


class _Fast(nn.Module):
    """Stands before the class of a module of transformers, under its name."""

    stock_class: Any
    parameter_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made here and cannot be found by its name
        kind = next(k for k in (_FastModel, _FastLayer) if isinstance(self, k))
        return _remade, (kind, self.stock_class), self.__dict__


class _FastModel(_Fast):
    """An encoder with its embeddings, which others call by `forward` as well as by its own call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.parameter_names, args, strict=False)), **kwargs}
        _refuse(self, given)
        settings: _ModelSettings = self.__dict__[_SETTINGS]
        packed = _plan(settings, given)
        reason = _why_stock(settings, packed)
        if reason is not None:
            warnings.warn(f"accelerate: {reason}; transformers' own layers compute", stacklevel=2)
            return self._called(given, None)
        given["attention_mask"] = None
        if settings.pre_norm is not None and not settings.makes_masks:
            # what ModernBERT takes for masks already made
            given["attention_mask"] = dict.fromkeys(settings.pre_norm.thetas, packed)
        return _after_model(self._called(given, packed), packed)

    def _called(self, given: dict[str, Any], packed: Packed | None) -> Any:
        # a hook may call another accelerated model in the middle of this one
        before, _running.call = _running.call, _Call(packed)
        try:
            return super().forward(**given)  # type: ignore[misc]
        finally:
            _running.call = before

    def _update_attention_mask(self, *args: Any, **kwargs: Any) -> Any:
        """Masks of full and of sliding layers, where ModernBERT makes them itself."""
        packed = _running.call.packed if _running.call else None
        if packed is not None:
            return packed, packed
        return super()._update_attention_mask(*args, **kwargs)  # type: ignore[misc]


class _FastLayer(_Fast):
    """A layer: computes packed rows, and leaves anything else to its own class."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore
        settings: _LayerSettings = self.__dict__[_SETTINGS]
        config, number = settings.config, settings.number
        if config.num_hidden_groups is not None:
            # one module's masks must not be the same at every depth
            attention_mask.steps += 1
            number = attention_mask.steps
        if settings.pre_norm is None:
            return fast_layers.post_norm_layer(self, hidden_states, attention_mask, config, number)
        states = fast_layers.pre_norm_layer(
            self, hidden_states, attention_mask, config, settings.pre_norm, number
        )
        return (states,) if settings.returns_tuple else states


_CLASSES: dict[tuple[type, type], Any] = {}


def _fast_class(kind: type[_Fast], stock: Any) -> Any:
    if (kind, stock) not in _CLASSES:
        # between two graphs: what is packed differs from batch to batch
        call = torch.compiler.disable(kind.forward) if kind is _FastModel else kind.forward

        # their signature, which others inspect, and their name, which is written into files
        @wraps(stock.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return call(self, *args, **kwargs)

        members = {
            "stock_class": stock,
            "forward": forward,
            "parameter_names": tuple(inspect.signature(stock.forward).parameters)[1:],
            "__module__": stock.__module__,
        }
        _CLASSES[kind, stock] = type(stock.__name__, (kind, stock), members)
    return _CLASSES[kind, stock]


def _remade(kind: type[_Fast], stock: Any) -> nn.Module:
    fast = _fast_class(kind, stock)
    remade: nn.Module = fast.__new__(fast)
    return remade
