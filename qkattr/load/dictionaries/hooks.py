"""Where a dictionary was trained: one spelling for the hooks of all formats, and what names say.

A hook on the residual stream gets TransformerLens's name, by which boundaries are found:

    blocks.{i}.hook_resid_post      boundary i + 1; also model.layers.{i}, transformer.h.{i},
                                    gpt_neox.layers.{i} (a module's name means its output),
                                    resid_post_layer_{i}, resid_out_layer{i}
    blocks.{i}.hook_resid_pre       boundary i; also model.layers.{i}.input
    hook_embed, embed_tokens        boundary 0, as TransformerLens and as the module have it

Any other hook keeps its own name. What is no SAE at all has a word of `OTHERS` in its place. Where
no config names a hook, the names of folders do (`by_names`), the innermost first.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from qkattr.errors import clipped, some

#: Dictionaries that do not reconstruct what they read.
OTHERS = ("transcoder", "cross-layer transcoder", "crosscoder", "Lorsa", "temporal SAE")
#: The embedding's output as its module gives it; `hook_embed` is what enters the stream.
EMBEDDING = "embed_tokens"
_POST, _PRE = "blocks.{}.hook_resid_post", "blocks.{}.hook_resid_pre"
_ABOVE = r"(?:(?:base_model|model|language_model|text_model|transformer|gpt_neox|decoder)\.)*"
_SPELLINGS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"blocks\.(\d{1,4})\.hook_(?:resid_post|out)", _POST),
        (r"blocks\.(\d{1,4})\.hook_(?:resid_pre|in)", _PRE),
        (rf"{_ABOVE}(?:layers|h)\.(\d{{1,4}})(?:\.output)?", _POST),
        (rf"{_ABOVE}(?:layers|h)\.(\d{{1,4}})\.input", _PRE),
        (r"resid(?:_post|_out)?_layer_?(\d{1,4})", _POST),
        (r"resid_pre_layer_?(\d{1,4})", _PRE),
        (r"hook_embed|embed\.hook_out", "hook_embed"),
        (rf"{_ABOVE}(?:embed_tokens|embed_in|embed|wte)(?:\.output)?", EMBEDDING),
    )
)
_BOUNDARY = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)")


#: Words of names, and the hook that they mean (`{}`: the block). The first that a name has counts:
#: a transcoder's name may also say mlp.
_MEANINGS = tuple(
    (re.compile(rf"(?<![a-z])(?:{words})(?![a-z])"), hook)
    for words, hook in (
        ("crosscoders?", "crosscoder"),
        ("clts?", "cross-layer transcoder"),
        ("transcoders?", "transcoder"),
        ("lorsa", "Lorsa"),
        ("mlp|ffn|feedforward", "blocks.{}.mlp"),
        ("att|attn|attention", "blocks.{}.attn"),
        ("resid(?:ual)?_mid", "blocks.{}.hook_resid_mid"),
        ("resid(?:ual)?_pre", _PRE),
        ("res|resid|residual", _POST),
    )
)
#: What errors call them.
_CALLED = {"blocks.{}.mlp": "the MLP", "blocks.{}.attn": "attention"}
_LAYER = re.compile(r"(?<![A-Za-z])(?:layers?|blocks|h)[._-]?(\d{1,4})(?!\d)")
_CACHED = re.compile(r"models--[^/]+--([^/]+)")
_DIGITS = re.compile(r"\d+")
_DEPTH = 4  # Gemma Scope's repository/layer_0/width_16k/average_l0_105


def canonical(name: str) -> str:
    """A hook of the residual stream under the name that boundaries go by; any other as it is."""
    for pattern, known in _SPELLINGS:
        if match := pattern.fullmatch(name):
            return known.format(*(int(group) for group in match.groups()))
    return name


def boundary(hook: str) -> int | None:
    """The boundary of a hook; None: it is elsewhere."""
    hook = canonical(hook)
    if match := _BOUNDARY.fullmatch(hook):
        return int(match[1]) + (match[2] == "post")
    return 0 if hook in ("hook_embed", EMBEDDING) else None


def by_name(name: str, layer: int | None) -> str | None:
    """The hook that a name means, at a layer if its number is known; None: it means none.

    Empty: it means the residual stream, and nothing says of which block.
    """
    known, number = canonical(name), "N" if layer is None else str(layer)
    if boundary(known) is not None:
        return _DIGITS.sub(number, known) if layer is not None else known
    meant = _meant(name)
    if meant in (_POST, _PRE) and layer is None:
        return ""
    return meant and meant.format(number)


def by_names(
    path: Path,
    layer: int | None,
    *,
    stated: str | None = None,
    default: str | None = "resid_post",
) -> str | None:
    """The hook of an SAE whose config does not name it: what the names of its folder and of those
    above it mean.

    layer: None: the names say it. stated: "resid_post" or "resid_pre", what the user says of it.
    default: what it is where names mean nothing; None: nothing is known then.
    """
    layer = layer_of(path) if layer is None else layer
    meant = (by_name(name, layer) for name in names(path) if stated is None)
    if (hook := next((m for m in meant if m is not None), None)) is not None:
        return hook
    stated = stated or default
    return stated and ("" if layer is None else f"blocks.{layer}.hook_{stated}")


def other_by_names(path: Path) -> str | None:
    """The word of `OTHERS` that the names of a folder and of those above it mean, if one does."""
    meant = (_meant(name) for name in names(path))
    return next((hook for hook in meant if hook in OTHERS), None)


def layer_of(path: Path) -> int | None:
    """The number of the block that the names of a folder and of those above it have, if any."""
    return next((n for name in names(path) if (n := layer_in(name)) is not None), None)


def layer_in(name: str) -> int | None:
    """The number of the block that a name has, if any."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def names(path: Path) -> Iterator[str]:
    """The names of a folder and of those above it that belong to its set, the innermost first.

    The repository's own name is the last, where it is a folder of the hub's cache.
    """
    parts = path.absolute().parts
    for part in reversed(parts[-_DEPTH:]):
        cached = _CACHED.fullmatch(part)
        yield cached[1] if cached else part
    yield from (match[1] for part in parts[:-_DEPTH] if (match := _CACHED.fullmatch(part)))


def own_name(folder: Path, depth: int = 1) -> str:
    """A folder's last names; in the hub's cache, the repository's name in place of a commit."""
    parts = list(folder.absolute().parts)
    for i, part in enumerate(parts[:-2]):
        if cached := _CACHED.fullmatch(part):
            parts[i + 2] = cached[1]  # after "snapshots"
    return "/".join(parts[-depth:])


def _meant(name: str) -> str | None:
    return next((hook for words, hook in _MEANINGS if words.search(name.lower())), None)


def counts(hooks: Iterable[str]) -> str:
    """`6 of layers.N.mlp (the MLP), 2 transcoders`: hooks by kind, the most frequent first."""
    kinds = collections.Counter(h if h in OTHERS else _DIGITS.sub("N", h, count=1) for h in hooks)
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return some([_counted(kind, n) for kind, n in most], 8)


def _counted(kind: str, n: int) -> str:
    if kind in OTHERS:
        return f"{n} {kind}{'s' * (n > 1)}"
    called = _CALLED.get(_meant(kind) or "", "")
    called = f" ({called})" if called else ""
    return f"{n} of {clipped(kind, 80) or 'a hook that it does not name'}{called}"
