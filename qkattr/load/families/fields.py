"""A `config.json` as it is being read: an attribute is used, known to change nothing, or refused.

An attribute that is passed over in silence is a model that computes something else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from qkattr.errors import InputError

# Attributes that change nothing a forward pass computes, in any family.
_INERT = frozenset(
    """architectures attention_dropout bos_token_id eos_token_id pad_token_id unk_token_id
    sep_token_id decoder_start_token_id initializer_range torch_dtype dtype transformers_version
    use_cache _name_or_path name_or_path _attn_implementation _attn_implementation_autoset
    attn_implementation auto_map tokenizer_class task_specific_params problem_type id2label
    label2id num_labels finetuning_task return_dict output_attentions output_hidden_states
    transformers.js_config is_llama_config unsloth_version unsloth_fixed max_window_layers
    temperature top_p top_k typical_p repetition_penalty length_penalty num_beams do_sample
    max_length min_length chunk_size_feed_forward is_decoder is_encoder_decoder
    cross_attention_hidden_size tie_encoder_decoder prefix model_max_length
    gradient_checkpointing cache_implementation""".split()
)

# Attributes that are handled only at the one value at which they do nothing.
_FIXED = {
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "add_cross_attention": (False, None),
}


class Fields:
    """What is left of a config once its reader has taken what it needs.

    defaults: what the family's own code assumes for an attribute that is absent (null is not
    absent). aliases: the family's names for attributes that others call differently.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
        accept: Collection[str] = (),
    ):
        self.left = {**(defaults or {}), **raw}
        self.family = self.left.pop("model_type", None)
        self.aliases = aliases or {}
        self.accept = accept

    def pop(self, name: str) -> Any:
        """An attribute as it is; None where it is absent."""
        return self.left.pop(self.aliases.get(name, name), None)

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

    def refuse_the_rest(
        self, *, inert: frozenset[str] = frozenset(), fixed: Mapping[str, tuple] | None = None
    ) -> None:
        """Raise `InputError` for what is left and not known to change nothing.

        inert, fixed: more of them, of this family.
        """
        for name, allowed in (_FIXED | dict(fixed or {})).items():
            if name in self.left and self.left.pop(name) not in allowed:
                raise InputError(
                    f"config.json: {name} is set and qkattr does not implement it "
                    f"for {self.family} models"
                )
        unknown = sorted(set(self.left) - _INERT - inert)
        if unknown:
            raise InputError(
                f"config.json has {', '.join(f'{n}={self.left[n]!r:.40}' for n in unknown)}, "
                f"which qkattr does not know; "
                f"remove it if it changes nothing that the model computes"
            )


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
