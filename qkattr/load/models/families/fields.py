"""A `config.json` as it is being read: an attribute is used, known to change nothing, or refused.

An attribute that is passed over in silence is a model that computes something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from qkattr.errors import InputError
from qkattr.load.models.families import attributes

#: The same attribute under the name of another family.
_SAME = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "n_vocab": "vocab_size",
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
}
#: A rate at which training drops something; its name says so in every library.
_DROPOUT = re.compile(r".*(dropout|_pdrop).*")


class Fields:
    """What is left of a config once its reader has taken what it needs.

    An attribute that is absent (null is not absent) has the default of `transformers`, see
    `attributes`. aliases: the family's names for attributes that others call differently. accept:
    attributes that are passed over at any value.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        aliases: Mapping[str, str] | None = None,
        accept: Collection[str] = (),
    ):
        self.raw, self.family = raw, raw.get("model_type")
        self.left = {**attributes.defaults(self.family), **raw}
        del self.left["model_type"]
        self.aliases, self.accept = aliases or {}, accept
        self.taken: dict[str, Any] = {}

    def pop(self, name: str) -> Any:
        """An attribute as it is; None where it is absent."""
        self.taken[name] = self.left.pop(self.aliases.get(name, name), None)
        return self.taken[name]

    def take(self, name: str, kind: type, default: Any = ...) -> Any:
        """An attribute of the given type; the default where it is absent or null."""
        value = self.pop(name)
        name = self.aliases.get(name, name)
        if value is None:
            if default is ...:
                raise InputError(
                    f"config.json has no {name}; it is not a complete {self.family} config"
                )
            return default
        if kind is float and type(value) is int:
            value = as_float(value)
        if type(value) is not kind:
            raise InputError(
                f"config.json: {name} should be {kind.__name__}, got {value!r:.60}; "
                f"restore the model's own config.json"
            )
        return value

    def size(self, name: str, default: Any = ..., most: int = 2**24) -> int:
        """A whole number from 1 to `most`."""
        value = self.take(name, int, default)
        if not 1 <= value <= most:
            raise InputError(
                f"config.json: {self.aliases.get(name, name)} should lie in 1..{most}, got "
                f"{value!r:.40}; restore the model's own config"
            )
        return value

    def positive(self, name: str, default: Any = ...) -> Any:
        """A positive, finite number."""
        value = self.take(name, float, default)
        if value is not None:
            check_positive(self.aliases.get(name, name), value)
        return value

    def refuse_the_rest(self) -> None:
        """Raise `InputError` for what is left and not known to change nothing."""
        fixed, inert = attributes.fixed(self.family), attributes.inert(self.family)
        for name in sorted(set(self.left) & set(fixed) - set(self.accept)):
            if self.left[name] not in fixed[name]:
                raise InputError(
                    f"config.json: {name} is {self.left[name]!r:.40}, which qkattr does not "
                    f"implement for {self.family} models; --accept {name} goes on as if it were not"
                )
        known = {*fixed, *inert, *self.accept}
        unknown = sorted(n for n in set(self.left) - known if not self._changes_nothing(n))
        if unknown:
            raise InputError(
                f"config.json has {', '.join(f'{n}={self.left[n]!r:.40}' for n in unknown)}, which "
                f"qkattr does not know; if you know that it changes nothing that the model "
                f"computes, go on with --accept {unknown[0]} (accept=[{unknown[0]!r}])"
            )

    def _changes_nothing(self, name: str) -> bool:
        """Of an attribute that no list has: it is null, a dropout rate, or says once more what the
        config says under the family's own name."""
        value, names = self.left[name], {ours: name for name, ours in self.aliases.items()}
        if value is None or (_DROPOUT.fullmatch(name) and isinstance(value, int | float)):
            return True
        same = names.get(name, _SAME.get(name, name))
        return same in self.taken and self.taken[same] == value


def as_float(value: int | float) -> float:
    """A number of a JSON file as a float; infinite where it has more digits than a float holds."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_positive(name: str, value: float) -> float:
    """The value, if it is a positive and finite number that float32 holds."""
    if not 1e-30 < value < 1e30:
        raise InputError(
            f"config.json: {name} should be a positive number, got {value!r}; "
            f"restore the model's own config"
        )
    return value
