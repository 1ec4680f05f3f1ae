"""The list of mutants fits the code as it is: nothing is run here but a few text searches."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import mutate
import pytest
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
FILES = {m.file: (ROOT / m.file).read_text("utf-8") for m in MUTANTS}


def test_every_text_stands_in_its_file_exactly_once() -> None:
    wrong = [f"{m.file}: {m.old!r}" for m in MUTANTS if FILES[m.file].count(m.old) != 1]
    assert wrong == [], "change the old text in tests/mutants.py to what stands there now"


def test_every_mutant_is_python_and_no_two_are_one() -> None:
    for m in MUTANTS:
        assert m.old != m.new
        ast.parse(mutate.mutated(FILES[m.file], m))
    names = Counter((m.file, m.name) for m in MUTANTS)
    faults = Counter((m.file, m.old, m.new) for m in MUTANTS)
    assert [what for what, count in (names | faults).items() if count > 1] == []


def test_every_test_that_is_to_kill_one_exists() -> None:
    known: dict[str, set[str]] = {}
    for m in MUTANTS:
        assert m.tests, m.name
        for test in m.tests:
            file, _, name = test.partition("::")
            if file not in known:
                tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
                known[file] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert not name or name in known[file], f"{test} is not there: {m.name}"


def test_there_are_enough_and_of_every_part() -> None:
    parts = Counter(m.file.split("/")[1] for m in MUTANTS)
    assert len(MUTANTS) >= 80
    assert parts["fused_losses_kernels"] >= 40
    for part in ("backends", "engine", "functional", "token_losses", "preference", "policy"):
        assert parts[part], part
    for part in ("reference", "trainer", "integrations", "plan.py", "cost.py", "chunk_bytes.py"):
        assert parts[part], part


def test_a_text_that_has_changed_is_told_of_and_a_sample_differs_from_seed_to_seed() -> None:
    with pytest.raises(ValueError, match=r"is there 0 times, and not once"):
        mutate.mutated("x = 1", Mutant("f.py", "", "y", "z", ()))
    with pytest.raises(ValueError, match=r"is there 2 times, and not once"):
        mutate.mutated("x = x", Mutant("f.py", "", "x", "z", ()))
    assert mutate.sample_of(MUTANTS, None, "a") == MUTANTS
    samples = [mutate.sample_of(MUTANTS, 9, seed) for seed in ("a", "b", "a")]
    assert samples[0] == samples[2] != samples[1]
    assert {len(sample) for sample in samples} == {9}


def test_the_first_failure_is_read_from_what_pytest_wrote() -> None:
    said = "...\nFAILED tests/test_a.py::test_b[1-x] - assert 1 == 2\n"
    said += "FAILED tests/test_c.py::test_d"
    assert mutate.first_failure(said) == "test_a.py::test_b[1-x]"
    assert mutate.first_failure("ERROR tests/test_a.py - ImportError: x") == "test_a.py"
    assert mutate.first_failure("3 passed in 0.1s") is None


def test_a_process_that_a_fault_has_ended_is_a_noticed_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f.py").write_text("x = 1\n")
    mutant = Mutant("f.py", "", "1", "2", ("test_a.py::test_b",))
    for said, killer in (
        ("", "test_a.py::test_b, by signal 11"),
        ("FAILED tests/t.py::t", "t.py::t"),
    ):
        monkeypatch.setattr(mutate, "pytest_in", lambda *_, said=said: (-11, said))
        outcome = mutate.try_out(mutant, tmp_path)
        assert outcome.killed
        assert outcome.killer == killer
    assert (tmp_path / "f.py").read_text() == "x = 1\n"
    # One that the system has ended, for want of memory, says nothing of the fault.
    monkeypatch.setattr(mutate, "pytest_in", lambda *_: (-9, ""))
    assert not mutate.try_out(mutant, tmp_path).killed
