"""What a rule may look at: views of a corpus, each an id at every position.

A rule is a view and a few of its ids, and holds where the view shows one of them: "the word 'aunt'
or 'uncle'" is the view of words with two ids. Id 0 stands for nothing to see and is in no rule. A
view looks at the token of its position and those before it, never at what comes after, but for the
one of next tokens, which is only used with a feature's own top logits ("says").
Axes: P positions of the corpus (rows * T), U distinct tokens, J ids that a position shows at once.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from qkattr.characters import joined
from qkattr.errors import quoted

#: How far back "shortly after" looks.
NEAR = 16

CLASSES = (
    "",
    "numbers",
    "capitalised words",
    "words in capitals",
    "lower-case words",
    "word pieces",
    "punctuation",
    "line breaks",
    "spaces",
    "other characters",
)
_CLASS_PATTERNS = (
    (1, re.compile(r"\s*\d[\d.,]*")),
    (3, re.compile(r"\s*[^\W\d_]{2,}")),
    (2, re.compile(r"\s*[^\W\d_]+")),
    (7, re.compile(r"\s*\n\s*")),
    (8, re.compile(r"\s+")),
    (6, re.compile(r"[\s!-/:-@\[-`{-~“”‘’—–…]+")),
)


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """ids: `[P, J]`. phrase: what to call a rule of some ids. most: ids a rule may have. cost: how
    much AUC it must win over a simpler view. group: of each id; a rule stays within one group.
    says: ids are next tokens, and only those among a feature's top logits may be used. near: ids
    are those of the J positions before."""

    ids: Int[np.ndarray, "P J"]
    phrase: Callable[[Sequence[int]], str]
    most: int = 4
    cost: float = 0.0
    group: Int[np.ndarray, "I"] | None = None
    says: bool = False
    near: bool = False
    n_ids: int = 0

    def base(self, keep: Bool[np.ndarray, "n T"]) -> Int[np.ndarray, "I"]:
        """At how many of the positions to keep each id is shown."""
        if not self.near:
            return np.bincount(self.ids[keep.ravel(), 0], minlength=self.n_ids)
        return _near_counts(self.ids[:, 0], keep, self.n_ids)


def _near_counts(word: np.ndarray, keep: np.ndarray, n_ids: int) -> np.ndarray:
    """At how many positions to keep each word is among the NEAR before: each occurrence answers for
    the positions after it, up to the next occurrence, the row's end, or NEAR of them."""
    n, T = keep.shape
    order = np.lexsort((np.arange(n * T), word))
    last = order // T * T + T - 1
    end = np.minimum(order + NEAR, last)
    same = word[order[1:]] == word[order[:-1]]
    end[:-1] = np.where(same, np.minimum(end[:-1], order[1:]), end[:-1])
    kept = np.concatenate([[0], np.cumsum(keep.ravel())])
    counts = kept[end + 1] - kept[order + 1]
    return np.bincount(word[order], weights=counts, minlength=n_ids).astype(np.int64)


def views_of(rows: Int[np.ndarray, "n T"], texts: Mapping[int, str]) -> list[View]:
    """All views of a corpus, the simplest first. texts: of every token of the rows."""
    used, token = np.unique(rows, return_inverse=True)
    token = token.reshape(rows.shape)
    said = [texts[int(u)] for u in used]
    names, word_of = _named([_word(text) for text in said])
    kinds = np.array([_class(text) for text in said])
    endings, ending_of = _named([_ending(text) for text in said])
    word, kind = word_of[token], kinds[token]
    before = _shifted(word, 1)
    pairs, pair = _joined(_shifted(word, 2), before)
    ends, phrase = _joined(before, word)
    classed, class_after = _joined(kind, before)

    def words(ids: Sequence[int]) -> str:
        return " / ".join(quoted(names[i], 24) for i in ids)

    def two(table: np.ndarray, ids: Sequence[int]) -> str:
        return " / ".join(quoted(_phrase(*(names[j] for j in table[i])), 40) for i in ids)

    def tokens(ids: Sequence[int]) -> str:
        return " / ".join(quoted(said[i - 1], 24) for i in ids)

    def after_class(ids: Sequence[int]) -> str:
        said_after = words([classed[i, 1] for i in ids])
        return f"{CLASSES[classed[ids[0], 0]]} after {said_after}"

    def view(ids, phrase, n_ids, **options) -> View:
        return View(ids.reshape(-1, 1).astype(np.int32), phrase, n_ids=n_ids, **options)

    n_words, n_used = len(names), len(used) + 1
    return [
        view(word, lambda ids: f"the word {words(ids)}", n_words),
        view(token + 1, lambda ids: f"the token {tokens(ids)}", n_used, cost=0.005),
        view(kind, lambda ids: " / ".join(CLASSES[i] for i in ids), len(CLASSES), most=2),
        view(before, lambda ids: f"after {words(ids)}", n_words, cost=0.01),
        view(ending_of[token], functools.partial(_endings, endings), len(endings), cost=0.01),
        view(phrase, lambda ids: f"the end of {two(ends, ids)}", len(ends), cost=0.015),
        view(pair, lambda ids: f"after {two(pairs, ids)}", len(pairs), cost=0.015),
        view(class_after, after_class, len(classed), cost=0.015, group=classed[:, 0]),
        view(
            np.pad(token[:, 1:] + 1, ((0, 0), (0, 1))),
            lambda ids: f"says {tokens(ids)}", n_used, cost=0.01, says=True,
        ),
        *(
            view(shown, lambda ids, name=name: name, 2, cost=0.01)
            for name, shown in _flags(rows, said, token)
        ),
        _near_view(word, n_words, lambda ids: f"shortly after {words(ids)}"),
    ]  # fmt: skip


def _near_view(word: np.ndarray, n_words: int, phrase) -> View:
    """Words among the NEAR positions before. The first column is the word of the position itself;
    `base` counts from it."""
    back = np.stack([_shifted(word, d).ravel() for d in range(NEAR + 1)], axis=1)
    return View(back.astype(np.int32), phrase, most=1, cost=0.02, near=True, n_ids=n_words)


def _shifted(x: np.ndarray, by: int) -> np.ndarray:
    """What was `by` positions before; 0 where the row had not begun."""
    return np.pad(x, ((0, 0), (by, 0)))[:, : x.shape[1]] if by else x


def _named(texts: list[str]) -> tuple[list[str], np.ndarray]:
    """Distinct texts (after "", which is id 0), and the id of each."""
    ids = {"": 0}
    of = np.array([ids.setdefault(text, len(ids)) for text in texts])
    return list(ids), of


def _joined(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of ids that occur as ids: the pairs `[I, 2]`, and which each position shows (0: one of
    the two is nothing)."""
    n = int(b.max()) + 1
    key = np.where((a > 0) & (b > 0), a.astype(np.int64) * n + b, 0)
    distinct, of = np.unique(np.append(key.ravel(), 0), return_inverse=True)
    return np.stack([distinct // n, distinct % n], axis=1), of[:-1].reshape(a.shape)


def _phrase(first: str, second: str) -> str:
    """Two words; or the two parts of a character, as it is."""
    text = joined([first, second])
    return f"{first} {second}" if text == first + second else text


def _word(text: str) -> str:
    """The word of a token, whatever its case and the space before it."""
    return text.strip().casefold() or text


def _ending(text: str) -> str:
    word = text.strip()
    return word[-3:].casefold() if len(word) >= 5 and word.isalpha() else ""


def _endings(names: list[str], ids: Sequence[int]) -> str:
    return "words ending in " + " / ".join(quoted("-" + names[i], 24) for i in ids)


def _class(text: str) -> int:
    word = text.strip()
    for kind, pattern in _CLASS_PATTERNS:
        if not pattern.fullmatch(text):
            continue
        if kind == 3 and not word.isupper():
            continue
        if kind == 2 and not word[0].isupper():
            return 4 if text[0].isspace() else 5
        return kind
    return len(CLASSES) - 1


def _flags(rows: np.ndarray, said: list[str], token: np.ndarray):
    """Views that say yes (1) or no (0)."""
    position = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    for most in (4, 8, 16, 32):
        yield f"the first {most} tokens of a text", position < most

    def count(of: Callable[[str], int]) -> np.ndarray:
        per_token = np.array([of(text) for text in said])[token]
        return np.cumsum(per_token, axis=1) - per_token  # in what came before

    yield "inside quotation marks", count(lambda s: s.count('"')) % 2 == 1
    yield "inside quotation marks", count(lambda s: s.count("“") - s.count("”")) > 0
    yield "inside brackets", count(lambda s: s.count("(") - s.count(")")) > 0
    yield "a token that the text had before", _repeated(token)


def _repeated(token: np.ndarray) -> np.ndarray:
    n, T = token.shape
    key = (np.arange(n)[:, None] * (int(token.max()) + 1) + token).ravel()
    first = np.zeros(n * T, bool)
    first[np.unique(key, return_index=True)[1]] = True
    return ~first.reshape(n, T)
