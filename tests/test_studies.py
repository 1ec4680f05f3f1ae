"""Every study's quick form runs, on a tiny model, and its results say what the study says."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

STUDIES = Path(__file__).resolve().parent.parent / "examples" / "studies"
sys.path.insert(0, str(STUDIES))

pytest.importorskip("datasets", reason="the trainers read datasets")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
pytest.importorskip("matplotlib", reason="every study draws a figure")

import study  # noqa: E402
import tiny_training  # noqa: E402

OF_TRAINING = ["drift", "settling", "starts", "joint", "values"]
NAMES = ["theorem1", *OF_TRAINING, "ladder"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_training.llama().save_pretrained(folder)
    tiny_training.tokenizer().save_pretrained(folder)
    rows = [
        {
            "task_id": i,
            "prompt": f"add {i}\n",
            "completion": f"x +\n{i}\n+ x\n",
            "chosen": f"x +\n{i}\n+ x\n",
            "rejected": f"x -\n{i}\n- x\n",
        }
        for i in range(24)
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"model={folder}", f"dataset={path}"]


def run(name: str, output: Path, *settings: str, seeds: str = "0 1") -> dict[str, Any]:
    flags = ["--quick", "--output", str(output), "--seeds", *seeds.split()]
    if settings:
        flags += ["--set", *settings]
    summary = importlib.import_module(name).main(flags)
    results = json.loads((output / f"{name}.json").read_text())
    assert results["summary"] == study.plain(json.loads(json.dumps(study.plain(summary))))
    assert results["machine"]["cpu"]
    assert (output / f"{name}.png").stat().st_size > 5000
    return summary


def test_primal_and_dual_have_one_policy_and_value_zero_is_nearer_than_mle(tmp_path: Path) -> None:
    summary = run("theorem1", tmp_path, "betas=[0.3]", "problems=1")
    assert summary["largest difference of a probability, (1) against (4)"] < 1e-9
    zero = summary["total variation between value = 0 and exact"]
    mle = summary["total variation between mle and exact"]
    assert set(zero) == set(mle)
    for name, far in mle.items():
        assert zero[name].mean < 0.5 * far.mean
    assert zero["kl, beta 0.3"].mean < 1e-9  # its value = 0 solution is the exact one


@pytest.mark.parametrize("name", OF_TRAINING)
def test_a_study_of_training_runs_in_its_quick_form(
    name: str, tiny: list[str], tmp_path: Path
) -> None:
    summary = run(name, tmp_path, *tiny)
    known = [v for v in summary.values() if isinstance(v, study.Interval) and v.seeds]
    assert known
    assert all(math.isfinite(v.mean) for v in known)


def test_the_fused_loss_ends_where_the_eager_one_is_out_of_memory(tmp_path: Path) -> None:
    summary = run("ladder", tmp_path, "tokens=[256, 16384]", "limit_gib=3.0", seeds="0")
    assert summary["most tokens, eager"] == 256
    assert summary["most tokens, fused"] == 16384
    assert summary["largest relative difference of the losses where both end"] < 1e-5


def test_a_run_goes_on_where_it_was_and_starts_anew_under_another_config(tmp_path: Path) -> None:
    def open_(*flags: str) -> study.Study:
        return study.open_study(
            "theorem1.py", ["--quick", "--output", str(tmp_path), *flags], "A study."
        )

    calls = []

    def compute() -> float:
        calls.append(1)
        return 1.5

    assert open_().part("a", compute, {"x": 1}) == 1.5
    assert open_().part("a", compute, {"x": 1}) == 1.5
    assert len(calls) == 1
    open_().part("a", compute, {"x": 2})
    assert len(calls) == 2
    open_("--set", "problems=3").part("a", compute, {"x": 2})
    assert len(calls) == 3
    with pytest.raises(SystemExit, match=r"no key 'problem'; theorem1\.yaml has members, betas"):
        open_("--set", "problem=3")


def test_an_interval_covers_its_mean_and_says_what_it_does_not_know() -> None:
    found = study.interval([1.0, 2.0, 3.0, float("nan")])
    assert (found.mean, found.seeds) == (2.0, 3)
    assert 1.0 <= found.low < 2.0 < found.high <= 3.0
    assert math.isnan(study.interval([1.0]).low)
    assert study.interval([]).seeds == 0


def test_what_is_compared_at_one_likelihood_is_read_between_two_measurements() -> None:
    import drift
    import joint

    line = [{"nll": 3.0, "kl": 0.0}, {"nll": 2.0, "kl": 1.0}, {"nll": 1.0, "kl": 3.0}]
    assert drift.at_level(line, 1.5, "kl") == 2.0
    other = [{"nll": 3.0, "kl": 0.0}, {"nll": 1.5, "kl": 9.0}]
    assert drift.common_level({"a": line, "b": other}) == 1.5
    assert joint.largest_fall([1.0, 3.0, 2.0, 4.0, 3.5]) == 1.0
    assert joint.largest_fall([1.0, 2.0]) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_full_results_are_committed_with_the_config_that_stands(name: str) -> None:
    import yaml

    path = study.RESULTS / f"{name}.json"
    if not path.is_file():
        pytest.skip("no full run has been committed yet")
    results = json.loads(path.read_text())
    config = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    del config["quick"], config["seeds"]
    assert results["config"] == config
    assert results["summary"]
    assert path.with_suffix(".png").is_file()
