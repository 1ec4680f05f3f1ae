"""The short training examples run on a tiny model and do what they say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("datasets", reason="the trainers read datasets")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

import tiny_training  # noqa: E402
import training_sets  # noqa: E402

FILES = ["sft.py", "dpo.py", "trl_dpo.py", "accelerate_loop.py", "lora.py", "distill.py", "grpo.py"]
FILES += ["torchrun_sft.py"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only wait for each other over so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_training.llama().save_pretrained(folder)
    tiny_training.tokenizer().save_pretrained(folder)
    path = folder / "data.jsonl"
    rows = [
        {
            "task_id": i,
            "prompt": f"add {i}\n",
            "completion": f"x + {i}\n",
            "chosen": f"x + {i}\n",
            "rejected": f"x - {i}\n",
        }
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", str(folder), "--dataset", str(path), "--learning-rate", "1e-2"]


def test_sft_lifts_the_implicit_reward(names: list[str], tmp_path: Path) -> None:
    import sft

    after = sft.main([*names, "--steps", "6", "--output", str(tmp_path)])
    assert after["eval_rewards/implicit"] > 0.1
    assert after["eval_loss"] < -0.1  # hellinger starts at 0, at the reference


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_dpo_widens_the_margin(loss_type: str, names: list[str], tmp_path: Path) -> None:
    import dpo

    loss = ["--loss-type", loss_type]
    after = dpo.main([*names, *loss, "--steps", "8", "--output", str(tmp_path)])
    assert after["eval_rewards/margins"] > 0.05


def test_trl_trains_on_this_engine(names: list[str], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import trl_dpo

    logs = trl_dpo.main([*names, "--steps", "4", "--output", str(tmp_path)])
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2, at the reference
    assert logs[-1]["loss"] < 0.6


def test_the_accelerate_loop_lowers_the_loss(names: list[str]) -> None:
    import accelerate_loop

    losses = accelerate_loop.main([*names, "--steps", "6"])
    assert losses[0] == pytest.approx(0.0, abs=1e-5)  # at the reference
    assert losses[-1] < -0.1


# AdamW steps alike whatever its gradients are multiplied by; SGD does not.
TORCHRUN = ["--steps", "3", "--timeout", "60", "--learning-rate", "0.1"]
LAUNCHED = f"""
import sys, torch
torch.optim.AdamW = torch.optim.SGD
sys.path.insert(0, {str(EXAMPLES)!r})
import torchrun_sft
torchrun_sft.main()
"""


@pytest.fixture(scope="module")
def one_process(names: list[str]) -> list[float]:
    import torchrun_sft

    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free.getsockname()[1]}
        free.close()
        for name, value in {**place, "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(name, str(value))
        patch.setattr(torch.optim, "AdamW", torch.optim.SGD)
        losses = torchrun_sft.main([*names, *TORCHRUN])
    assert losses[0] == pytest.approx(0.0, abs=1e-5)  # at the reference
    assert losses[-1] < -0.05
    return losses


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "tensor"])
def test_torchrun_trains_on_two_processes_as_on_one(
    layout: str, names: list[str], one_process: list[float], tmp_path: Path
) -> None:
    (tmp_path / "launched.py").write_text(LAUNCHED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(tmp_path / "launched.py"), *names, *TORCHRUN]
    run = subprocess.run(
        [*launch, *script, "--layout", layout], capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-2000:]
    two = [float(line.split()[-1]) for line in run.stdout.splitlines() if "loss" in line]
    assert two == pytest.approx(one_process, abs=1e-5)


def test_dpo_of_lora_starts_at_the_sft_model_and_widens_the_margin(
    names: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    import lora

    before, after = lora.main([*names, "--steps", "6", "--output", str(tmp_path)])
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2
    assert after["eval_rewards/margins"] > 1e-3
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_a_student_of_fewer_layers_comes_nearer_to_its_teacher(
    divergence: str, names: list[str]
) -> None:
    import distill

    before, after = distill.main([*names, "--steps", "8", "--divergence", divergence])
    assert after < 0.9 * before


def test_an_anchor_keeps_sft_near_the_start(names: list[str]) -> None:
    import distill

    drift = {}
    for anchor in ("1e-3", "10"):
        before, drift[anchor] = distill.main([*names, "--steps", "6", "--anchor", anchor])
        assert before == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < drift["10"] < 0.5 * drift["1e-3"]


def test_a_teacher_s_cap_and_bias_take_part(names: list[str], tmp_path: Path) -> None:
    import distill
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
    config = Gemma2Config(
        vocab_size=tiny_training.V, num_hidden_layers=2, num_key_value_heads=2,
        final_logit_softcapping=3.0, initializer_range=0.3, **sizes,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tiny_training.tokenizer().save_pretrained(tmp_path)
    given = ["--model", str(tmp_path), *names[2:], "--steps", "1"]
    # The model beside itself: 0 if both are capped.
    assert distill.main([*given, "--anchor", "0.1"])[0] == pytest.approx(0.0, abs=1e-6)
    before, _ = distill.main(given)
    assert before > 1e-3
    head = distill.as_teacher(torch.ones(1), torch.ones(1), linear_bias=1, softcap=2, logit_scale=3)
    names_of = {"input", "weight", "bias", "softcap", "logit_scale"}
    assert head.keys() == {f"teacher_{name}" for name in names_of}


@pytest.mark.skipif(os.name != "posix", reason="the sandbox needs POSIX")
def test_grpo_rewards_what_its_task_s_tests_let_pass(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    import grpo
    import humaneval

    found = [
        humaneval.Example(str(i), f"def f{i}(x):\n", "    return x\n", check, f"f{i}")
        for i, check in enumerate(["def check(f):\n    assert f(3) == 3\n", "def check(f): 1 / 0"])
    ]
    found.append(found[0]._replace(completion="    return " + "x" * 99 + "\n"))  # no short answer
    monkeypatch.setattr(humaneval, "load", lambda: (found, []))
    rows = grpo.tasks(tiny_training.tokenizer(), count=8, max_tokens=99)
    assert rows["prompt"] == ["def f0(x):\n    return", "def f1(x):\n    return"]
    prompts, checks = ([row[name] for row in rows for _ in "ab"] for name in ("prompt", "check"))
    answers = [" x\nwhatever (", " -x", " x", " -x"]
    assert grpo.passes(prompts, answers, checks) == [1.0, 0.0, 0.0, 0.0]
    given = ["--steps", "2", "--batch", "2", "--group", "2", "--tokens", "2"]
    assert len(grpo.main([*names[:2], *given, "--output", str(tmp_path)])) == 2


@pytest.mark.parametrize("file", FILES)
def test_an_example_is_under_a_hundred_lines(file: str) -> None:
    assert len((EXAMPLES / file).read_text().splitlines()) < 100


def test_long_rows_are_left_out_and_no_task_is_on_both_sides(names: list[str]) -> None:
    data = training_sets.load(
        tiny_training.tokenizer(), names[3], examples=12, heldout=4, max_tokens=14
    )
    assert (len(data.train), len(data.heldout)) == (6, 4)  # ten of the tasks have one digit
    assert len(data.train_pairs) == 6
    assert set(data.train["prompt"]).isdisjoint(data.heldout["prompt"])
    with pytest.raises(SystemExit, match="raise --max_tokens"):
        training_sets.load(tiny_training.tokenizer(), names[3], max_tokens=5)


def test_the_walk_through_runs_and_draws_its_figures(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import runpy

    pytest.importorskip("matplotlib")
    import smollm

    load_model, load_data = smollm.load, training_sets.load
    monkeypatch.setattr(smollm, "load", lambda: load_model(names[1]))
    monkeypatch.setattr(
        training_sets, "load", lambda tokenizer, **kw: load_data(tokenizer, names[3], **kw)
    )
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLES / "walkthrough.py"))
    assert found["fused"].item() == pytest.approx(found["eager"].item(), rel=1e-6)
    assert found["peaks"]["fused"][-1] < found["peaks"]["eager"][-1]
    assert found["rewards"]["pearson"][0] == pytest.approx(0.0, abs=1e-6)
    assert found["losses"][0] == pytest.approx(0.6931, abs=1e-4)
    for name in ("memory.png", "family.png", "training.png"):
        assert (tmp_path / "outputs" / "walkthrough" / name).stat().st_size > 5000
