"""Attention scores as sums over pairs of components."""

from typing import TYPE_CHECKING

from qkattr.lazy import offer

if TYPE_CHECKING:
    from qkattr.qk.distance import Profile, distance_profile
    from qkattr.qk.effects import PairEffects, pair_effects
    from qkattr.qk.marginals import Marginals, block_marginals
    from qkattr.qk.mechanisms import Mechanisms, decompose_terms
    from qkattr.qk.pairs import Strongest, TopPairs, search_slots, strongest, top_pairs
    from qkattr.qk.terms import (
        QKTerms,
        every_query_component,
        key_components,
        qk_terms,
        qk_terms_many,
        query_components,
    )
    from qkattr.qk.weights import HeadScales, weight_pairs
    from qkattr.qk.why import Competition, competition

offer(
    globals(),
    distance="Profile distance_profile",
    effects="PairEffects pair_effects",
    marginals="Marginals block_marginals",
    mechanisms="Mechanisms decompose_terms",
    pairs="Strongest TopPairs search_slots strongest top_pairs",
    terms="QKTerms every_query_component key_components qk_terms qk_terms_many query_components",
    weights="HeadScales weight_pairs",
    why="Competition competition",
)
