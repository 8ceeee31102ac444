"""What turns a residual stream into vectors, and gives covectors back."""

from typing import TYPE_CHECKING

from qkattr.lazy import offer

if TYPE_CHECKING:
    from qkattr.sources.components import (
        Components,
        ComponentStack,
        assemble,
        decompose,
        find_slots,
        sink_positions,
    )
    from qkattr.sources.dictionary import (
        Dictionary,
        DictionaryConfig,
        Encoding,
        activations,
        encode,
        reconstruct,
    )
    from qkattr.sources.prompt import decompose_prompt

offer(
    globals(),
    components="ComponentStack Components assemble decompose find_slots sink_positions",
    dictionary="Dictionary DictionaryConfig Encoding activations encode reconstruct",
    prompt="decompose_prompt",
)
