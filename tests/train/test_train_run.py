"""Whole runs: what is written, going on after a stop, full disks, values that are not finite."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import within
from training import SETTINGS, toml

from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.load.dictionaries import load_saes
from qkattr.sharding import make_mesh
from qkattr.sources.dictionary import activations, reconstruct
from qkattr.train.config import ACTIVATIONS, TrainConfig
from qkattr.train.run import measure, train
from qkattr.train.sae import loss
from qkattr.train.stream import Stream

#: Scaled units against residual units, in float32.
SAME = 2e-5


def config(**changes) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, **changes})


def command(root, out, *, config=None) -> list[str]:
    return [
        "train", str(config or root / "run.toml"), "-m", str(root / "model"), "--text",
        str(root / "rows.npy"), "--out", str(out),
    ]  # fmt: skip


def weights(out: Path) -> dict:
    return {
        f"{folder.name}/{name}": tensor
        for folder in sorted((out / "saes").iterdir())
        for name, tensor in load_file(folder / "sae_weights.safetensors").items()
    }


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name], err_msg=name)


@pytest.fixture(scope="module")
def unbroken(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    assert main(command(root, out)) == 0
    return out


def test_a_run_leaves_saes_metrics_and_a_log(root, small, rows, unbroken):
    saes = load_saes(unbroken / "saes", small.config)
    assert [d is None for d in saes] == [True, False, False]
    report = json.loads((unbroken / "metrics.json").read_text())
    assert [b["boundary"] for b in report["boundaries"]] == [1, 2]
    assert report["rows"] == SETTINGS["held_out"]
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[-1]["loss"][0] < lines[0]["loss"][0] and lines[-1]["l0"] == [4.0, 4.0]
    assert sorted(p.name for p in (unbroken / "checkpoints").iterdir()) == ["15", "20"]


@pytest.mark.parametrize("n,drawn", [(1, [1]), (2, [1, 2]), (5, [1, 2, 3, 4, 5]), (7, [1, 7])])
def test_the_figure_has_the_first_and_the_last_boundary(n, drawn, tmp_path):
    """All of them where there are few."""
    pytest.importorskip("matplotlib")
    from qkattr.export.training_figure import draw_training

    line = dict(step=10, tokens=320, unexplained=[0.5] * n)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    names = ("loss_recovered", "median_relative_error", "unexplained_variance")
    rows = [dict(boundary=b + 1, **dict.fromkeys(names, 0.5)) for b in range(n)]
    path = draw_training(tmp_path / "metrics.jsonl", dict(boundaries=rows), tmp_path / "run.svg")
    said = {int(b) for b in re.findall(r">boundary (\d+)<", path.read_text())}
    assert said >= set(drawn) and len(said) == min(n, 5)


def test_it_learns(root, small, rows, tmp_path):
    longer = train(small, rows, config(tokens=32 * 300), out=tmp_path / "long")
    short = train(small, rows, config(tokens=32), out=tmp_path / "short")
    few = measure(small, short, rows, config(), out=tmp_path / "short")["boundaries"]
    many = measure(small, longer, rows, config(), out=tmp_path / "long")["boundaries"]
    for before, after in zip(few, many, strict=True):
        assert after["unexplained_variance"] < 0.8 * before["unexplained_variance"]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_saved_saes_compute_what_was_trained(kind, small, rows, tmp_path):
    """In residual units the same features fire, and the reconstruction is the same but for c."""
    cfg = config(activation=kind, threshold=0.5, slots=24 if kind != "topk" else 0, sparse=False)
    from qkattr.train import run as module

    kept = {}
    original = module.dictionaries

    def keep(state, scale, *, cfg):
        kept.update(state=state, scale=scale)
        return original(state, scale, cfg=cfg)

    module.dictionaries, put_back = keep, module.dictionaries
    try:
        trained = train(small, rows, cfg, out=tmp_path / "out")
    finally:
        module.dictionaries = put_back
    stream = Stream(small.params, rows[:-4], small.config, cfg, scale=kept["scale"])
    x, weight = stream.batch(2)
    loaded = load_saes(tmp_path / "out" / "saes", small.config)[1:]
    for b, (sae, on_disk) in enumerate(zip(trained, loaded, strict=True)):
        scale = float(kept["scale"][b])
        mine = type(kept["state"].sae)(
            **{k: None if v is None else v[b] for k, v in vars(kept["state"].sae).items()}
        )
        _, rebuilt = reconstruct(on_disk, x[b] / scale)
        error = (weight[b] * jnp.square(x[b] - scale * rebuilt).sum(-1)).sum()
        if kind == "batchtopk":  # trained by rank in the batch, saved with a threshold
            pre = (x[b] - mine.b_dec_D) @ mine.w_enc_MD.T + mine.b_enc_M
            a = jnp.where(pre > kept["state"].threshold[b], pre, 0)
            within("batchtopk", activations(on_disk, x[b] / scale) * scale, a, SAME, 10)
        else:
            _, seen = loss(mine, x[b], weight[b], jnp.zeros(cfg.width, bool), cfg=cfg)
            within("error", error, seen.error, SAME, float(seen.error))
        np.testing.assert_array_equal(sae.w_dec_MD, on_disk.w_dec_MD)
        assert on_disk.config.activation == ("topk" if kind == "topk" else "jumprelu")


def test_a_run_starts_from_saes_without_a_change(small, rows, unbroken, tmp_path):
    """One step at rate zero gives the set back."""
    cfg = config(start=str(unbroken / "saes"), tokens=32, lr=0.0)
    train(small, rows, cfg, out=tmp_path)
    first, second = weights(unbroken), weights(tmp_path)
    for name, tensor in first.items():
        within(name, second[name], tensor, 1e-6, max(1.0, float(np.abs(tensor).max())))


def test_on_a_mesh_a_run_is_the_same(small, rows, unbroken, tmp_path):
    train(small, rows, config(), out=tmp_path, mesh=make_mesh(2, 4))
    first, second = weights(unbroken), weights(tmp_path)
    for name, tensor in first.items():  # 20 Adam steps with sums in another order
        within(name, second[name], tensor, 5e-3, max(1.0, float(np.abs(tensor).max())))


def child(code: str, *arguments) -> subprocess.CompletedProcess:
    """A process of its own, on one device."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        check=False,
    )


RUN = "import sys; from qkattr.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("after", [5, 10, 15])
def test_a_stopped_run_goes_on_bit_for_bit(after, small, rows, root, unbroken, tmp_path):
    class Stop(Exception):
        pass

    from qkattr.train.checkpoints import Checkpoints

    save = Checkpoints.save

    def then_stop(self, step, *arguments):
        save(self, step, *arguments)
        if step == after:
            raise Stop

    Checkpoints.save = then_stop
    try:
        with pytest.raises(Stop):
            train(small, rows, config(), out=tmp_path)
    finally:
        Checkpoints.save = save
    train(small, rows, config(), out=tmp_path)
    assert_same_weights(unbroken, tmp_path)


def test_another_run_in_the_same_folder_is_refused(small, rows, unbroken, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(unbroken, out)
    with pytest.raises(InputError, match=r"holds a run with lr=0.01, this one has 0.02"):
        train(small, rows, config(lr=0.02), out=out)
    other = np.array(rows)
    other[0, 3] += 1
    with pytest.raises(InputError, match="holds a run with text="):
        train(small, other, config(), out=out)
    assert_same_weights(unbroken, out)


def test_a_full_disk_leaves_the_last_checkpoint_whole(root, unbroken, tmp_path):
    """A limit on the size of files stands for a full disk; the run goes on when there is room."""
    out = tmp_path / "out"
    code = (
        "import sys, resource, signal\n"
        "from qkattr.train.checkpoints import Checkpoints\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save = Checkpoints.save\n"
        "def full(self, step, *a):\n"
        "    if step == 10: resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))\n"
        "    save(self, step, *a)\n"
        "Checkpoints.save = full\n"
        "from qkattr.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = child(code, *command(root, out))
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]  # the bar comes before
    assert last.startswith("qkattr: cannot use ") and last.endswith("; give another path")
    assert "Traceback" not in done.stderr
    whole = [p.name for p in (out / "checkpoints").iterdir() if p.name.isdecimal()]
    assert whole == ["5"]
    for folder in (out, tmp_path / "whole"):
        done = child(RUN, *command(root, folder))
        assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "whole", out)


# Runs a command again and again, killed after 1 to 10 further steps and up to 50 ms more, until the
# given number of kills; then lets it end. Forked children spare the imports; JAX starts in them.
KILLED = """
import os, random, signal, sys, threading
from qkattr.cli.main import main
from qkattr.train.stream import Stream
kills, *command = sys.argv[1:]
random.seed(4)
batch, left = Stream.batch, None

def counted(self, step):
    global left
    if left == 0:
        threading.Timer(jitter, os.kill, (os.getpid(), signal.SIGKILL)).start()
    left = None if left is None else left - 1
    return batch(self, step)

Stream.batch = counted
for kill in range(int(kills) + 1):
    left, jitter = random.randint(1, 10), random.random() / 20
    if kill == int(kills):
        left = None
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        os._exit(main(command))
    status = os.waitpid(child, 0)[1]
    print("killed" if os.WIFSIGNALED(status) else f"ended {os.waitstatus_to_exitcode(status)}")
"""


@pytest.mark.slow
def test_a_run_killed_four_times_ends_as_if_it_had_not_been(root, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(toml(tokens=32 * 60, checkpoint_every=3))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = child(RUN, *command(root, whole, config=config))
    assert done.returncode == 0, done.stderr
    done = child(KILLED, 4, *command(root, broken, config=config))
    assert done.stdout.split() == ["killed"] * 4 + ["ended", "0"], done.stderr
    assert_same_weights(whole, broken)
    lines = (broken / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(10, 61, 10))


def test_a_loss_that_is_not_finite_stops_the_run(small, rows, tmp_path, monkeypatch):
    original = Stream.batch

    def spoilt(self, step):
        x, weight = original(self, step)
        return (x.at[1, 3].set(jnp.nan), weight) if step == 12 else (x, weight)

    monkeypatch.setattr(Stream, "batch", spoilt)
    with pytest.raises(InputError, match=r"boundary 2 is not finite at step 13; .* after step 10"):
        train(small, rows, config(), out=tmp_path)
    assert (tmp_path / "checkpoints" / "10").is_dir()
    assert not (tmp_path / "saes").exists()


def test_weights_that_are_not_finite_are_not_kept(small, rows, tmp_path, monkeypatch):
    """A step may have a finite loss and leave weights that are not."""
    from qkattr.train import parts as module

    monkeypatch.setattr(module, "cores", lambda: 1)
    original = module.train_step

    def spoilt(state, *arguments, **options):
        state, seen = original(state, *arguments, **options)
        after = int(state.opt[1].count[0])
        if after == 20:
            w = state.sae.w_enc_MD.at[1, 3].set(jnp.nan)
            state = dataclasses.replace(state, sae=dataclasses.replace(state.sae, w_enc_MD=w))
        return state, seen

    monkeypatch.setattr(module, "train_step", spoilt)
    said = r"a weight of boundary 2 is not finite at step 20; .* after step 15"
    with pytest.raises(InputError, match=said):
        train(small, rows, config(), out=tmp_path)
    assert not (tmp_path / "checkpoints" / "20").exists() and not (tmp_path / "saes").exists()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_parts_side_by_side_are_one_after_another(n, small, rows, unbroken, tmp_path, monkeypatch):
    """Bit for bit, whatever the number of cores."""
    from qkattr.train import parts

    monkeypatch.setattr(parts, "cores", lambda: n)
    train(small, rows, config(), out=tmp_path / "out")
    assert_same_weights(unbroken, tmp_path / "out")


def test_two_processes_share_a_run(root, unbroken, tmp_path):
    """They find each other as under Slurm; the first alone writes and speaks."""
    out, port = tmp_path / "out", str(os.getpid())
    slurm = dict(
        SLURM_JOB_ID=port, SLURM_STEP_NODELIST="127.0.0.1", SLURM_NTASKS="2",
        SLURM_STEP_NUM_NODES="1", JAX_NUM_CPU_DEVICES="1",
    )  # fmt: skip
    line = [*command(root, out), "--distributed", "--mesh", "1,2", "--set", "sparse=true"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, **slurm, "SLURM_PROCID": n, "SLURM_LOCALID": n},
        )
        for n in "01"
    ]  # fmt: skip
    ended = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert "Written: " in ended[0][0] and "Written: " not in ended[1][0]
    first, second = weights(unbroken), weights(out)
    for name, tensor in first.items():
        within(name, second[name], tensor, 5e-3, max(1.0, float(np.abs(tensor).max())))


READ = """
import sys, json, warnings
warnings.simplefilter("ignore")
import torch
from sae_lens import SAE
from pathlib import Path
out = {}
x = torch.tensor(json.load(sys.stdin))
for folder in sys.argv[1:]:
    sae = SAE.load_from_disk(folder, device="cpu")
    out[folder] = [sae.encode(x).tolist(), sae.decode(sae.encode(x)).tolist()]
print(json.dumps(out))
"""


@pytest.mark.slow
def test_saelens_reads_the_set_and_computes_the_same(small, unbroken, tmp_path, rows):
    jump = tmp_path / "jump"
    train(small, rows, config(activation="jumprelu", threshold=0.5), out=jump)
    folders = [p for root in (unbroken, jump) for p in sorted((root / "saes").iterdir())]
    x = np.random.default_rng(0).normal(size=(6, small.config.d_model)).astype(np.float32)
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, folders)], input=json.dumps(x.tolist()),
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    for folder in folders:
        root = folder.parent
        mine = load_saes(root, small.config)[1 + int(folder.name.split(".")[1])]
        a, rebuilt = reconstruct(mine, x)
        within("encode", theirs[str(folder)][0], a, SAME, float(jnp.abs(a).max()))
        within("decode", theirs[str(folder)][1], rebuilt, SAME, float(jnp.abs(rebuilt).max()))


def test_the_config_file_is_what_runs(root, tmp_path):
    from qkattr.train.config import read_config

    path = tmp_path / "run.toml"
    path.write_text(toml(activation="batchtopk"))
    cfg = read_config(path, lr=3e-3)
    assert (cfg.width, cfg.activation, cfg.slots, cfg.lr) == (24, "batchtopk", 16, 3e-3)
    assert cfg.steps == 20 and cfg.batches == 2
