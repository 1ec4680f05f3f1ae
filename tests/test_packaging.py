"""What is shipped: a wheel that works wherever it is put, without Triton too; it shadows nobody."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fused_losses

ROOT = Path(__file__).parents[1]

WITHOUT_TRITON = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, NoTriton())

import torch
import torch.nn.functional as F
import fused_losses
from fused_losses import reference

assert fused_losses.__file__.startswith(sys.argv[1]), fused_losses.__file__
hidden = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]])
weight = torch.tensor([[0.5, 1.0], [-1.0, 0.25], [2.0, -0.5], [0.0, 1.5]])
target = torch.tensor([2, -100, 1])
ref_logps = torch.tensor([-1.0, 0.0, -2.0])


def check(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def loss_and_gradients(fn, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = fn(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]
"""


def build(kind: str, out: Path, root: Path) -> Path:
    """Build a wheel or an sdist of the tree at root, without the network."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, root]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


def run(script: str, *args: object, path: list[Path], cwd: Path) -> str:
    """Run a script in a new interpreter that looks in path first; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"), ROOT)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel has been installed: nothing of the checkout is in it."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", target, wheel], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_both_packages_whole_and_nothing_else(wheel):
    expected = {
        path.relative_to(source_root).as_posix()
        for source_root, package in (
            (ROOT, "fused_losses"),
            (ROOT / "kernels", "fused_losses_kernels"),
        )
        for path in (source_root / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    shipped = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert shipped == expected
    assert {"fused_losses/py.typed", "fused_losses_kernels/py.typed"} <= shipped


def test_the_wheel_carries_the_license_and_says_what_it_needs(wheel):
    about = metadata(wheel)
    needs = [Requirement(text) for text in about.get_all("Requires-Dist")]
    always = {need.name: need for need in needs if "extra" not in str(need.marker)}
    assert always.keys() == {"torch", "triton"}
    assert always["torch"].marker is None
    assert always["triton"].marker.evaluate({"sys_platform": "linux"})
    assert not always["triton"].marker.evaluate({"sys_platform": "darwin"})
    assert set(about.get_all("Provides-Extra")) == {
        "train",
        "trl",
        "bench",
        "examples",
        "peft",
        "docs",
        "dev",
    }
    assert about["Version"] == fused_losses.__version__
    assert about["License-Expression"] == "Apache-2.0"
    (shipped,) = [text for name, text in contents(wheel).items() if name.endswith("/LICENSE")]
    assert shipped == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    sdist = build("sdist", tmp_path / "sdist", ROOT)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / "again", tmp_path / sdist.name.removesuffix(".tar.gz"))
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_losses_and_gradients_are_right_where_triton_does_not_exist(installed, tmp_path):
    script = (
        WITHOUT_TRITON
        + """
eager = loss_and_gradients(lambda h, w: F.cross_entropy(h @ w.T, target), hidden, weight)
for fn in (
    lambda h, w: fused_losses.linear_mle_loss(h, w, target, backend="torch"),
    lambda h, w: fused_losses.linear_mle_loss(h, w, target),
    lambda h, w: fused_losses.mle_loss(h @ w.T, target),
    lambda h, w: reference.linear_mle_loss(h, w, target),
    lambda h, w: reference.mle_loss(h @ w.T, target),
):
    for actual, expected in zip(loss_and_gradients(fn, hidden, weight), eager, strict=True):
        check(actual, expected)

def hellinger(h, w):  # r / (1 + r) with beta = 1 and value = 0; no r is near the continuation
    logps = torch.log_softmax(h @ w.T, -1)[[0, 2], [2, 1]]
    r = logps - ref_logps[[0, 2]]
    assert (r > -0.5).all()
    return -(r / (1 + r)).mean()

weight = weight / 4
eager = loss_and_gradients(hellinger, hidden, weight)
for module in (fused_losses, reference):
    fn = lambda h, w: module.linear_hellinger_loss(h, w, target, ref_logps)
    for actual, expected in zip(loss_and_gradients(fn, hidden, weight), eager, strict=True):
        check(actual, expected)
assert not [name for name in sys.modules if name.partition(".")[0] == "triton"]
print("right")
"""
    )
    assert run(script, installed, path=[installed], cwd=tmp_path) == "right\n"


def test_asking_for_triton_where_it_does_not_exist_says_so(installed, tmp_path):
    script = (
        WITHOUT_TRITON
        + """
try:
    fused_losses.mle_loss(hidden, torch.tensor([0, 1, -100]), backend="triton")
except (ValueError, ImportError) as error:
    print(error)
"""
    )
    message = run(script, installed, path=[installed], cwd=tmp_path)
    assert "backend" in message
    assert "Triton is not installed" in message
    assert "backend='torch'" in message


def test_the_installed_library_leaves_the_name_kernels_to_its_owner(installed, tmp_path):
    assert sorted(path.name for path in installed.iterdir() if "." not in path.name) == [
        "fused_losses",
        "fused_losses_kernels",
    ]
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'somebody else'\n")
    script = """
        import fused_losses, kernels, fused_losses_kernels
        print(kernels.owner)
    """
    for ours in ([installed], [ROOT, ROOT / "kernels"]):
        assert run(script, path=[*ours, tmp_path], cwd=ROOT / "tests") == "somebody else\n"


def test_folders_on_the_path_are_not_packages():
    for folder in ("kernels", "tests", "benchmarks", "examples"):
        assert (ROOT / folder).is_dir()
        assert not (ROOT / folder / "__init__.py").exists(), folder


def pins() -> dict[str, str]:
    """The versions of constraints.txt; a line of any other form, a path or an address, fails."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    matches = {
        line: re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        for line in lines
        if line and not line.startswith("#")
    }
    assert None not in matches.values(), [line for line, match in matches.items() if not match]
    return {canonicalize_name(match[1]): match[2] for match in matches.values()}


def test_every_dependency_has_a_pin_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    needs = [Requirement(text) for group in (project["dependencies"], *extras) for text in group]
    pinned = pins()
    assert pinned["torch"] == "2.13.0"
    assert pinned["triton"] == "3.8.0"
    for need in needs:
        if need.name != project["name"]:
            assert need.specifier.contains(pinned[canonicalize_name(need.name)]), str(need)
