"""Which heads to edit, and which components in them.

Heads: by their effect on the target, by another ranking, or greedily. Features: the strongest QK
marginals of those heads there. On the key side a marginal is exactly what the score loses without
the component; on the query side a component speaks to all keys at once, and what it does to the
pattern is its contrast: there the contrast ranks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from qkattr.analyses.heads import heads_at
from qkattr.analyses.places import terms_at
from qkattr.errors import InputError, one_of, quoted
from qkattr.experiments.edits import SIDES, Edit, Head, check_heads, parse_heads
from qkattr.experiments.hydra import greedy_heads
from qkattr.kinds import Group, Kind
from qkattr.positions import find_position
from qkattr.result import Traced, measured, ranked_heads
from qkattr.subject import HasSubject, Subject, enter

#: What `heads_between` can rank by. By "effect" the first n, removed together, lower the prediction
#: most (docs/faithfulness.md).
RANKINGS = ("effect", "masking", "influence", "loading", "attention")


#: Heads that greedy choice tries: the first of the ranking, as a share of all.
CANDIDATES = "10%"


def choose_edits(
    traced: Traced,
    asked: HasSubject,
    *,
    source: int | str,
    target: int | str,
    heads: str | int | Sequence[Head] = "5%",
    side: str = "key",
    features: int = 4,
    group: Group | None = None,
    by: str = "effect",
) -> list[Edit]:
    """Edits for `steer`: heads that look from one position at another, and in them the features
    with the largest QK marginals there, or a group of features.

    Args:
      traced, asked: what was traced, and its prompt with its model.
      source, target: positions; the heads look from the target (query) at the source (key).
      heads: how many (12), or a share of all of the model's ("5%"), by `by`; "greedy:8", those
        of the first 10 % that lower the prediction most, one by one; or heads, as pairs
        or as "23.2,23.7".
      side: "key" edits what is read at the source, "query" at the target.
      features: how many in each block.
      group: features by boundary (see `qkattr.labels.groups`) instead.
      by: rank heads by "effect" (those that work for the target), "masking", "influence",
        "loading" or "attention"; see `heads_between`.

    Raises:
      InputError: a position, head, number or side cannot be used; nothing was carried between the
        two positions; or none of the features is active there.
    """
    subject = enter(asked)
    shape = subject.bundle.config.head_grid
    key, query = check_choice(
        traced.tokens, shape, source=source, target=target, heads=heads, side=side,
        features=features, by=by,
    )  # fmt: skip

    def edits_in(chosen: Sequence[Head]) -> list[Edit]:
        if group is not None:
            at = key if side == "key" else query
            return features_named(subject, chosen, position=at, side=side, features=group)
        found = features_by_marginal(subject, chosen, query=query, key=key, side=side, n=features)
        if not found:
            raise InputError(
                f"no feature at position {key if side == 'key' else query} speaks for looking from "
                f"{query} at {key} in these heads; choose other positions or heads"
            )
        return found

    named, n, greedy = asked_heads(heads, shape)
    if named:
        return edits_in(named)
    ranked = heads_between(traced, subject, source=key, target=query, by=by)
    if not ranked:
        raise InputError(
            f"no edge of the graph leads from position {key} to {query}; choose other positions"
            if by in ("influence", "loading")
            else f"no head works for the target, by {by}, as it looks from position {query} at "
            f"{key}; choose other positions or another ranking"
        )
    if greedy:
        candidates = ranked[: max(n, how_many(CANDIDATES, math.prod(shape)))]
        return edits_in(greedy_heads(subject, candidates, edits_in(candidates), n=n))
    return edits_in(ranked[:n])


def check_choice(
    tokens: list[str],
    shape: tuple[int, int],
    *,
    source: int | str,
    target: int | str,
    heads: str | int | Sequence[Head],
    side: str,
    features: int,
    by: str,
) -> tuple[int, int]:
    """The positions of source and target, when all that `choose_edits` is asked fits the prompt's
    tokens and the model's blocks and heads.

    Raises:
      InputError: something does not fit.
    """
    one_of("side", side, SIDES[:2])
    one_of("by", by, RANKINGS)
    if features < 1:
        raise InputError(
            f"features should be at least 1, got {features}; give the number of "
            "features to edit in each block"
        )
    asked_heads(heads, shape)
    key, query = (find_position(tokens, where) for where in (source, target))
    if key > query:
        raise InputError(
            f"the source at {key} comes after the target at {query}; attention is causal, give "
            f"the earlier position as the source"
        )
    return key, query


def asked_heads(
    heads: str | int | Sequence[Head], shape: tuple[int, int]
) -> tuple[list[Head], int, bool]:
    """The heads that are named; or none, how many to choose, and whether greedily.

    Raises:
      InputError: the model does not have them, or it is no number of heads.
    """
    text = str(heads).strip()
    if isinstance(heads, str | int) and ("." not in text or text.endswith("%")):
        greedy = text.startswith("greedy:")
        return [], how_many(text.removeprefix("greedy:"), math.prod(shape)), greedy
    named = list(parse_heads(text) if isinstance(heads, str | int) else heads)
    if not named:
        raise InputError("there are no heads to edit; give at least one")
    check_heads(named, shape)
    return named, len(named), False


def heads_between(
    traced: Traced, asked: HasSubject, *, source: int | str, target: int | str, by: str = "effect"
) -> list[Head]:
    """The heads that look from the target at the source, the strongest first.

    by: "effect" or "masking", those that work for the main target; "influence", the share of the
    targets' influence that flowed through the head there; "loading", the |sum| of its loadings on
    edges into features; or "attention".
    """
    one_of("by", by, RANKINGS)
    if by in ("influence", "loading"):
        into = "feature" if by == "loading" else None
        found = traced.head_loadings(source=source, target=target, into=into)
        value = np.abs(found.loadings if by == "loading" else found.influence)
        return ranked_heads(value, int(np.count_nonzero(value)))
    ends = dict(query=traced.position(target), key=traced.position(source))
    rows = sorted(heads_at(traced, asked, **ends), key=lambda row: -measured(row, by))
    return [(row["layer"], row["head"]) for row in rows if measured(row, by) > 0]


def how_many(asked: str | int | float, n_heads: int) -> int:
    """A number of heads from a number, or from a share of all heads as in "5%".

    Raises:
      InputError: it is neither, or comes to none.
    """
    text = str(asked).strip()
    try:
        n = (
            math.ceil(float(text.removesuffix("%")) * n_heads / 100)
            if text.endswith("%")
            else int(text)
        )
    except (ValueError, OverflowError) as e:
        raise InputError(
            f"{quoted(text)} is not a number of heads; give a number, as in 12, or a "
            "share, as in 5%"
        ) from e
    if not 1 <= n <= n_heads:
        raise InputError(
            f"{quoted(text)} of the model's {n_heads} heads comes to {n}; give 1 to {n_heads}"
        )
    return n


def marginals(
    subject: Subject, heads: Sequence[Head], query: int, key: int, side: str
) -> dict[Head, dict[int, float]]:
    """Each head's QK marginals of the features on one side: by slot of that side's position.

    side: "key", values; "query", contrasts.
    """
    terms = terms_at(subject, [(*head, query, key) for head in heads])
    value, kind = (
        (terms.terms.sum(-2), terms.key_kind)
        if side == "key"
        else (terms.query_contrast, terms.query_kind)
    )
    return {
        head: {int(c): float(value[i, c]) for c in np.flatnonzero(kind[i] == Kind.FEATURE)}
        for i, head in enumerate(heads)
    }


def features_by_marginal(
    subject: Subject, heads: Sequence[Head], *, query: int, key: int, side: str, n: int
) -> list[Edit]:
    """Edits of the n features of each block that speak most for looking at the key, summed over
    the chosen heads of the block; each is edited in all of them."""
    position = key if side == "key" else query
    found, edits = marginals(subject, heads, query, key, side), []
    by_block: dict[int, list[Head]] = defaultdict(list)
    for head in heads:
        by_block[head[0]].append(head)
    index = np.asarray(subject.components.index[:, position])
    for block, chosen in sorted(by_block.items()):
        total: dict[int, float] = defaultdict(float)
        for head in chosen:
            for slot, value in found[head].items():
                total[slot] += value
        best = sorted(total, key=lambda slot: -total[slot])[:n]
        edits += [
            Edit(block, int(index[block, slot]), position, side, tuple(chosen))
            for slot in best
            if total[slot] > 0
        ]
    return edits


def features_named(
    subject: Subject,
    heads: Sequence[Head],
    *,
    position: int,
    side: str,
    features: Mapping[int, Sequence[int]],
) -> list[Edit]:
    """Edits of those of some features, by boundary, that are active at a position, in the heads of
    their block.

    Raises:
      InputError: none of them is active where one of the heads reads.
    """
    kind, index = (
        np.asarray(a[:, position]) for a in (subject.components.kind, subject.components.index)
    )
    edits = []
    for block in sorted({head[0] for head in heads}):
        active = set(index[block, kind[block] == Kind.FEATURE].tolist())
        mates = tuple(head for head in heads if head[0] == block)
        edits += [
            Edit(block, feature, position, side, mates)
            for feature in features.get(block, ())
            if feature in active
        ]
    if not edits:
        blocks = sorted({head[0] for head in heads})
        raise InputError(
            f"none of the group's features is active at position {position} in blocks "
            f"{', '.join(map(str, blocks))}; give features of these boundaries, or other heads"
        )
    return edits
