"""Labels and cards joined with what they are of, as a command line names them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qkattr.cards.columns import Cards
from qkattr.errors import InputError
from qkattr.labels.forms import read_labels as read_labels
from qkattr.labels.neuronpedia import fetch_labels, source_of
from qkattr.load.bundle import Bundle
from qkattr.load.registry import Source


def with_cards(bundle: Bundle, cards: Cards | str | Path) -> Bundle:
    """The bundle with cards of its SAEs: whatever is traced with it names its features.

    Raises:
      InputError: the cards are of other SAEs, or the file cannot be read.
    """
    cards = cards if isinstance(cards, Cards) else Cards.open(cards)
    was, now = cards.meta["saes_hash"], bundle.saes_hash
    if was != now:
        raise InputError(
            f"the cards are of other SAEs ({cards.meta['saes']}, fingerprint {str(was)[:12]}) than "
            f"the ones given ({str(now)[:12]}); make cards of these, or load those"
        )
    return dataclasses.replace(bundle, read_cards=lambda: cards)


def labelled(
    bundle: Bundle, given: Sequence[str], progress: Callable[[str], None] = lambda stage: None
) -> Bundle:
    """The bundle with labels, which name the features of whatever is traced with it.

    given: as `read_given` has it; of two labels of a feature the last one counts.

    Raises:
      InputError: see `read_given`; or there are no SAEs.
    """
    if bundle.dictionaries is None:
        raise InputError("labels name the features of SAEs, and there are none; give --saes")
    widths = {b: d.width for b, d in enumerate(bundle.dictionaries) if d is not None}
    labels = read_given(given, widths, bundle.source, progress)
    return dataclasses.replace(bundle, labels={**bundle.labels, **labels})


def read_given(
    given: Sequence[str],
    widths: Mapping[int, int] | None,
    source: Source | None,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[tuple[int, int], str]:
    """Labels as they are named on a command line.

    given: paths, `PATH:23` for the labels of one boundary, `PATH:pre` where a layer's SAE is before
    its block; "neuronpedia" for those of the source; or "neuronpedia:NAME" for those of a set of
    the registry.

    Raises:
      InputError: see `read_labels` and `neuronpedia.fetch_labels`.
    """
    labels: dict[tuple[int, int], str] = {}
    for name in given:
        if name.split(":")[0] == "neuronpedia" and not Path(name).exists():
            set_ = name.partition(":")[2]
            labels |= fetch_labels(source_of(set_) if set_ else source, widths, progress)
            continue
        path, _, part = name.rpartition(":")
        whole = not path or Path(name).exists() or not re.fullmatch(r"pre|[0-9]{1,5}", part)
        pre = source.pre if source is not None else False
        if whole:
            labels |= read_labels(name, widths, pre=pre)
        elif part == "pre":
            labels |= read_labels(path, widths, pre=True)
        else:
            labels |= read_labels(path, widths, boundary=int(part), pre=pre)
    return labels
