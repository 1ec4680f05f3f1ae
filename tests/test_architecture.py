"""The rules of the house, read off the source: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import graphlib
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import fused_losses

ROOT = Path(__file__).parents[1]

# A part of fused_losses imports parts of lower rows only; `__init__` is its table of contents.
LAYERS = (
    {"arguments"},
    {"stats", "token_losses", "preference", "policy", "divergences"},
    {"sparse_teacher"},
    {"backends", "reference"},
    {"cost"},
    {"chunk_bytes"},
    {"strips"},
    {"plan"},
    {"engine"},
    {"functional"},
    {"modules"},
    {"__init__"},
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# These stand on the public API, and nobody in the core imports them. A trainer's config shows and
# checks the names of the pair losses, which `preference` holds.
ON_TOP = {
    "trainer": {"__init__", "reference", "integrations", "preference"},
    "integrations": {"__init__", "reference"},
}
# What these import of the project, and nothing else of it.
ONLY = {
    "stats": set(),
    "arguments": set(),
    "preference": {"arguments"},
    "divergences": {
        "arguments",
        "fused_losses_kernels.language",
        "fused_losses_kernels.elementary",
    },
    "sparse_teacher": {"arguments", "divergences"},
    "policy": {"arguments"},
    "token_losses": {"fused_losses_kernels.language", "fused_losses_kernels.elementary"},
    "reference": {"arguments", "stats", "token_losses", "preference", "policy"}
    | {"divergences", "sparse_teacher"},
}
MAX_LINES = 300


def source_files(root: Path) -> dict[str, Path]:
    """Map the dotted name of every module of the two packages to its file."""
    found = {}
    for package in (root / "fused_losses", root / "kernels" / "fused_losses_kernels"):
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Dotted names of what a module imports anywhere in it, down to modules in the project."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                member = f"{base}.{alias.name}"
                found.add(member if member in modules else base)
    return found


def part_of(name: str) -> str:
    """`engine` for fused_losses.engine.linear, `__init__` for fused_losses itself."""
    return [*name.split("."), "__init__"][1]


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def may_import(name: str, target: str) -> bool:
    """Whether a module may import another one of the project."""
    if is_in(name, "fused_losses_kernels"):
        return is_in(target, "fused_losses_kernels")
    part = part_of(name)
    if is_in(target, "fused_losses_kernels"):
        return part == "backends" or target in ONLY.get(part, set())
    target_part = part_of(target)
    if part == target_part:
        return True
    if part in ON_TOP:
        return target_part in ON_TOP[part]
    if part not in RANK or target_part not in RANK:
        return False
    return RANK[target_part] < RANK[part] and target_part in ONLY.get(part, {target_part})


def broken_import_rules(root: Path) -> list[str]:
    """Each import that goes the wrong way, as `module imports module`."""
    modules = source_files(root)
    return [
        f"{name} imports {target}"
        for name, path in modules.items()
        for target in sorted(imports_of(name, path, modules))
        if target.split(".")[0] in {"fused_losses", "fused_losses_kernels"}
        and not may_import(name, target)
    ]


def circle(root: Path) -> list[str]:
    """One circle of imports between modules, or nothing."""
    modules = source_files(root)
    graph = {
        name: {t for t in imports_of(name, path, modules) if t in modules and t != name}
        for name, path in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def text_files(root: Path) -> Iterator[Path]:
    """Every text file of the repository, the README and the set-up included."""
    folders = ("fused_losses", "kernels", "tests", "benchmarks", "docs", "examples", ".ci")
    paths = [*root.iterdir(), *(path for folder in folders for path in (root / folder).rglob("*"))]
    for path in sorted(paths):
        known = path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ""}
        if path.is_file() and known and path.name not in {".git", ".coverage"}:
            yield path


def test_every_part_of_the_library_has_a_place_in_the_order():
    parts = {part_of(name) for name in source_files(ROOT) if is_in(name, "fused_losses")}
    assert parts <= RANK.keys() | ON_TOP.keys(), "give the new part a row in LAYERS"


def test_imports_go_one_way():
    assert broken_import_rules(ROOT) == []


def test_there_are_no_circles():
    assert circle(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        ("kernels/fused_losses_kernels/extra.py", "import fused_losses", "fused_losses"),
        ("kernels/fused_losses_kernels/extra.py", "from fused_losses.stats import x", "stats"),
        ("fused_losses/stats.py", "from fused_losses.token_losses import x", "token_losses"),
        ("fused_losses/preference.py", "from .plan import Plan", "plan"),
        (
            "fused_losses/token_losses/new.py",
            "from fused_losses_kernels import row_pass",
            "row_pass",
        ),
        ("fused_losses/token_losses/new.py", "from ..engine import run", "engine"),
        ("fused_losses/reference.py", "from fused_losses import engine", "engine"),
        ("fused_losses/plan.py", "def f():\n    from fused_losses.engine import run", "engine"),
        ("fused_losses/engine/linear.py", "from fused_losses_kernels import row_pass", "row_pass"),
        ("fused_losses/engine/linear.py", "from fused_losses import mle_loss", "fused_losses"),
        ("fused_losses/engine/linear.py", "from fused_losses.functional import f", "functional"),
        ("fused_losses/modules.py", "from fused_losses.trainer import SFTTrainer", "trainer"),
        ("fused_losses/__init__.py", "from fused_losses import integrations", "integrations"),
        ("fused_losses/trainer/sft.py", "from fused_losses.engine import run", "engine"),
        ("fused_losses/integrations/lm_head.py", "from fused_losses import trainer", "trainer"),
    ],
)
def test_an_import_that_goes_the_wrong_way_is_found(tmp_path, file, line, named):
    for package in ("engine", "functional", "token_losses", "trainer", "integrations"):
        (tmp_path / "fused_losses" / package).mkdir(parents=True)
        (tmp_path / "fused_losses" / package / "__init__.py").touch()
    (tmp_path / "kernels" / "fused_losses_kernels").mkdir(parents=True)
    (tmp_path / "kernels" / "fused_losses_kernels" / "row_pass.py").touch()
    (tmp_path / "fused_losses" / "__init__.py").touch()
    assert broken_import_rules(tmp_path) == []
    (tmp_path / file).write_text(line)
    (broken,) = broken_import_rules(tmp_path)
    assert broken.endswith(named)


def test_a_circle_is_found(tmp_path):
    package = tmp_path / "fused_losses" / "engine"
    package.mkdir(parents=True)
    (package / "a.py").write_text("from fused_losses.engine import b")
    (package / "b.py").write_text("def f():\n    from .a import g")
    assert set(circle(tmp_path)) == {"fused_losses.engine.a", "fused_losses.engine.b"}


def test_the_core_needs_torch_alone_and_triton_only_for_kernels():
    modules = source_files(ROOT)
    for name, path in modules.items():
        if is_in(name, "fused_losses") and part_of(name) in ON_TOP:
            continue
        allowed = {"torch", "fused_losses", "fused_losses_kernels"} | sys.stdlib_module_names
        if is_in(name, "fused_losses_kernels") or part_of(name) == "backends":
            allowed |= {"triton"}
        used = {target.split(".")[0] for target in imports_of(name, path, modules)}
        assert used <= allowed, f"{name} imports {sorted(used - allowed)}"


def test_user_errors_are_raised_and_never_asserted():
    for name, path in source_files(ROOT).items():
        if is_in(name, "fused_losses"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
            assert lines == [], f"{name} asserts in lines {lines}; python -O drops those"


_RUNS_WHAT_IT_READS = re.compile(
    r"(?:pickle|dill|cloudpickle|joblib|marshal|shelve)\.\w*(?:load|open|Unpickler)\w*"
    r"|torch\.load|pandas\.read_pickle|pd\.read_pickle|(?:np|numpy)\.load"
    r"|yaml\.(?:load|unsafe_load|full_load)(?:_all)?|eval|exec"
)


def unsafe_calls(text: str) -> list[str]:
    """Calls that may run what they read; ``weights_only`` loads and copies are none."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not _RUNS_WHAT_IT_READS.fullmatch(
            name := ast.unparse(node.func)
        ):
            continue
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        copies = ast.unparse(node.args[0]).startswith("pickle.dumps(") if node.args else False
        if name == "torch.load" and options.get("weights_only") == "True":
            continue
        if name.endswith("p.load") and options.get("allow_pickle", "False") == "False":
            continue
        if not copies:
            found.append(name)
    return found


def test_nothing_runs_what_it_reads_from_a_file():
    found = {
        str(path.relative_to(ROOT)): calls
        for folder in ("fused_losses", "kernels", "benchmarks", "examples", "docs", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if (calls := unsafe_calls(path.read_text(encoding="utf-8")))
    }
    # The code of datasets, in its sandbox; and what tests write themselves.
    of_tests = {path: found.pop(path) for path in list(found) if path.startswith("tests/")}
    assert found == {"examples/sandbox_child.py": ["exec"]}
    assert {call for calls in of_tests.values() for call in calls} <= {"eval", "exec"}


@pytest.mark.parametrize(
    ("line", "calls"),
    [
        ("torch.load(path)", ["torch.load"]),
        ("torch.load(path, weights_only=False)", ["torch.load"]),
        ("torch.load(path, weights_only=True)", []),
        ("pickle.loads(data)", ["pickle.loads"]),
        ("pickle.loads(pickle.dumps(module))", []),
        ("np.load(path)", []),
        ("np.load(path, allow_pickle=True)", ["np.load"]),
        ("yaml.load(text, yaml.Loader)", ["yaml.load"]),
        ("yaml.safe_load(text)", []),
        ("model.eval()", []),
        ("f(eval(text))", ["eval"]),
    ],
)
def test_a_call_that_may_run_what_it_reads_is_found(line, calls):
    assert unsafe_calls(line) == calls


def test_every_file_has_a_subject_and_can_be_read_in_one_go():
    for name, path in source_files(ROOT).items():
        assert path.stem not in {"utils", "util", "helpers", "misc"}, name
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= MAX_LINES, name


def test_kernels_know_no_loss_by_name():
    names = "|".join(map(re.escape, fused_losses.TOKEN_LOSSES))
    pattern = re.compile(rf"(?<![a-z])({names})(?![a-z])", re.IGNORECASE)
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        found = pattern.findall(path.read_text(encoding="utf-8"))
        assert found == [], f"{path.name} speaks of {found}"


def test_no_file_speaks_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(?:work|root|opt|home|tmp)/")
    files = list(text_files(ROOT))
    assert Path(__file__) in files
    for path in files:
        found = pattern.findall(path.read_text(encoding="utf-8"))
        assert found == [], f"{path.relative_to(ROOT)} holds {found}"


LOSSES = [
    "mle_loss", "pearson_loss", "hellinger_loss", "token_loss", "dpo_loss", "kto_loss",
    "divergence_loss",
]  # fmt: skip
FUNCTIONS = [
    *LOSSES,
    *(f"linear_{name}" for name in LOSSES),
    "token_stats",
    "linear_token_stats",
    "linear_loss",
    "linear_sparse_divergence_loss",
    "preference_loss",
    "policy_loss",
    "linear_policy_loss",
]
PUBLIC = [
    *FUNCTIONS,
    *(
        f"{linear}{loss}Loss"
        for linear in ("", "Linear")
        for loss in ("MLE", "Pearson", "Hellinger", "DPO", "KTO", "Divergence")
    ),
    "PolicyLoss",
    "LinearPolicyLoss",
    "LinearSparseDivergenceLoss",
    "Divergence",
    "TOKEN_LOSSES",
    "TokenLoss",
    "TokenStats",
    "with_stats",
    "explain",
    "reference",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_contract_is_there(name):
    assert name in fused_losses.__all__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_specifies_every_function(name):
    assert callable(getattr(fused_losses.reference, name))


def test_all_names_exist_once_each():
    assert len(set(fused_losses.__all__)) == len(fused_losses.__all__)
    assert [name for name in fused_losses.__all__ if not hasattr(fused_losses, name)] == []


def test_scripts_of_two_folders_never_share_a_name():
    """Each folder is on the path of one test process: the first module of a name would win."""
    names = [
        path.stem for folder in ("examples", "benchmarks") for path in ROOT.glob(f"{folder}/*.py")
    ]
    assert len(names) == len(set(names))


def _comments_and_docstrings(path: Path) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        text = token.type == tokenize.STRING and token.string.startswith('"""')
        if text or token.type == tokenize.COMMENT:
            yield token.string


# "(7)", "(9)-(11)", "(5, 6)"; not a call, a shape or a power.
CITATION = re.compile(r"(?<![\w)`\].*])\(([1-9]\d?)(?:, (\d{1,2}))*\)")


def test_every_equation_that_code_cites_is_derived_in_the_repository():
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    derived = set(re.findall(r"\\tag\{(\d+)\}", page))
    assert derived == {str(n) for n in range(1, 15)}
    cited = {
        number
        for path in source_files(ROOT).values()
        for text in _comments_and_docstrings(path)
        for found in CITATION.finditer(text)
        for number in found.groups()
        if number
    }
    assert {"5", "6", "7", "9", "12", "13", "14"} <= cited <= derived


def test_the_glossary_names_what_the_code_is_made_of():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    glossary = page.split("## Words")[1].split("\n## ")[0]
    for word in ("row", "token", "position", "chunk", "range", "unit", "source", "reference"):
        assert re.search(rf"^\| [^|]*\b{word}\b", glossary, re.MULTILINE), word


def test_what_a_call_takes_at_a_time_is_a_chunk_and_not_a_block():
    for name, path in source_files(ROOT).items():
        if part_of(name) not in {"engine", "functional", "plan", "cost"}:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        assert [n for n in names if re.fullmatch(r"blocks|tiles", n)] == [], name
