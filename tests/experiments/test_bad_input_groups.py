"""Wrong groups and labels of `qkattr steer`: exit code 2, one line on stderr."""

# ruff: noqa: F811 (fixtures of another module)
import json

import pytest
from test_bad_input_steer import CHOSEN, EDIT, ENDS, early, refused, result, root, steer, traced  # noqa: F401


@pytest.fixture
def files(root):
    (root / "groups.toml").write_text(
        '[quiet]\nfeatures = ["0:1", "1:99"]\n[unnamed]\nfeatures = ["1:x"]\n'
        '[text]\nfeatures = "1:3"\n[none]\nfeatures = []\n[number]\nfeatures = [1.5]\n'
    )
    (root / "broken.toml").write_text("[a\n")
    (root / "bytes.toml").write_bytes(b"\xff\xfe")
    (root / "empty.toml").write_text("")
    (root / "flat.toml").write_text("a = 1\n")
    (root / "labels.json").write_text(json.dumps({"1:99": "aunts"}))
    (root / "broken.json").write_text("{")
    (root / "deep.json").write_text("[" * 100_000)
    (root / "list.json").write_text("[1]")
    (root / "name.json").write_text('{"x": "y"}')
    (root / "text.json").write_text('{"1:3": 5}')


@pytest.mark.parametrize(
    "group, message",
    [
        ("absent.toml", "cannot read absent.toml: No such file or directory; give another path"),
        ("absent.toml:a", "cannot read absent.toml: No such file"),
        (".", "cannot read .: Is a directory"),
        ("broken.toml:a", "broken.toml is not TOML: "),
        ("bytes.toml", "bytes.toml is not TOML: "),
        ("empty.toml", "empty.toml has no groups; write [name] and features = "),
        ("groups.toml", "several groups: 'quiet', 'unnamed', 'text', 'none', 'number'; say which"),
        ("groups.toml:", "groups.toml has no group '', only 'quiet', "),
        ("groups.toml:absent", "groups.toml has no group 'absent', only 'quiet', "),
        ("groups.toml:unnamed", "'1:x' names no feature; write boundary:feature"),
        ("groups.toml:text", "group 'text' lists no features; write features = "),
        ("groups.toml:none", "group 'none' lists no features"),
        ("groups.toml:number", "'1.5' names no feature"),
        ("flat.toml", "group 'a' lists no features"),
        ("a\0.toml", "embedded null byte"),
    ],
)
def test_groups(early, files, group, message):
    assert message in early(*ENDS, "--group", group)


def test_groups_of_which_nothing_is_active(steer, files):
    message = "none of the group's features is active at position 1 in blocks 1; give features of"
    assert message in steer(*CHOSEN, "--group", "groups.toml:quiet")
    assert message in steer(*CHOSEN, "--labels", "labels.json", "--label", "Aunt")
    assert "no feature has a label; give labels" in steer(*CHOSEN, "--label", "aunt")


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ("--labels", "labels.json", "--label", "zebra"),
            "none of 1 labels contains 'zebra'; give",
        ),
        (
            ("--labels", "labels.json", "--label", "aunt", "--group", "groups.toml:quiet"),
            "--group and --label both choose the features; give one of them",
        ),
        (("--labels", "absent.json"), "cannot read absent.json: No such file or directory; give"),
        (("--labels", "."), "cannot read .: Is a directory"),
        (("--labels", "broken.json"), "broken.json is not JSON: "),
        (("--labels", "deep.json"), "deep.json is not JSON: "),
        (("--labels", "list.json"), "list.json, item 0 is '1', expected an object with a layer"),
        (("--labels", "name.json"), "name.json: 'x' names no feature; write boundary:feature"),
        (
            ("--labels", "text.json"),
            "text.json: '1:3': its label is 5, expected text; give a string",
        ),
    ],
)
def test_labels(early, files, more, message):
    assert message in early(*ENDS, *more)


def test_what_goes_with_ends_only(early, files):
    message = "--hydra, --group and --label choose among heads by loading; give --from and --to"
    for more in (
        ("--hydra",),
        ("--group", "groups.toml:quiet"),
        ("--labels", "labels.json", "--label", "aunt"),
    ):
        assert message in early(*EDIT, *more)


@pytest.mark.parametrize(
    "more", [("--heads", "5%"), ("--side", "key"), ("--features", "4"), ("--by", "influence")]
)
def test_what_chooses_goes_with_ends_only(early, more):
    message = f"{more[0]} goes with --from and --to, which choose edits; give these too"
    assert message in early(*EDIT, *more) and message in early(*more)
