"""What the configs of all families have in common: sizes, activation, rotary, windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qkattr.config import Rotary
from qkattr.errors import InputError
from qkattr.kinds import NO_WINDOW
from qkattr.load.models.families.fields import Fields, as_float, check_positive

# Activations by their names in Hugging Face configs; the values are keys of `layers.ACTIVATIONS`.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

#: More blocks than any model has; a config that asks for more is refused before anything is made.
MOST_BLOCKS = 4096


def read_sizes(
    fields: Fields, *, grouped: bool = True, widened: int | None = None
) -> dict[str, Any]:
    """The arguments of `ModelConfig` that every family has.

    grouped: the family may have fewer key/value heads than query heads. widened: the MLP's width is
    so many times d_model where the config does not say; None: it must.
    """
    d_model, n_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    n_kv_heads = fields.size("num_key_value_heads", n_heads) if grouped else n_heads
    if n_heads % n_kv_heads:
        raise InputError(
            f"config.json: {n_heads} heads over {n_kv_heads} key/value heads: "
            f"the first must be a multiple of the second; restore the model's own config"
        )
    return dict(
        family=fields.family,
        n_blocks=fields.size("num_hidden_layers", most=MOST_BLOCKS),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=fields.size("head_dim", d_model // n_heads) if grouped else d_model // n_heads,
        d_mlp=fields.size("intermediate_size", ... if widened is None else widened * d_model),
        vocab=fields.size("vocab_size"),
        context=fields.size("max_position_embeddings"),
        tied=fields.take("tie_word_embeddings", bool, False),
    )


def read_activation(fields: Fields, name: str = "hidden_act") -> str:
    """The MLP's activation, a key of `layers.ACTIVATIONS`."""
    found = fields.take(name, str)
    if found not in _ACTIVATIONS:
        raise InputError(
            f"config.json: {name} {found!r:.40} is not implemented; "
            f"known are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[found]


def read_rotary(fields: Fields, head_dim: int, context: int, *, partial: bool = False) -> Rotary:
    """Either spelling: rope_theta with rope_scaling, or rope_parameters (transformers 5).

    partial: the family turns `partial_rotary_factor` of each head; elsewhere it must be 1.
    """
    theta = fields.positive("rope_theta", 10000.0)
    share = fields.positive("partial_rotary_factor", 1.0) if partial else 1.0
    rope = dict(rope_theta=theta, partial_rotary_factor=share) | read_rope(fields)
    return make_rotary(rope, head_dim, context, partial=partial)


def read_rope(fields: Fields) -> dict[str, Any]:
    """The rotary parameters that stand in an object of their own."""
    old = fields.take("rope_scaling", dict, None)
    new = fields.take("rope_parameters", dict, None)
    if old and new and old != new:
        raise InputError(
            "config.json has both rope_scaling and rope_parameters, and they differ; "
            "restore the model's own config"
        )
    return dict(new or old or {})


def make_rotary(
    rope: dict[str, Any], head_dim: int, context: int, *, partial: bool = False
) -> Rotary:
    """The rotary embedding of an object of parameters, all of which must be known."""
    rope = dict(rope)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    share = _number(rope, "partial_rotary_factor", 1.0)
    if share > 1 or (share < 1 and not partial):
        raise InputError(
            f"config.json: partial_rotary_factor {share} is not implemented for this family"
        )
    dims = int(head_dim * share)
    if 2 * ((dims + 1) // 2) > head_dim:
        raise InputError(
            f"config.json: heads of {head_dim} dimensions cannot be turned in pairs; "
            f"the size must be even"
        )
    base, linear, llama3 = _number(rope, "rope_theta", 10000.0), 1.0, None
    if kind == "linear":
        linear = _number(rope, "factor")
    elif kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (_number(rope, key) for key in keys)
        original = _number(rope, "original_max_position_embeddings", context)
        llama3 = (factor, low, high, int(original))
    elif kind != "default":
        raise InputError(
            f"config.json: rope type {kind!r:.40} is not implemented; "
            f"known are default, linear and llama3"
        )
    if rope:
        raise InputError(
            f"config.json: rope parameters {', '.join(sorted(rope))} are not known for rope type "
            f"{kind!r}; restore the model's own config"
        )
    return Rotary(base=base, dims=dims, linear=linear, llama3=llama3)


def _number(rope: dict[str, Any], key: str, default: float | None = None) -> float:
    value = rope.pop(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(
            f"config.json: the rope parameter {key} should be a number, got {value!r:.40}; "
            f"restore the model's own config"
        )
    return check_positive(f"the rope parameter {key}", as_float(value))


def read_windows(fields: Fields, n_blocks: int, sliding: Callable[[int], bool]) -> tuple[int, ...]:
    """Each block's window, from `layer_types` where it is given, else by the family's rule.

    sliding: the rule: whether block b has a window.
    """
    window = fields.size("sliding_window", NO_WINDOW, NO_WINDOW)
    types = fields.take("layer_types", list, None)
    if types is None:
        return tuple(window if sliding(b) else NO_WINDOW for b in range(n_blocks))
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(
                f"config.json: layer_types holds {kind!r:.40}; qkattr implements full_attention "
                f"and sliding_attention, blocks of another kind have no QK score that it knows"
            )
    if len(types) != n_blocks:
        raise InputError(
            f"config.json: layer_types has {len(types)} entries for {n_blocks} blocks; "
            f"restore the model's own config"
        )
    if window == NO_WINDOW and "sliding_attention" in types:
        raise InputError(
            "config.json: layer_types holds sliding_attention, and there is no sliding_window; "
            "restore the model's own config"
        )
    return tuple(window if kind == "sliding_attention" else NO_WINDOW for kind in types)
