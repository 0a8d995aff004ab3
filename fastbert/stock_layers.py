"""What transformers' layers are made of besides parameters, and who else has a hand in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastbert.family import Family
from fastbert.linear import is_hooked

# hooks of these wrap a module's call and do not read what it computes
_WRAPPERS = {"accelerate", "fastbert", "peft", "torch", "transformers"}


@dataclass(frozen=True)
class Dropouts:
    """Where a layer of transformers keeps its dropout.

    Attributes:
        attention: the module whose training flag decides about the probabilities.
        probability: its attribute: a number, or a module with one.
        attention_output, output: the modules before the two sums; None where there is none.
    """

    attention: str
    probability: str
    attention_output: str | None
    output: str | None


_BERT = Dropouts("attention.self", "dropout", "attention.output.dropout", "output.dropout")
DROPOUTS: Mapping[str, Dropouts] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": Dropouts("attention", "dropout", None, "ffn.dropout"),
    "albert": Dropouts("attention", "attention_dropout", "attention.output_dropout", None),
    "modernbert": Dropouts("attn", "attention_dropout", "attn.out_drop", None),
}


@dataclass(frozen=True)
class Rates:
    """A layer's dropout probabilities as its modules have them now; 0 in evaluation mode."""

    attention: float
    attention_output: float
    output: float

    @classmethod
    def of(cls, layer: nn.Module, model_type: str) -> Rates:
        """Read them, as transformers' own forward does."""
        where = DROPOUTS[model_type]
        attention = layer.get_submodule(where.attention)
        held = getattr(attention, where.probability)
        probability = held if isinstance(held, float | int) else _probability(held)
        return cls(
            float(probability) if attention.training else 0.0,
            *(
                0.0 if path is None else _active(layer.get_submodule(path))
                for path in (where.attention_output, where.output)
            ),
        )


def _probability(module: nn.Module) -> float:
    return float(getattr(module, "p", 0.0))


def _active(module: nn.Module) -> float:
    return _probability(module) if module.training else 0.0


def inner_modules(layer: nn.Module, family: Family) -> tuple[tuple[tuple[str, ...], type], ...]:
    """Paths and classes of the modules whose work we do without calling them."""
    ours = {*family.layer.values(), *family.qkv}
    return tuple(
        (tuple(path.split(".")), type(module))
        for path, module in layer.named_modules()
        if path and path not in ours and not isinstance(module, nn.Dropout | nn.Identity)
    )


def changed_module(
    layer: nn.Module, inner: Iterable[tuple[tuple[str, ...], type]]
) -> tuple[str, ...] | None:
    """The first of `inner_modules` that was replaced, or carries a hook that we would not call."""
    for path, kind in inner:
        module: Any = layer
        for name in path:
            module = module._modules.get(name) if module is not None else None
        if type(module) is not kind or _does_more(module):
            return path
    return None


def _does_more(module: Any) -> bool:
    if not is_hooked(module):
        return False
    # transformers' own hooks collect what was asked for, which of inner modules is refused
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
    return "forward" in module.__dict__ or any(_home(hook) != "transformers" for hook in hooks)


def read_by_hooks(hooks: Mapping[int, Any]) -> bool:
    """Whether somebody's own hook is among them, which would meet packed tokens."""
    return any(_home(hook) not in _WRAPPERS for hook in hooks.values())


def _home(hook: Any) -> str:
    # of a functools.partial, what it calls
    hook = getattr(hook, "func", hook)
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).partition(".")[0]
