"""Wrong input to `qkattr steer`: exit code 2, one line on stderr, nothing on stdout."""

import re

import folders
import numpy as np
import pytest

import qkattr
from qkattr.errors import InputError

IDS = "0,40,41,42,40"
PROMPT = "hi hi hi 12"
EDIT = ("--edit", "1:error@2:key:*")
ENDS = ("--from", "1", "--to", "-1")
CHOSEN = (*ENDS, "--heads", "1.1,1.2,1.3")


def spoil(tensors):
    next(iter(tensors.values()))[0, 0] = np.nan


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad_steer")
    folders.write_model(root / "model")
    folders.write_model(root / "text", tokenizer=True)
    folders.write_model(root / "other", seed=1)
    folders.write_model(root / "nan", edit=spoil)
    folders.write_saes(root / "saes")
    result = qkattr.trace(
        qkattr.load(root / "model", root / "saes"), [int(i) for i in IDS.split(",")], qk=0
    )
    result.save(root / "result")
    return result, root


@pytest.fixture(scope="module")
def root(traced):
    return traced[1]


@pytest.fixture(scope="module")
def result(traced):
    return traced[0]


@pytest.fixture
def refused(refused):
    """The same, of `qkattr steer`."""
    return lambda *arguments: refused("steer", *arguments)


@pytest.fixture
def steer(refused):
    return lambda *more: refused(IDS, "--ids", "-m", "model", "-s", "saes", *more)


@pytest.fixture
def early(refused):
    """With weights that cannot be read: what is refused here is refused before they are."""
    return lambda *more: refused(IDS, "--ids", "-m", "nan", "-s", "saes", *more)


# Edits


@pytest.mark.parametrize(
    "edit, message",
    [
        ("1:99999@2:key:*", "feature 99999 does not exist: the SAE at boundary 1 has features 0"),
        ("1:32@2:key:*", "has features 0..31; give one of these"),
        ("0:3@2:key:*", "boundary 0 has no SAE, so no feature 3; give one of error, bias, token"),
        ("1:error@2:key:0.1", "head 0.1 reads boundary 0, and the edited component lies at bound"),
        ("1:error@2:key:1.4", "head 1.4 does not exist: the model has blocks 0..1 of heads 0..3"),
        ("1:error@2:key:9.0", "head 9.0 does not exist: the model has blocks 0..1 of heads 0..3"),
        ("2:error@2:key:*", "boundary 2 is out of range for a key edit: the model has 0..1; give"),
        ("3:1@2:query:*", "boundary 3 is out of range for a query edit: the model has 0..1"),
        (
            "3:error@2:residual",
            "boundary 3 is out of range for a residual edit: the model has 0..2",
        ),
        ("1:error@5:key:*", "position 5 is out of range: the prompt has 5 tokens; give one of 0.."),
        ("1:error@-6:residual", "position -6 is out of range: the prompt has 5 tokens"),
        ("1:error@2,9:key:*", "position 9 is out of range"),
        ("1:error@Aunt:key:*", "no token 'Aunt' in the prompt; `qkattr tokens` lists them"),
        ('1:error@" Sally":key:*', "no token ' Sally' in the prompt"),
        ("1:error@:key:*", "no token '' in the prompt"),
    ],
)
def test_edits_that_do_not_fit(steer, early, edit, message):
    assert message in early("--edit", edit) and message in steer("--edit", edit)


@pytest.mark.parametrize(
    "edit",
    [
        *("", "x", "1", "1:3", "1@2:key:*", "a:3@2:key:*", "-1:3@2:key:*", "1:x@2:key:*"),
        *("1:-3@2:key:*", "1:3@2", "1:3@2:key", "1:3@2:value:*", "1:3@2:residual:1.1"),
        *("1:3:2:key:*", "9" * 4000, "1:\x1b[31m@2:key:*", "1:3@2:\u202ekey:*", "1:3@2:KEY:*"),
    ],
)
def test_edits_that_cannot_be_read(steer, edit):
    line = steer("--edit", edit)
    assert "cannot be read; write B:F@POS:query|key:L.H,L.H or B:F@POS:residual, as in" in line
    assert len(line) < 300


@pytest.mark.parametrize("heads", ["", ",", "1", "1.", ".1", "1.1;1.2", "1.1,", "a.b", "1.1.1"])
def test_heads_that_cannot_be_read(steer, heads):
    for more in (("--edit", f"1:error@2:key:{heads}"), ("--ablate", heads)):
        assert "cannot be read; write block.head, as in 23.2,23.7" in steer(*more)


def test_features_that_are_not_active(steer, result):
    parts = result.subject.components
    active = [i for i in np.asarray(parts.index[1, 2]).tolist() if i >= 0]
    quiet = next(f for f in range(folders.WIDTH) if f not in np.asarray(parts.index[1]))
    line = steer("--edit", f"1:{quiet}@2:key:*")
    assert f"feature 1:{quiet} is not active at '41' 2 of boundary 1: active features th" in line
    assert f"{', '.join(map(str, active))}; give one that is" in line
    for where, n in (("*", 5), ("1,2", 2)):
        line = steer("--edit", f"1:{quiet}@{where}:query:1.0")
        assert f"feature 1:{quiet} is active at none of {n} positions of boundary 1" in line
        assert "; give one that is, or another position" in line
    assert "it is a sink, one component" in steer("--edit", f"1:{quiet}@0:key:*")
    assert "token is not active at '41' 2 of boundary 1" in steer("--edit", "1:token@2:key:*")
    assert "sink is not active at '41' 2 of boundary 1" in steer("--edit", "1:sink@2:residual")


def test_texts_of_several_tokens(refused):
    where = (PROMPT, "-m", "text", "-s", "saes", "--edit")
    assert "token ' hi' is ambiguous: ' hi#1' at 2" in refused(*where, "1:error@ hi:key:*")
    assert "occurs 2 times" in refused(*where, '1:error@" hi#9":key:*')


def test_nothing_to_edit(steer):
    assert "nothing to edit; give --edit, --ablate, or --from and --to" in steer()


def test_ablated_heads(early):
    assert "head 2.0 does not exist: the model has blocks 0..1" in early("--ablate", "2.0")
    assert "head 1.4 does not exist" in early(*EDIT, "--ablate", "0.1,1.4")


@pytest.mark.parametrize(
    "scales, message",
    [
        ("nan", "scale nan is not a finite number in float32; give one, as in -1,0,1,2"),
        ("1,inf", "scale inf is not a finite number"),
        ("-inf", "scale -inf is not a finite number"),
        ("1e400", "scale inf is not a finite number"),
        ("1e39", "scale 1e+39 is not a finite number in float32"),
        ("", "--scales expects numbers separated by commas, as in -1,0,1,2; got ''"),
        ("x", "--scales expects numbers separated by commas, as in -1,0,1,2; got 'x'"),
        ("1,,2", "--scales expects numbers separated by commas"),
        ("1;2", "--scales expects numbers separated by commas"),
    ],
)
def test_scales(early, scales, message):
    assert message in early(*EDIT, "--scales", scales)


def test_scales_that_overflow(steer, result):
    line = steer("--edit", "1:error@*:residual", "--scales", "1,3e38")
    assert "at scale 3e+38 the model's logits are not finite; give scales nearer to 1" in line
    for more in (
        ("--live-scales", "--edit", "1:error@2:key:*"),
        ("--live-scales", "--edit", "1:error@2:query:*"),
        ("--edit", "1:error@*:residual"),
    ):
        line = steer(*more, "--scales", "1,1e30")
        assert "at scale 1e+30 an edited read or its scores overflow float32" in line
        line = steer(*more, "--scales", "3e38")
        assert "at scale 3e+38 " in line and "; give scales nearer to 1" in line
    with pytest.raises(InputError, match="there are no scales; give at least one"):
        qkattr.steer(result, ["1:error@2:key:*"], scales=[])


@pytest.mark.parametrize(
    "more, message",
    [
        (("--query", "9"), "position 9 is out of range"),
        (("--query", "Aunt"), "no token 'Aunt' in the prompt"),
        (("--track", "Aunt"), "token 'Aunt' is text and the model has no tokenizer"),
        (("--track", "99999"), "token id 99999 is outside the vocabulary, 0.."),
        (("--track=-1",), "token id -1 is outside the vocabulary, 0.."),
        (("--flag",), "No such option: --flag"),
        (("--dtype", "float16"), "dtype 'float16' is not known"),
        (("--features", "x"), "Invalid value for '--features': "),
    ],
)
def test_other_options(early, more, message):
    assert message in early(*EDIT, *more)


def test_without_a_tokenizer_a_whole_number_is_an_id(result):
    steering = qkattr.steer(result, ["1:error@2:key:*"], scales=[1], track=["41", 42])
    assert {"41", "42"} <= set(steering.tracked)


def test_tracked_text_of_several_tokens(refused):
    where = (PROMPT, "-m", "text", "-s", "saes", *EDIT)
    for token in ("hi hi", "", "Aunt"):
        line = refused(*where, "--track", token)
        assert " tokens (" in line and "give one token, mind its leading space" in line


# Edits that are chosen


def test_ends(steer, early):
    assert "--from goes with --to, which is missing; give both" in steer("--from", "1")
    assert "--to goes with --from, which is missing; give both" in steer(*EDIT, "--to", "1")
    for ends, message in (
        (("3", "1"), "the source at 3 comes after the target at 1; attention is causal, give the"),
        (("9", "1"), "position 9 is out of range"),
        (("1", "Aunt"), "no token 'Aunt' in the prompt"),
    ):
        assert message in early("--from", ends[0], "--to", ends[1])


@pytest.mark.parametrize(
    "heads, message",
    [
        ("0", "'0' of the model's 8 heads comes to 0; give 1 to 8"),
        ("-1", "'-1' of the model's 8 heads comes to -1; give 1 to 8"),
        ("0%", "'0%' of the model's 8 heads comes to 0; give 1 to 8"),
        ("101%", "'101%' of the model's 8 heads comes to 9; give 1 to 8"),
        ("99999", "'99999' of the model's 8 heads comes to 99999; give 1 to 8"),
        ("abc", "'abc' is not a number of heads; give a number, as in 12, or a share, as in 5%"),
        ("", "'' is not a number of heads"),
        ("nan%", "'nan%' is not a number of heads"),
        ("inf%", "'inf%' is not a number of heads"),
        ("greedy:", "'' is not a number of heads"),
        ("greedy:x", "'x' is not a number of heads"),
        ("greedy:0", "'0' of the model's 8 heads comes to 0"),
        ("greedy:9", "'9' of the model's 8 heads comes to 9"),
        ("9" * 6000, "is not a number of heads"),
        ("1.4", "head 1.4 does not exist: the model has blocks 0..1 of heads 0..3"),
        ("1.1,x", "heads '1.1,x' cannot be read; write block.head, as in 23.2,23.7"),
        ("greedy:1.1", "heads 'greedy:1.1' cannot be read"),
    ],
)
def test_heads(early, heads, message):
    line = early(*ENDS, "--heads", heads)
    assert message in line and len(line) < 300


@pytest.mark.parametrize(
    "more, message",
    [
        (("--features", "0"), "Invalid value for '--features': "),
        (("--side", "value"), "side 'value' is not known; give one of query, key"),
        (("--side", "residual"), "side 'residual' is not known; give one of query, key"),
        (
            ("--by", "score"),
            "by 'score' is not known; give one of effect, masking, ",
        ),
        (("--edit", "1:error@9:key:*"), "position 9 is out of range"),
        (("--track", "Aunt"), "token 'Aunt' is text"),
        (("--query", "9"), "position 9 is out of range"),
    ],
)
def test_other_choices(early, more, message):
    assert message in early(*ENDS, *more)


def test_nothing_was_carried(steer):
    line = steer("--from", "0", "--to", "2", "--heads", "1", "--by", "influence")
    assert "no edge of the graph leads from position 0 to 2; choose other positions" in line
    line = steer("--from", "2", "--to", "-1", "--heads", "0.1")
    assert "no feature at position 2 speaks for looking from 4 at 2 in these heads" in line


def test_residual_edits_have_no_hydra_effect(steer):
    line = steer(*CHOSEN, "--hydra", "--edit", "1:error@2:residual")
    assert "a residual edit goes through none; leave it out" in line


def test_library_calls(result):
    ends = dict(source=1, target=-1)
    for more, message in (
        (dict(features=0), "features should be at least 1, got 0; give the number of"),
        (dict(heads=[]), "there are no heads to edit; give at least one"),
        (dict(heads=[(5, 0)]), "head 5.0 does not exist"),
        (dict(heads=0), "'0' of the model's 8 heads comes to 0"),
        (dict(side="value"), "side 'value' is not known"),
        (dict(by="score", heads=[(1, 1)]), "by 'score' is not known"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            qkattr.choose_edits(result, **ends, **more)
    for edit, message in (
        (qkattr.Edit(1, "error", 2, "key", ()), "a key edit needs at least one head"),
        (qkattr.Edit(1, "error", 2, "residual", ((1, 1),)), "a residual edit takes no heads"),
        (qkattr.Edit(1, "error", 2, "value", ((1, 1),)), "side 'value' is not known"),
        (qkattr.Edit(1, "logit", 2, "key", ((1, 1),)), "component 'logit' is not known"),
        (qkattr.Edit(-1, 3, 2, "key", ((1, 1),)), "boundary -1 is out of range"),
    ):
        with pytest.raises(InputError, match=message):
            qkattr.steer(result, [edit])


# Figures


@pytest.mark.parametrize("name", ["a", "a.jpg", "a.SVG", ".svg", ""])
def test_figures_of_unknown_formats(early, name):
    line = early(*EDIT, "--figure", name)
    assert "its ending names no figure format; use .svg, .png or .pdf" in line


def test_figures_that_cannot_be_written(early, root):
    pytest.importorskip("matplotlib")
    for folder in ("/proc/absent", root / "model" / "config.json"):
        line = early(*EDIT, "--figure", f"{folder}/a.svg")
        assert f"cannot write to {folder}: " in line and "choose another folder" in line


def test_no_figure_of_a_refused_run(steer, tmp_path):
    pytest.importorskip("matplotlib")
    steer("--edit", "1:error@9:key:*", "--figure", tmp_path / "new" / "a.svg")
    assert list(tmp_path.iterdir()) == []


# What is steered


def test_folders(refused):
    for more, name in (
        (("--ids",), "--ids"),
        (("--no-bos",), "--bos/--no-bos"),
        (("--no-sink",), "--no-sink"),
        (("--dtype", "float32"), "--dtype"),
    ):
        line = refused("result", *more, *EDIT)
        assert f"{name} goes with a prompt, and 'result' is a folder" in line
    assert "has no graph.json; expected a folder that" in refused("./saes", *EDIT)
    assert "position 9 is out of range" in refused("result", "--from", "1", "--to", "9")
    assert "'x' is not a number of heads" in refused("result", *ENDS, "--heads", "x", "-m", "nan")
    assert "other model" in refused("result", *EDIT, "-m", "other")


def test_what_is_missing(refused):
    assert "--model is missing; give" in refused(IDS, "--ids", "-s", "saes", *EDIT)
    assert "--model is missing; give" in refused(IDS, "--ids", "-s", "saes", *ENDS)
    assert "--saes is missing; give" in refused(IDS, "--ids", "-m", "model", *ENDS)
    assert "Missing argument 'PROMPT|DIR'; see `qkattr steer --help`" in refused()
    line = refused(IDS, "--ids", "-m", "model", "--edit", "1:3@2:key:*")
    assert "boundary 1 has no SAE, so no feature 3; give one of error" in line


def test_prompts(refused):
    where = ("-m", "model", "-s", "saes")
    for more in (EDIT, ENDS):
        assert "has no tokenizer that qkattr can read" in refused(PROMPT, *where, *more)
        assert "the prompt has no tokens" in refused("", "--ids", *where, *more)
        assert "is outside the model's vocabulary" in refused("9999", "--ids", *where, *more)
        assert "--ids expects token ids" in refused("1,x", "--ids", *where, *more)
        assert "no such model: 'absent'" in refused(IDS, "--ids", "-m", "absent", *where[2:], *more)
