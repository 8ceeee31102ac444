"""The whole account of a prompt's targets: every component's effect, and every head's.

    found = qkattr.effects(result)                      or qkattr.effects(subject)
    found.top(10, boundary=24)                          components of a boundary, by |effect|
    found.to_pandas("account" | "nodes")

Nothing is pruned: at every boundary the effects of all components and the constants above add up to
the target (`graph.effects`). A trace keeps those of the graph's nodes and the heads' strongest
places; this is for asking after the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qkattr.analyses.targets import Asked, Targets, targets_of
from qkattr.errors import InputError
from qkattr.extras import need
from qkattr.graph.accounts import ACCOUNT_COLUMNS
from qkattr.kinds import Kind, Labels
from qkattr.options import TraceOptions, make_options
from qkattr.result import Traced
from qkattr.subject import HasSubject, Subject, enter

#: What `effects` takes of the options of `trace`.
OPTIONS = ("target", "contrast", "score", "linearisation", "max_logits", "logit_mass")
#: Numbers in the arrays of all heads and positions, at most: 2 GiB of each.
MOST = 2**29


@dataclasses.dataclass(frozen=True, repr=False)
class TargetEffects:
    """Effects on P targets, on the host, without padding.

    tokens: of the prompt. targets: in words; value: `[P]`; boundary, position: `[P]` where each
    reads the residual stream. account: `[P, L+1, X]` by `kinds`, adding up to the value at every
    boundary up to the target's own. effect: `[P, L+1, T, C]` of every component; kind, index:
    `[L+1, T, C]` what it is. constant: `[P, L+1, T]` of what blocks add that comes from no
    component.
    head, derivative: `[P, L, N, T, S]` of every head from the key s to the query t, and of the
    target with respect to the score; None unless `heads` was asked for.
    """

    tokens: list[str]
    targets: list[str]
    value: np.ndarray
    boundary: np.ndarray
    position: np.ndarray
    account: np.ndarray
    effect: np.ndarray
    kind: np.ndarray
    index: np.ndarray
    constant: np.ndarray
    labels: Labels
    head: np.ndarray | None = None
    derivative: np.ndarray | None = None
    kinds: tuple[str, ...] = ACCOUNT_COLUMNS

    def __repr__(self) -> str:
        said = ", ".join(
            f"{name} {v:+.4g}" for name, v in zip(self.targets, self.value, strict=True)
        )
        return f"<TargetEffects on {said}>"

    def top(
        self, n: int = 20, *, boundary: int | None = None, target: int = 0
    ) -> list[dict[str, Any]]:
        """Components by falling |effect| on one target, of one boundary or of all."""
        at = slice(None) if boundary is None else slice(boundary, boundary + 1)
        effect = np.where(self.kind[at] == Kind.NONE, 0.0, self.effect[target, at])
        order = np.argsort(-np.abs(effect), axis=None, kind="stable")[:n]
        first = 0 if boundary is None else boundary
        rows = []
        for b, t, c in zip(*np.unravel_index(order, effect.shape), strict=True):
            kind, index = Kind(self.kind[at][b, t, c]), int(self.index[at][b, t, c])
            rows.append(
                dict(
                    boundary=int(b) + first,
                    position=int(t),
                    token=self.tokens[t],
                    kind=kind.label,
                    index=index if index >= 0 else None,
                    label=self.labels.get((int(b) + first, index), ""),
                    effect=float(effect[b, t, c]),
                )
            )
        return [row for row in rows if row["effect"] != 0]

    def to_pandas(self, table: str = "account"):
        """A DataFrame: "account" (one row a target and boundary) or "nodes" (one row a component
        with an effect on any target, one column a target).

        Raises:
          InputError: there is no such table, or pandas is not installed.
        """
        tables = dict(account=self._account, nodes=self._nodes)
        if table not in tables:
            raise InputError(f"no table {table!r}; expected one of {', '.join(tables)}")
        return need("pandas", "to_pandas needs").DataFrame(tables[table]())

    def _account(self) -> dict[str, Any]:
        target, boundary = np.nonzero(np.arange(self.account.shape[1]) <= self.boundary[:, None])
        columns = dict(
            zip(self.kinds, np.moveaxis(self.account[target, boundary], -1, 0), strict=True)
        )
        names = [self.targets[p] for p in target]
        return dict(target=names, value=self.value[target], boundary=boundary, **columns)

    def _nodes(self) -> dict[str, Any]:
        at = np.nonzero((self.kind != Kind.NONE) & (self.effect != 0).any(0))
        effects = {f"effect {p}" if p else "effect": one[at] for p, one in enumerate(self.effect)}
        kinds = [Kind(k).label for k in self.kind[at]]
        return dict(boundary=at[0], position=at[1], kind=kinds, index=self.index[at], **effects)


def effects(subject: HasSubject, *, heads: bool = False, **options: Any) -> TargetEffects:
    """Account for all targets of a trace (DESIGN: effects).

    Args:
      subject: a result, whose targets these are; or a subject, whose targets are those that `trace`
        would have.
      heads: also the effects of every head between every two positions, and the derivatives with
        respect to all scores.
      **options: of a subject's targets, those of `trace` named in `OPTIONS`.

    Raises:
      InputError: an option cannot be used, the result has no model, or the heads' arrays would be
        too large.
    """
    start = _targets(subject, options)
    subject = start.subject
    if heads:
        _check_size(subject, len(start))
    subject.begin("effects")
    found = start.effects(heads=heads)
    kind, index, _ = subject.slots
    T, P = len(subject.ids), len(start)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([np.swapaxes(getattr(one, name), 0, 1) for one in found])[:P]

    return TargetEffects(
        tokens=subject.tokens,
        targets=start.names,
        value=np.concatenate([one.value for one in found])[:P],
        boundary=np.array(start.direct.boundary),
        position=np.array(start.direct.position),
        account=joined("account"),
        effect=joined("node")[:, :, :T],
        kind=kind[:, :T],
        index=index[:, :T],
        constant=joined("constant")[..., :T],
        labels=subject.labels,
        head=joined("head")[..., :T, :T] if heads else None,
        derivative=joined("derivative")[..., :T, :T] if heads else None,
    )


def _targets(asked: HasSubject, options: dict[str, Any]) -> Targets:
    subject = enter(asked)
    if isinstance(asked, Traced):
        for name in options:
            raise InputError(f"a result has its targets; leave {name} out, or give a subject")
        return targets_of(asked, subject)
    for name in options:
        if name not in OPTIONS:
            raise InputError(
                f"option {name!r} is not one of effects; its options are {', '.join(OPTIONS)}"
            )
    opts = make_options(TraceOptions, options | vars(subject.options))
    question = Asked.of(subject, opts)
    return question.targets(subject, opts, question.predictions(subject, opts))


def _check_size(subject: Subject, n_targets: int) -> None:
    n_blocks, n_heads = subject.bundle.config.head_grid
    T = subject.boundaries.shape[1]
    numbers = n_blocks * n_heads * n_targets * T * T
    if numbers > MOST:
        raise InputError(
            f"the effects of all heads are {numbers:,} numbers for {n_targets} targets and "
            f"{len(subject.ids)} tokens, more than {MOST:,}; ask with heads=False, or take the "
            f"strongest places from Result.head_effects"
        )
