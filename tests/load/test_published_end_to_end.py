"""Six published pairs of model and SAEs, as they lie in a cache of the hub: `qkattr check` and
`qkattr trace` as a user types them, and what every boundary's SAE was taken for."""

import dataclasses
import json
import math
import shutil

import numpy as np
import published_pairs as pairs
import pytest
from huggingface_hub import constants

from qkattr.cli.main import main
from qkattr.load.opening import open_bundle

MLP = "google/gemma-scope-2b-pt-mlp"

TEXT = "The cat sat on the mat. " * 3
WHY_SAES, WHY_TOKENIZER = "as the SAEs were trained", "as the tokenizer does"
BESIDE = "SAEs of the MLP and of attention lie beside them and are not used"
NO_BOS_SAID = "not verified: whether text had a BOS in training"
OF_OTHERS = "12 SAEs of other hooks left out: 6 of layers.N.attention (attention), "
SCOPE_2 = (
    "small: L0 10 to 20, big: 60 to 150",
    "not verified: whether every folder has its config.json; Neuronpedia has cards of four layers "
    "only, of other SAEs",
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of `pairs.MODELS`, the repository of its SAEs and what writes them there, and what is
    expected. saes: the set's name, with which each of the notes begins. config: the fields of
    `DictionaryConfig` that are not the usual ones. tensors: the names of W_enc, W_dec, b_enc and
    b_dec in their file; a "T" before those that lie the other way round. factor, threshold: of a
    layer. scan: the model's name in the graph. first: the first boundary with an SAE."""

    model: str
    repo: str
    write: object
    saes: str
    bos: str
    notes: tuple[str, ...]
    config: dict
    tensors: str
    factor: object = None
    threshold: object = None
    scan: str | None = None
    first: int = 1


SPARSIFY = dict(
    config=dict(activation="topk", k=16), tensors="Tencoder.weight W_dec encoder.bias b_dec",
    bos=f"no BOS, {WHY_TOKENIZER}", notes=(BESIDE, NO_BOS_SAID), write=pairs.pythia_saes,
)  # fmt: skip
GEMMA = dict(
    config=dict(activation="jumprelu", subtract_b_dec=False, prepend_bos=True),
    bos=f"BOS <bos> first, {WHY_SAES}",
)
PAIRS = {
    "pythia": Pair(
        model="pythia-70m", repo="EleutherAI/sae-pythia-70m-32k", saes="sae-pythia-70m-32k",
        **SPARSIFY,
    ),
    "pythia, deduped": Pair(
        model="pythia-70m-deduped", repo="EleutherAI/sae-pythia-70m-deduped-32k",
        saes="sae-pythia-70m-deduped-32k", **SPARSIFY,
    ),
    "gpt2": Pair(
        model="gpt2", repo="jbloom/GPT2-Small-SAEs-Reformatted", write=pairs.res_jb,
        saes="gpt2-small-res-jb", bos=f"BOS {pairs.END} first, {WHY_SAES}", scan="gpt2-small",
        notes=("trained on a model whose writing weights were centred: they read the stream less "
               "its mean over d_model",),
        config=dict(activation="relu", centre=True, prepend_bos=True), first=0,
        tensors="W_enc W_dec b_enc b_dec",
    ),
    "gemma 2": Pair(
        model="gemma-2-2b", repo="google/gemma-scope-2b-pt-res", write=pairs.gemma_scope,
        saes="gemma-scope-2b-pt-res", scan="gemma-2-2b", tensors="W_enc W_dec b_enc b_dec",
        notes=("of several L0 the one nearest 100 at each layer, as Neuronpedia has it; for other "
               "L0s give google/gemma-scope-2b-pt-res:width_16k@50",),
        threshold=lambda layer, tensors: tensors["threshold"], **GEMMA,
    ),
    "gemma 3": Pair(
        model="gemma-3-270m", repo="google/gemma-scope-2-270m-pt", write=pairs.gemma_scope_2,
        saes="gemma-scope-2-270m-pt-res", scan="gemma-3-270m", notes=SCOPE_2,
        tensors="w_enc w_dec b_enc b_dec",
        threshold=lambda layer, tensors: tensors["threshold"], **GEMMA,
    ),
    "qwen": Pair(
        model="qwen3-1.7b-base", repo="Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
        write=pairs.qwen_scope, saes="qwen-scope-3-1.7b-base", bos=f"no BOS, {WHY_TOKENIZER}",
        notes=(f"{NO_BOS_SAID}: the tokenizer has none",), tensors="TW_enc TW_dec b_enc b_dec",
        config=dict(activation="topk", k=50, subtract_b_dec=False),
    ),
    "llama": Pair(
        model="llama-3.1-8b", repo="fnlp/Llama3_1-8B-Base-LXR-8x", write=pairs.llama_scope,
        saes="llama-scope-lxr-8x", bos=f"BOS <|begin_of_text|> first, {WHY_SAES}",
        notes=("not verified: the unit of the JumpReLU threshold, which is concluded from its "
               "authors' code; `qkattr check` should find an L0 of 50",),
        config=dict(activation="jumprelu", subtract_b_dec=False, prepend_bos=True,
                    rescale_by_decoder_norm=True),
        tensors="Tencoder.weight Tdecoder.weight encoder.bias decoder.bias", scan="llama3.1-8b",
        factor=lambda layer: math.sqrt(pairs.D) / pairs.llama_norm(layer),
        threshold=lambda layer, tensors: np.full(
            pairs.M, pairs.llama_threshold(layer) * math.sqrt(pairs.D) / pairs.llama_norm(layer)
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A cache with every pair in it, and the tensors of the sets' SAEs by layer."""
    folder = tmp_path_factory.mktemp("published")
    for model in pairs.MODELS.values():
        model.write(folder / "hub")
    made = {p.repo: p.write(pairs.snapshot(folder / "hub", p.repo)) for p in PAIRS.values()}
    pairs.gemma_scope(pairs.snapshot(folder / "hub", MLP), embedding=False)
    (folder / "small.txt").write_text(TEXT)
    return folder, made


@pytest.fixture
def root(published, monkeypatch):
    """The folder of the cache, which is the only place where anything can be found."""
    folder, _ = published
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("QKATTR_CACHE", str(folder / "qkattr"))
    monkeypatch.chdir(folder)
    return folder


def copied(root, repo):
    """The repository as a local folder of its own name."""
    folder = root / "copies" / repo.rpartition("/")[2]
    if not folder.exists():
        shutil.copytree(pairs.snapshot(root / "hub", repo), folder)
    return folder


def run(capsys, *arguments):
    """A command line that works: what it prints, and the notes."""
    assert main([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    notes = [line.removeprefix("qkattr: note: ") for line in err.splitlines()]
    return out, notes


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_checked_and_traced(root, name, capsys, tmp_path):
    pair = PAIRS[name]
    model = pairs.MODELS[pair.model].repo
    boundaries = list(range(pair.first, pairs.BLOCKS[pair.model] + 1))
    notes = [f"{pair.saes}: {note}" for note in pair.notes]

    out, said = run(capsys, "check", "-m", model, "-s", pair.saes, "--text", "small.txt", "--json")
    report = json.loads(out)
    assert said == notes == report["notes"]
    assert [c["boundary"] for c in report["boundaries"]] == boundaries
    assert all(np.isfinite(c["unexplained_variance"]) for c in report["boundaries"])

    command = ("trace", "cat sat", "-m", model, "-s", pair.saes, "--qk", 2, "--max-rows", 32)
    _, said = run(capsys, *command, "--out", tmp_path / "out")
    assert said == notes
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "index.html", "graph.json", "graph.npz"
    }  # fmt: skip
    graph = json.loads((tmp_path / "out" / "graph.json").read_text())
    assert graph["qkattr"]["bos"] == pair.bos and graph["qkattr"]["settings"]["notes"] == notes
    assert graph["metadata"]["scan"] == (pair.scan or model.rpartition("/")[2])
    assert {n["boundary"] for n in graph["nodes"] if n["kind"] == "feature"} == {*boundaries}


@pytest.mark.parametrize("name", PAIRS)
def test_every_sae_is_at_its_boundary_as_it_was_trained(root, published, name):
    """Compared with the arrays that were written, in the orientation of their format."""
    pair, (_, made) = PAIRS[name], published
    bundle = open_bundle(pairs.MODELS[pair.model].repo, pair.saes)
    written = {layer + 1: tensors for layer, tensors in made[pair.repo].items()}
    assert bundle.config.n_blocks == pairs.BLOCKS[pair.model]
    there = {b for b, d in enumerate(bundle.dictionaries) if d is not None}
    assert there == set(written) == {*range(pair.first, bundle.config.n_blocks + 1)}
    for boundary, tensors in written.items():
        dictionary = bundle.dictionaries[boundary]
        for field, tensor in zip(
            ("w_enc_DM", "w_dec_MD", "b_enc_M", "b_dec_D"), pair.tensors.split(), strict=True
        ):
            expected = tensors[tensor.lstrip("T")]
            expected = expected.T if tensor.startswith("T") else expected
            np.testing.assert_array_equal(np.asarray(getattr(dictionary, field)), expected)
        for field, value in dataclasses.asdict(dictionary.config).items():
            usual = {f.name: f.default for f in dataclasses.fields(dictionary.config)}
            assert value == pair.config.get(field, usual[field]), field
        factor = pair.factor and pair.factor(boundary - 1)
        assert factor == (dictionary.factor and pytest.approx(float(dictionary.factor)))
        if pair.threshold:
            np.testing.assert_allclose(
                dictionary.threshold_M, pair.threshold(boundary - 1, tensors), rtol=1e-6
            )


#: The same SAEs, named in other ways; each with its notes.
NAMED = [
    ("pythia", "EleutherAI/sae-pythia-70m-32k", PAIRS["pythia"].notes),
    ("pythia", "EleutherAI/sae-pythia-70m-32k:/layers.?", ()),
    ("pythia", "EleutherAI/sae-pythia-70m-32k@main:layers.?", (OF_OTHERS,)),
    ("pythia", "{copy}", (OF_OTHERS,)),
    ("pythia", "{copy}:/layers.?", ()),
    ("pythia", "{copy}:@16", (OF_OTHERS,)),
    ("gpt2", "jbloom/GPT2-Small-SAEs-Reformatted", PAIRS["gpt2"].notes),
    ("gemma 2", "google/gemma-scope-2b-pt-res:width_16k@60", ()),
    ("gemma 2", "{copy}:layer_*/width_16k@60", ()),
    ("gemma 3", "google/gemma-scope-2-270m-pt:16k,small", SCOPE_2),
    ("gemma 3", "google/gemma-scope-2-270m-pt/resid_post_all:width_16k@20", ()),
    ("gemma 3", "{copy}:width_16k_l0_small", ("36 SAEs of other hooks left out: 18 of model.",)),
    ("qwen", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", PAIRS["qwen"].notes),
    ("qwen", "{copy}", ()),
    ("llama", "{copy}", ()),
    ("llama", "fnlp/Llama3_1-8B-Base-LXR-8x:L*R-8x", ()),
]


@pytest.mark.parametrize("name, given, notes", NAMED)
def test_other_names_of_the_same_saes(root, name, given, notes):
    pair = PAIRS[name]
    model = pairs.MODELS[pair.model].repo
    saes = given.format(copy=copied(root, pair.repo))
    bundle, known = open_bundle(model, saes), open_bundle(model, pair.saes)
    assert len(bundle.notes) == len(notes)
    assert all(note in said for note, said in zip(notes, bundle.notes, strict=True))
    for ours, theirs in zip(bundle.dictionaries[1:], known.dictionaries[1:], strict=True):
        np.testing.assert_array_equal(ours.b_dec_D, theirs.b_dec_D)
        known_alone = "centre", "prepend_bos"
        same = dataclasses.replace(
            theirs.config, **{n: getattr(ours.config, n) for n in known_alone}
        )
        assert ours.config == same


def test_model_as_a_local_folder(root, capsys):
    """A copy of the snapshots, and no registry."""
    model, saes = (copied(root, r) for r in ("EleutherAI/pythia-70m", PAIRS["pythia"].repo))
    out, notes = run(capsys, "trace", "cat", "-m", model, "-s", saes, "--json", "--qk", 1)
    assert [OF_OTHERS in note for note in notes] == [True]
    assert json.loads(out)["qkattr"]["bos"] == f"no BOS, {WHY_TOKENIZER}"


PYTHIA, GEMMA_2, GEMMA_3 = "EleutherAI/pythia-70m", "google/gemma-2-2b", "google/gemma-3-270m"
SCOPE, SCOPE_3 = PAIRS["gemma 2"].repo, PAIRS["gemma 3"].repo
#: Model, SAEs and the line; `incomplete` is a copy without the SAE of block 3.
REFUSED = [
    (PYTHIA, "incomplete", "incomplete has no SAE for boundary 4 (12 SAEs of other hooks left out: "
     "6 of layers.N.attention (attention), 6 of layers.N.mlp (the MLP)); expected one after"),
    (PYTHIA, "incomplete:/layers.?", "incomplete:/layers.? has no SAE for boundary 4; expected"),
    (PYTHIA, "incomplete:layers.?.mlp", "no SAE of the residual stream, but 6 of layers.N.mlp"),
    (PYTHIA, "incomplete:layers.9", "no SAE below incomplete matches 'layers.9'; there are layer"),
    (GEMMA_2, f"{SCOPE}:65k", "has no layer_0/width_65k/average_l0_73/params.npz, which gemma-scop"
     "e-2b-pt-res needs, in the cache"),
    ("openai-community/gpt2", PAIRS["pythia"].saes,
     "qkattr: sae-pythia-70m-32k has no SAE for boundary 7, 8, 9, 10, 11, 12; expected"),
    (GEMMA_3, "gemma-scope-2b-pt-res", "boundary 19, the model has 18 blocks; load the SAEs"),
    (GEMMA_2, f"{SCOPE}:77k", f"no SAE below {SCOPE} matches '77k'; there are embedding/width_4k/"),
    (GEMMA_2, f"{SCOPE}:width_16k", f"choose with a pattern, as in '{SCOPE}:layer_9/width_16k/"),
    (GEMMA_2, f"{SCOPE}/layer_3", f"choose with a pattern, as in '{SCOPE}/layer_3:width_"),
    (GEMMA_2, MLP, f"qkattr: {MLP} holds no SAE of the residual stream, but 78 of blocks.N.mlp"),
    (GEMMA_2, f"{MLP}:16k", f"qkattr: {MLP}:16k holds no SAE of the residual stream, but 52 of"),
    (GEMMA_3, f"{SCOPE_3}/attn_out_all", f"qkattr: {SCOPE_3}/attn_out_all holds no SAE of the"),
    ("meta-llama/Llama-3.1-8B", "fnlp/Llama3_1-8B-Base-LXR-8x:L1R",
     "qkattr: fnlp/Llama3_1-8B-Base-LXR-8x:L1R has no SAE for boundary 1, 3, 4"),
]  # fmt: skip


@pytest.fixture(scope="module")
def incomplete(published):
    folder = published[0] / "incomplete"
    pairs.pythia_saes(folder)
    shutil.rmtree(folder / "layers.3")


@pytest.mark.parametrize("model, saes, line", REFUSED)
def test_wrong_saes_are_refused_by_the_name_that_was_given(
    root, incomplete, refused, model, saes, line
):
    assert line in refused("trace", "cat", "-m", model, "-s", saes)


def test_a_missing_sae_may_be_an_error_component(root, incomplete):
    bundle = open_bundle(PYTHIA, "incomplete", missing="raw")
    absent = [b for b, d in enumerate(bundle.dictionaries) if d is None]
    assert absent == [0, 4] and OF_OTHERS in bundle.notes[0]


@pytest.mark.parametrize(
    "model, said", [("pythia-70m", 0), (PYTHIA, 0), (f"{PYTHIA}@main", 0), ("{copy}", 0),
                    ("pythia-70m-deduped", 1), (f"{PYTHIA}-deduped", 1)],
)  # fmt: skip
def test_a_model_that_the_saes_were_not_trained_on_is_noted(root, model, said):
    """The widths and blocks of these two are the same."""
    bundle = open_bundle(model.format(copy=copied(root, PYTHIA)), PAIRS["pythia"].saes)
    note = f"{PAIRS['pythia'].saes}: trained on {PYTHIA}, and the model is {PYTHIA}-deduped"
    assert list(bundle.notes).count(note) == said
    assert len(bundle.notes) == said + len(PAIRS["pythia"].notes)
