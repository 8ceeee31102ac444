"""Files that SAELens itself writes, in every architecture and normalisation it has, give what it
computes: read here, written and run there by another process, since it fills the memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
from test_formats import CLOSE, MODEL, near

from qkattr.load.dictionaries import Options, load_saes
from qkattr.sources.dictionary import reconstruct

D, M, T = MODEL.d_model, 24, 7
FACTOR = 0.37
NORMS = (
    "none",
    "expected_average_only_in",
    "constant_norm_rescale",
    "layer_norm",
    "covariance_whitening",  # folded into the weights before they are saved, as training ends
)
KINDS = ("standard", "gated", "topk", "topk-rescaled", "jumprelu", "batchtopk", "matryoshka")

WRITE = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from pathlib import Path
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
root, d, m, factor = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
x = torch.tensor(np.load(root / "x.npy"))
out = {}
for kind in sys.argv[5].split(","):
    for norm in sys.argv[6].split(","):
        for b_dec in (True, False):
            torch.manual_seed(0)
            name = f"{kind}-{norm}-{b_dec}"
            own = dict(k=5) if "topk" in kind else {}
            own |= dict(rescale_acts_by_decoder_norm=True) if kind == "topk-rescaled" else {}
            if kind == "matryoshka":
                own = dict(k=5, matryoshka_widths=[m // 2, m])
            training = {"batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}.get(kind)
            common = dict(d_in=d, d_sae=m, apply_b_dec_to_input=b_dec, normalize_activations=norm)
            if training:
                cls, config = get_sae_training_class(training)
            else:
                cls, config = get_sae_class(kind.removesuffix("-rescaled"))
            sae = cls(config(**common, **own))
            with torch.no_grad():
                for parameter in sae.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.5)
                if hasattr(sae, "threshold"):
                    sae.threshold.copy_(torch.rand(m) * 0.5)
                if training:
                    sae.topk_threshold.fill_(0.6)
            if norm == "covariance_whitening":
                mix = torch.randn(d, d) * 0.1 + torch.eye(d)
                sae.fold_activation_whitening(torch.randn(d), mix, torch.linalg.inv(mix))
            sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
            (sae.save_inference_model if training else sae.save_model)(root / name / "sae")
            sae = SAE.load_from_disk(root / name / "sae", device="cpu")
            if norm == "expected_average_only_in":
                sae.fold_activation_norm_scaling_factor(factor)
            with torch.no_grad():
                acts = sae.encode(x)
                rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
                out[name + ".acts"] = acts / (sae.W_dec.norm(dim=-1) if rescaled else 1)
                sae.encode(x)  # the norm of a token is kept for one decode
                out[name + ".out"] = sae.decode(acts)
np.savez(root / "theirs.npz", **{n: t.numpy() for n, t in out.items()})
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    pytest.importorskip("sae_lens")
    root = tmp_path_factory.mktemp("saelens")
    x = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32) * 2 + 0.5
    np.save(root / "x.npy", x)
    sizes = [str(v) for v in (D, M, FACTOR)]
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(root), *sizes, ",".join(KINDS), ",".join(NORMS)],
        capture_output=True, text=True, check=False, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(root / "theirs.npz") as file:
        return root, x, dict(file)


@pytest.mark.parametrize("b_dec", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_saelens(theirs, kind, norm, b_dec):
    root, x, computed = theirs
    name = f"{kind}-{norm}-{b_dec}"
    scaled = norm == "expected_average_only_in"
    options = Options(norm_factors={"blocks.1.hook_resid_post": FACTOR} if scaled else {})
    sae = load_saes(root / name, MODEL, missing="raw", options=options)[2]
    acts, out = reconstruct(sae, x)
    assert (computed[f"{name}.acts"] > 0).any()
    near(acts, computed[f"{name}.acts"], CLOSE)
    near(out, computed[f"{name}.out"], CLOSE)


def test_configs_from_before_version_6(theirs, tmp_path):
    """The flat config with its older names is the same SAE."""
    root, x, computed = theirs
    for kind, activation in (("standard", "relu"), ("topk", "topk"), ("gated", "relu")):
        name = f"{kind}-none-True"
        folder = tmp_path / kind
        folder.mkdir()
        weights = (root / name / "sae" / "sae_weights.safetensors").read_bytes()
        (folder / "sae_weights.safetensors").write_bytes(weights)
        flat = dict(d_in=D, d_sae=M, hook_point="blocks.1.hook_resid_post", model_name="tiny",
                    normalize_activations=False, activation_fn_str=activation)  # fmt: skip
        flat |= dict(activation_fn_kwargs={"k": 5}) if kind == "topk" else {}
        flat |= dict(architecture="gated") if kind == "gated" else {}
        (folder / "cfg.json").write_text(json.dumps(flat))
        acts, out = reconstruct(load_saes(folder, MODEL, missing="raw")[2], x)
        near(acts, computed[f"{name}.acts"])
        near(out, computed[f"{name}.out"])
