"""The pipeline and the training examples on a tiny model: what they write, keep and refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("datasets", reason="the trainers read datasets")
pytest.importorskip("matplotlib", reason="the pipeline draws curves")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
pytest.importorskip("rich", reason="the examples' extra")

import recipe  # noqa: E402
import sft_to_dpo  # noqa: E402
import tiny_training  # noqa: E402

from fused_losses.trainer import reference  # noqa: E402

RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
QUICK = ["--sft.max_steps=8", "--dpo.max_steps=3", "--sft.learning_rate=1e-2"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only wait for each other over so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSED_LOSSES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_training.llama().save_pretrained(folder)
    tiny_training.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    rows = [
        {
            "task_id": i,
            "prompt": f"add {i}\n",
            "completion": f"x + {i}\n",
            "chosen": f"x + {i}\n",
            "rejected": f"x - {i}\n",
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(model: str, data: str, out: Path, *more: str) -> dict[str, dict[str, float]]:
    names = ["--model", model, "--dataset", data, "--output", str(out), "--heldout", "3"]
    return sft_to_dpo.main([*more, *names, *QUICK])


def test_the_pipeline_writes_configs_logs_curves_and_models(
    model: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    last = run(model, data, out, str(EXAMPLES / "recipes" / "hellinger.yaml"))
    assert sorted(p.name for p in out.iterdir()) == [
        "configs.json", "dpo", "dpo.jsonl", "dpo.png", "sft", "sft.jsonl", "sft.png",
    ]  # fmt: skip
    configs = json.loads((out / "configs.json").read_text())
    assert configs["sft"]["loss"] == "hellinger"
    assert configs["sft"]["max_steps"] == 8
    assert configs["dpo"]["loss_type"] == ["sigmoid"]
    expected = {
        "sft": {"loss", "rewards/implicit", "drift", "entropy", "values/mean", "weights/capped"},
        "dpo": {"loss", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen"},
    }
    for stage, names in expected.items():
        logs = lines(out / f"{stage}.jsonl")
        steps = [e for e in logs if "loss" in e]
        assert all(names <= e.keys() for e in steps)
        held = [e for e in logs if "eval_loss" in e]
        assert {f"eval_{n}" for n in names} <= held[0].keys()
        assert [held[0]["step"], held[-1]["step"]] == [0, steps[-1]["step"]]
        assert (out / f"{stage}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / stage / "model" / "config.json").is_file()
    # The start model is its own reference, and training takes it away from there.
    sft = [e for e in lines(out / "sft.jsonl") if "eval_loss" in e]
    assert sft[0]["eval_drift"] == pytest.approx(0.0, abs=1e-5)
    assert last["sft"]["eval_rewards/implicit"] > 0.1
    dpo = [e for e in lines(out / "dpo.jsonl") if "eval_loss" in e]
    assert dpo[0]["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert [str(p) for p in out.rglob(".partial-*")] == []


def test_a_second_run_computes_no_reference_and_no_sft_again(
    model: str, data: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, data, tmp_path / "out")
    first = (tmp_path / "out" / "sft.jsonl").read_bytes()
    assert len(list((cache / "ref_logps").glob("*.arrow"))) == 6

    def refuse(*_: object) -> None:
        raise AssertionError("computed references again")

    monkeypatch.setattr(reference.Reference, "_compute", refuse)
    # Another loss of SFT, in another folder: the same start model and data, the same references.
    # DPO takes the model that it starts from, a new one.
    with pytest.raises(AssertionError, match="again"):
        run(model, data, tmp_path / "other", "--sft.loss", "pearson")
    assert len(lines(tmp_path / "other" / "sft.jsonl")) > 8
    # The same folder: SFT stands, and DPO finds its references too.
    monkeypatch.setattr(sft_to_dpo, "run_sft", refuse)
    run(model, data, tmp_path / "out")
    assert (tmp_path / "out" / "sft.jsonl").read_bytes() == first
    with pytest.raises(AssertionError, match="again"):
        run(model, data, tmp_path / "out", "--sft.loss", "pearson")


def test_sft_ends_early_and_simpo_follows_it_without_references(
    model: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    early = ["--window", "1", "--tolerance", "0.999"]
    run(model, data, out, *early, "--dpo.loss_type", "simpo", "--dpo.beta", "2.0")
    assert max(e["step"] for e in lines(out / "sft.jsonl")) < 8
    steps = [e for e in lines(out / "dpo.jsonl") if "loss" in e]
    assert len(steps) == 3
    assert "rewards/margins" in steps[0]


def test_dpo_can_be_measured_against_the_start_of_sft(
    model: str, data: str, tmp_path: Path
) -> None:
    run(model, data, tmp_path / "out", "--dpo_reference", "start")
    held = [e for e in lines(tmp_path / "out" / "dpo.jsonl") if "eval_loss" in e]
    # SFT has lifted the answers above its start before DPO does anything.
    assert held[0]["eval_rewards/chosen"] > 0.01


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_flags_override_it(path: Path) -> None:
    options = recipe.read([str(path), "--sft.beta", "0.5"])
    assert options.sft.loss == ("mle" if "mle" in path.stem else path.stem)
    assert options.sft.beta == 0.5
    assert options.pipeline.output == f"outputs/{path.stem}"
    assert options.dpo.output_dir == f"outputs/{path.stem}/dpo"


def test_there_are_four_recipes_and_one_has_smaller_steps() -> None:
    rates = {p.stem: recipe.read([str(p)]).sft.learning_rate for p in RECIPES}
    assert set(rates) == {"mle", "small_lr_mle", "pearson", "hellinger"}
    assert rates["small_lr_mle"] < rates["mle"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft:\n  lerning_rate: 1.0\n", r"bad\.yaml.*sft\.lerning_rate.*mean sft\.learning_rate"),
        ("modle: x\n", r"bad\.yaml.*modle.*mean model"),
        ("sft: {loss: kldiv}\n", "sft.*loss must be one of.*'kldiv'"),
        ("dpo: {loss_type: nonsense}\n", "dpo.*loss_type.*nonsense"),
        ("dpo: 3\n", "key dpo: expected a section"),
        ("sft:\n  beta:\n", r"key sft\.beta: has no value"),
        ("- a\n", "expected keys and values, got list"),
        ("a: [1\n", "cannot be read as YAML"),
        ("heldout: 0\n", "--heldout must be at least 1"),
    ],
)
def test_a_yaml_file_that_does_not_fit_is_refused_by_the_name_of_the_key(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        recipe.read([str(path)])


def test_a_missing_file_an_unknown_flag_and_a_value_of_the_wrong_type_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"none\.yaml cannot be read"):
        recipe.read([str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit, match=r"--dpo\.bta.*mean dpo\.beta"):
        recipe.read(["--dpo.bta", "1"])
    with pytest.raises(SystemExit):
        recipe.read(["--sft.max_steps=many"])
    assert "--max_steps" in capsys.readouterr().err


def test_data_without_pairs_is_refused_by_the_missing_columns(model: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(SystemExit, match="chosen and rejected are missing"):
        run(model, str(path), tmp_path / "out")
