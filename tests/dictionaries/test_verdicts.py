"""What `qkattr check` says of SAEs that are used wrongly."""

import dataclasses

import numpy as np
import pytest
from test_formats import random_sae

from qkattr.check import _verdict, check_saes


def verdict(recovered=0.95, **figures):
    used = dict(unexplained_variance=0.1, l0=30.0, l0_release=None,
                otherwise={"": 0.1, "at boundary 3": 0.12})  # fmt: skip
    return _verdict(random_sae(activation="relu"), used | figures, recovered)


def test_verdicts():
    assert verdict() == "ok"
    assert verdict(l0_release=50.0) == "ok"
    assert "30.0 features fire at a position, its makers say 70" in verdict(l0_release=70.0)
    assert "its makers say 12" in verdict(l0_release=12.0)
    better = verdict(otherwise={"": 0.1, "at boundary 3": 0.08, "with its input halved": 0.2})
    assert "leaves 0.08 of the variance at boundary 3, 0.10 as it is used: wrong hook" in better
    assert "loss recovered 0.20" in verdict(recovered=0.2)
    both = verdict(recovered=0.2, l0_release=70.0)
    assert both.startswith("POOR: unexplained") and "; 30.0 features" in both


@pytest.mark.slow
def test_smollm2_used_wrongly(bundle):
    """Loud for a wrong hook, a wrong scale and a wrong b_dec, each of which recovers 0.85 to 0.97
    of the loss; quiet for the SAEs as they are."""
    from qkattr.cli.text import cut_rows, read_text

    rows, saes = cut_rows(bundle, read_text(None), None, 1), bundle.dictionaries

    def check(**used):
        at = [None] * len(saes)
        for name, sae in used.items():
            at[int(name.removeprefix("b"))] = sae
        changed = dataclasses.replace(
            bundle, dictionaries=tuple(at), read_params=lambda: bundle.params
        )
        return [row["verdict"] for row in check_saes(changed, rows)["boundaries"]]

    assert check(b6=saes[6], b15=saes[15]) == ["ok", "ok"]
    assert all("at boundary" in said for said in check(b5=saes[4], b15=saes[14]))
    twice = dataclasses.replace(saes[15], factor=np.float32(2))
    kept = dataclasses.replace(saes[6].config, subtract_b_dec=False)
    wrong_b_dec = dataclasses.replace(saes[6], config=kept)
    assert "with b_dec subtracted" in check(b6=wrong_b_dec)[0]
    assert "with its input halved" in check(b15=twice)[0]
