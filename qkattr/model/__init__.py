"""The transformer: one forward pass, and the same block with its non-linearities frozen."""

from typing import TYPE_CHECKING

from qkattr.lazy import offer

if TYPE_CHECKING:
    from qkattr.model.edits import (
        BlockEdits,
        Edits,
        PatternEdits,
        ReadEdits,
        ResidualEdits,
        batched_axes,
    )
    from qkattr.model.linear import (
        FrozenBlock,
        Pulled,
        PulledStream,
        constant,
        freeze,
        head_loadings,
        head_reads,
        pull,
        pull_stream,
        push,
        values,
    )
    from qkattr.model.transformer import block, embed, forward, residual_stream, run_from, unembed

offer(
    globals(),
    edits="BlockEdits Edits PatternEdits ReadEdits ResidualEdits batched_axes",
    linear="FrozenBlock Pulled PulledStream constant freeze head_loadings head_reads "
    "pull pull_stream push values",
    transformer="block embed forward residual_stream run_from unembed",
)
