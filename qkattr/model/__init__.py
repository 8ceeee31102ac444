"""The transformer: one forward pass, and the same block with its non-linearities frozen."""
