"""What `qkattr check` says of SAEs that are used wrongly."""

import dataclasses

import numpy as np
import pytest
from test_formats import random_sae

from qkattr.cli.check import closing, show
from qkattr.errors import InputError
from qkattr.features.check import _verdict, check_saes, recovered


def verdict(loss_recovered=0.95, fits=0.8, **figures):
    used = dict(unexplained_variance=0.1, l0=30.0, l0_release=None, loss_recovered=loss_recovered,
                otherwise={"": 0.1, "at boundary 3": 0.12})  # fmt: skip
    return _verdict(random_sae(activation="relu"), used | figures, fits)


def test_verdicts():
    assert verdict() == "ok"
    assert verdict(l0_release=50.0) == "ok"
    assert "30.0 features fire at a position, and its makers say 70" in verdict(l0_release=70.0)
    assert "its makers say 12" in verdict(l0_release=12.0)
    better = verdict(otherwise={"": 0.1, "at boundary 3": 0.08, "with its input halved": 0.2})
    assert "variance is 0.08 at boundary 3, and 0.10 as configured: wrong hook" in better
    both = verdict(0.2, l0_release=70.0)
    assert both.startswith("does not fit this text: loss recovered 0.20, 30 features")
    assert "wrong SAE" in both and "; used wrongly? 30.0 features" in both


@pytest.mark.parametrize(
    "share,fits,said",
    [
        (0.81, 0.8, "ok"),
        (0.79, 0.8, "does not fit this text: loss recovered 0.79"),
        (0.59, 0.8, "does not fit this text: loss recovered 0.59"),
        (0.59, 0.5, "ok"),
        (0.95, 0.97, "does not fit this text: loss recovered 0.95"),
        (-3.0, 0.8, "does not fit this text: loss recovered -3.00: wrong SAE, wrong hook or wrong "
         "normalisation?"),
        (float("nan"), 0.8, "does not fit this text: loss recovered nan: wrong SAE, wrong hook or "
         "wrong normalisation?"),
        (None, 0.8, "ok"),
    ],
)  # fmt: skip
def test_what_recovers_too_little_does_not_fit_the_text(share, fits, said):
    assert verdict(share, fits, l0=1.0) == said


def test_an_undefined_loss_recovered_leaves_the_other_measures():
    assert verdict(None, unexplained_variance=1.3).startswith(
        "does not fit this text: unexplained variance 1.30"
    )
    assert verdict(None, l0_release=70.0).startswith("used wrongly?")


@pytest.mark.parametrize(
    "clean,with_sae,with_mean,share",
    [
        (3.0, 3.5, 8.0, 0.9),
        (3.0, 9.0, 8.0, -0.2),
        (3.0, 3.01, 3.04, None),  # the mean costs too little
        (3.0, 3.5, 3.0, None),
        (3.0, 3.5, 2.0, None),  # the mean helps
        (3.0, 3.0, float("nan"), None),
    ],
)
def test_loss_recovered_is_defined_where_the_mean_hurts(clean, with_sae, with_mean, share):
    assert recovered(clean, with_sae, with_mean) == pytest.approx(share)


@pytest.mark.parametrize("fits", [-0.1, 1.5, float("nan"), 80])
def test_fits_is_a_share(fits):
    with pytest.raises(InputError, match="a share of the loss from 0 to 1"):
        check_saes(None, [[0] * 16], fits=fits)


def report(*shares):
    rows = [
        dict(boundary=b, loss_recovered=share, l0=4.0, l0_release=None, unexplained_variance=0.1,
             median_relative_error=0.1, dead=0, width=8, loss=3.0,
             verdict=verdict(share, l0=0.5))
        for b, share in enumerate(shares, 1)
    ]  # fmt: skip
    return dict(text="notes.txt", rows=2, tokens=256, fits=0.8, clean_loss=3.0, boundaries=rows)


def test_the_table_says_which_text(capsys):
    show(report(0.9, 0.6, None))
    said = " ".join(capsys.readouterr().out.split())
    assert "SAEs on notes.txt (2 rows, 256 tokens)" in said
    assert "0.900 ok" in said and "0.600 does not fit this text 3" in said and " - ok" in said
    assert "1 of 3 SAEs do not fit this text" in said
    assert "undefined (-) at boundaries 3: the mean" in said


def test_the_closing_sentences():
    assert closing(report(0.9, 0.85)) == [
        "All SAEs fit this text. Another text may give other figures."
    ]
    assert len(closing(report(None, 0.9))) == 2
    assert closing(report(0.1, 0.2))[0].startswith("2 of 2 SAEs do not fit this text: they recover")


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
