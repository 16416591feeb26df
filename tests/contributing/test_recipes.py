"""docs/contributing.md followed in a copy of the package: a toy space, encoder and operator."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from latentguard.ops import library

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "latentguard"
MOST = 3
"""Files that a recipe may touch, besides tests and weights."""


class Tree:
    """A copy of the package, with what is heavy linked, and the files that were touched in it."""

    def __init__(self, folder: Path, compiled: bool) -> None:
        self.folder = folder
        self.touched: set[str] = set()
        shutil.copytree(
            PACKAGE,
            folder / "latentguard",
            ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors"),
        )
        for path in PACKAGE.rglob("*.safetensors"):
            (folder / path.relative_to(ROOT)).symlink_to(path)
        if compiled:
            for path in PACKAGE.glob("*.so"):
                (folder / path.relative_to(ROOT)).symlink_to(path)
        else:  # an installed extension would be found all the same
            facts = json.dumps({"reason": "this test runs the reference"})
            (folder / "latentguard" / "ops" / "_build.json").write_text(facts, encoding="utf-8")
        # `latentguard.policies` is a folder beside the package in the sources.
        (folder / "latentguard" / "policies").symlink_to(ROOT / "policies")

    def add(self, name: str, text: str) -> None:
        """A new file."""
        path = self.folder / "latentguard" / name
        assert not path.exists()
        path.write_text(text, encoding="utf-8")
        self.touched.add(name)

    def insert(self, name: str, after: str, text: str) -> None:
        """Text behind a line that occurs once."""
        path = self.folder / "latentguard" / name
        before = path.read_text(encoding="utf-8")
        assert before.count(after) == 1, f"{name}: {after!r} must occur once"
        path.write_text(before.replace(after, after + text), encoding="utf-8")
        self.touched.add(name)

    def run(self, code: str) -> str:
        """Python in the copy; its output."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path, compiled=False)


# --- a latent space --------------------------------------------------------------------------

SPACE = {
    "schema_version": 1,
    "summary": "a toy",
    "channels": 8,
    "factor": 8,
    "scaling": {"scale": 0.5, "shift": 0.25},
    "packing": {"patch": 2, "order": "c dy dx"},
    "rgb_view": {"acts_on": "scaled", "factors": [[0.1, 0.2, 0.3]] * 8},
    "vae": {"name": "the toy's VAE", "classes": ["AutoencoderToy"]},
    "pipelines": ["Toy"],
}
USE_SPACE = """
import sys
import numpy as np
from latentguard.files import read_arrays
from latentguard.policy import parse_policy
from latentguard.spaces import LatentArray, LatentSpace, array_preview

space = LatentSpace.get("toy")
config = {"latent_channels": 8, "scaling_factor": 0.5, "shift_factor": 0.25}
assert LatentSpace.from_vae_config(config).name == "toy"
assert LatentSpace.from_vae_config(config, ["AutoencoderToy"]).name == "toy"
assert LatentSpace.of_pipeline("ToyPipeline") == space
assert space.packed_channels == 32

raw = np.random.default_rng(0).normal(size=(2, 8, 6, 4)).astype(np.float32)
array = LatentArray(raw, space, scaled=False)
np.testing.assert_allclose(array.to_scaled().array, (raw - 0.25) * 0.5, rtol=1e-6)
np.testing.assert_allclose(array.to_scaled().to_raw().array, raw, rtol=1e-5, atol=1e-6)
assert array_preview(array.to_scaled()).shape[0] == 2

np.savez("toy.npz", latents=raw, space="toy", scaled=False)
records = list(read_arrays("toy.npz"))
assert [record.error for record in records] == [None, None], records
assert records[1].latents.space.name == "toy"
np.testing.assert_array_equal(records[1].latents.array[0], raw[1])
np.savez("bare.npz", latents=raw)
assert all(record.error for record in read_arrays("bare.npz")), "a space without statistics"
assert "torch" not in sys.modules
"""


def test_a_space_is_one_file(tree: Tree) -> None:
    tree.add("spaces/data/toy.json", json.dumps(SPACE))
    tree.run(USE_SPACE)
    assert tree.touched == {"spaces/data/toy.json"}


# --- an encoder ------------------------------------------------------------------------------

ENCODER = '''"""A toy encoder: a linear map of averaged latents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.encoders.base import EncoderBase, Features, Head
from latentguard.encoders.catalog import Entry
from latentguard.errors import LatentsError
from latentguard.spaces import Latents


class ToyEncoder(EncoderBase):
    """16 dimensions of the mean of each channel."""

    fixed_size = True
    needs_scaled = True
    dim = 16
    logit_scale = 10.0
    head = Head()
    neutral_prompts = ("anything",)
    always_neutral = False
    uses_templates = False
    notes = "a toy"
    min_coverage = 0.5
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, name: str, space: str, weight: Tensor, sha256: str) -> None:
        self.name, self.space, self.sha256 = name, space, sha256
        self.weight = weight

    def features(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Features:
        pooled = latents.float().mean((2, 3)) @ self.weight
        return Features(pooled, pooled[:, None], (1, 1))

    def encode_latents(self, latents: Latents) -> Tensor:
        if latents.space.name != self.space:
            raise LatentsError(f"{self.name} reads {self.space}, got {latents.space.name}")
        return self.head.embed(self.features(latents.to_spatial().to_scaled().tensor).pooled)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        rows = [torch.tensor([float(b) for b in hashlib.md5(t.encode()).digest()]) for t in texts]
        return F.normalize(torch.stack(rows) - 128, dim=-1)

    def coverage(self, texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        return self


def load(path: Path, device: Any = None, entry: Entry | None = None) -> ToyEncoder:
    data = path.read_bytes()
    weight = safetensors.torch.load(data)["weight"]
    space = "flux1" if entry is None else entry.space
    return ToyEncoder(path.stem, space, weight, hashlib.sha256(data).hexdigest())
'''
USE_ENCODER = """
import torch
from latentguard import Latents, Scorer
from latentguard.encoders import Encoder, best_encoder, load_encoder, traits
from latentguard.policy import parse_policy

encoder = load_encoder("toy-flux1")
assert isinstance(encoder, Encoder), type(encoder)
assert traits(encoder).fixed_size and not traits(encoder).variant
assert best_encoder("flux1") == "toy-flux1"
policy = parse_policy(b'''
schema_version: 1
name: toy
version: "1"
contrast: [dog, house]
concepts:
  - id: guns
    category: weapons
    prompts: [revolver, pistol]
    threshold: {probability: 0.0}
    action: block
''', "toy.yaml")
latents = Latents(torch.randn(2, 16, 8, 8), "flux1", scaled=True)
verdicts = Scorer(policy, "toy-flux1", device="cpu").verdicts(latents)
assert [v.decision for v in verdicts] == ["block", "block"], verdicts
try:
    load_encoder("toy-flux1+merge=0.5")
except Exception as error:
    print(error)
"""


def test_an_encoder_is_a_json_file_a_module_and_a_line(tree: Tree) -> None:
    import torch
    from safetensors.torch import save_file

    described = {
        "rank": 1,
        "format": "toy-format",
        "space": "flux1",
        "summary": "a toy",
    }
    tree.add("encoders/models/toy-flux1.json", json.dumps(described))
    tree.add("encoders/toy.py", ENCODER)
    tree.insert(
        "encoders/catalog.py", "FORMATS = {\n", '    "toy-format": "latentguard.encoders.toy",\n'
    )
    weights = tree.folder / "latentguard" / "encoders" / "weights" / "toy-flux1.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"weight": torch.randn(16, 16, generator=generator)}, weights)
    said = tree.run(USE_ENCODER)
    assert "toy-flux1 has no tokens to merge" in said
    assert len(tree.touched) == MOST


def test_another_size_of_latent_clip_is_a_json_file(tree: Tree) -> None:
    path = PACKAGE / "encoders" / "models" / "latent-clip-b8.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described |= {"space": "sd3", "rank": 1}
    described["config"] |= {"patch": 2, "channels": 16, "embed_dim": 64, "text_width": 64}
    described["config"] |= {"width": 64, "layers": 2, "text_layers": 1}
    tree.add("encoders/models/latent-clip-s2.json", json.dumps(described))
    tree.run(
        "import torch\n"
        "from latentguard import Latents\n"
        "from latentguard.encoders.latent_clip import LatentCLIP\n"
        "encoder = LatentCLIP.random('latent-clip-s2')\n"
        "latents = Latents(torch.randn(1, 16, 64, 64), 'sd3', scaled=False)\n"
        "assert encoder.encode_latents(latents).shape == (1, 64)\n"
    )
    assert len(tree.touched) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "`format` must be latentguard-latent-clip or latentguard-nano"),
        ({"color": "red"}, "not a model's description"),
        ({"config": {"patch": 7, "embed_dim": 64, "text_width": 64}}, "multiple of `patch`"),
        ({"space": None, "config": {}}, "not a model's description"),
    ],
)
def test_a_wrong_description_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    from latentguard.encoders.catalog import Entry
    from latentguard.errors import ModelError

    path = PACKAGE / "encoders" / "models" / "latent-clip-b8.json"
    described = json.loads(path.read_text(encoding="utf-8")) | changes
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        Entry.read(wrong)


# --- an operator -----------------------------------------------------------------------------

REFERENCE = '''

@flat
def shift(x: Tensor, scale: float) -> Tensor:
    """x + scale."""
    return (x.to(_compute_dtype(x)) + scale).to(x.dtype)


@flat
def shift_backward(grad: Tensor, scale: float) -> Tensor:
    """Its gradient."""
    return grad.clone()
'''
USE_OPERATOR = """
import torch
from latentguard import ops
from latentguard.ops import library, onnx

x = torch.randn(3, 4, requires_grad=True)
out = ops.shift(x, 2.0)
torch.testing.assert_close(out, x + 2)
(gradient,) = torch.autograd.grad(out.sum(), x)
torch.testing.assert_close(gradient, torch.ones_like(x))
torch.testing.assert_close(ops.shift(x.double(), 2.0), x.double() + 2)
assert torch.ops.latentguard.shift.default in onnx.translations()
for wrong in (ops.shift, torch.ops.latentguard.shift):
    try:
        wrong(x, float("inf"))
    except RuntimeError as error:
        assert "`shift`: `scale` must be a finite number, got inf" in str(error)
    else:
        raise AssertionError("nothing was raised")
print(library.extension is not None)
"""


@pytest.mark.parametrize("compiled", [False, True], ids=["reference", "extension"])
def test_an_operator_is_three_files_and_runs_without_a_kernel(
    tmp_path: Path, compiled: bool
) -> None:
    if compiled and library.extension is None:
        pytest.skip(f"needs the compiled extension: {library.missing}")
    tree = Tree(tmp_path, compiled)
    template = (PACKAGE / "ops" / "null.py").read_text(encoding="utf-8")
    operator = template.replace("null", "shift").replace("op.Mul", "op.Add")
    tree.add("ops/shift.py", operator)
    last = "    return (grad.to(_compute_dtype(grad)) * scale).to(grad.dtype)\n"
    tree.insert("ops/reference.py", last, REFERENCE)
    line = "from latentguard.ops.patch_embed import patch_embed\n"
    tree.insert("ops/__init__.py", line, "from latentguard.ops.shift import shift\n")
    assert tree.run(USE_OPERATOR).strip() == str(compiled)
    assert len(tree.touched) == MOST


def test_a_schema_that_the_kernel_does_not_have_is_refused(tmp_path: Path) -> None:
    """The schema stands in Python alone; torch compares it with the kernel's C++ types."""
    if library.extension is None:
        pytest.skip(f"needs the compiled extension: {library.missing}")
    tree = Tree(tmp_path, compiled=True)
    path = tmp_path / "latentguard" / "ops" / "null.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"(Tensor x, float scale)', '"(Tensor x, int scale)'))
    said = tree.run(
        "try:\n    import latentguard.ops\nexcept RuntimeError as error:\n    print(error)"
    )
    assert "latentguard::null" in said
    assert "int" in said
