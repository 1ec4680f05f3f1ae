"""The benchmark suite measures what it says: same loss for all, taking turns, counted from outside.

Tiny shapes; no time is judged.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cases  # noqa: E402
import checks  # noqa: E402
import contest  # noqa: E402
import gpu  # noqa: E402
import inputs  # noqa: E402
import instruments  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import results  # noqa: E402
import targets  # noqa: E402

import fused_losses  # noqa: E402

TINY = cases.Case("mle", 32, 16, 97, length=8, budget=1)
BRIEF = measure.Effort(seconds=0.0, least=2, most=2, slow_peers=False)
LOSSES = ("mle", "pearson", "hellinger", "dpo")
OF_RESPONSES, OF_ROWS = ("grpo", "kto"), ("distillation", "sparse teacher", "brier")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
}


def measured(case: cases.Case, only: tuple[str, ...] = ("eager", "torch chunked")) -> dict:
    return measure.measure(replace(case, only=only), "cpu", BRIEF, log=lambda text: None)


def lines(record: dict) -> dict[str, dict]:
    return {line["name"]: line for line in record["contenders"]}


# Cases and inputs


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_names_of_their_own_and_quick_ones_are_a_part(device):
    every, quick = (cases.select(device, quick=flag) for flag in (False, True))
    assert len({case.name for case in every}) == len(every)
    assert 0 < len(quick) < len(every)
    assert set(quick) <= set(every)
    assert all(case.N % (2 * case.length) == 0 for case in every)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_picked_by_size_and_by_name(device):
    every = cases.select(device, quick=False)
    scaling = cases.select(device, quick=False, named="scaling")
    assert scaling == [case for case in every if case.series]
    both = cases.select("cuda", quick=False, named="B,scaling")
    assert both == [
        case
        for case in cases.GPU_CASES
        if case.series or (case.N, case.D, case.V) == (16384, 2304, 256000)
    ]
    assert cases.select(device, quick=True, named="scaling") == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_kind_of_call_is_measured(device):
    every = cases.select(device, quick=True)
    assert {case.loss for case in every} == {*LOSSES, *OF_RESPONSES, *OF_ROWS}
    assert {case.trained for case in every} == {"head", "hidden", "nothing"}
    assert {case.ignored for case in every} == {0.0, 0.5, 0.8}
    assert {case.path for case in every} == {"linear", "logits"}


def test_inputs_are_as_a_trained_head_sees_them():
    case = cases.Case("pearson", 512, 256, 1000, ignored=0.25, length=32)
    batch = inputs.make_batch(case, "cpu")
    logits = (batch.x.detach() @ batch.w.detach().T).flatten(0, 1)
    assert 3.5 < logits.std().item() < 4.5
    logps = contest.log_probs(replace(batch, y=batch.labels)).detach()
    assert 0.2 < (logps.exp() > 0.9).double().mean() < 0.8  # some tokens are confident
    assert 0.1 < (logps - batch.ref).std() < 0.6
    assert (batch.y == -100).double().mean() == 0.25
    assert (batch.y[:, :8] == -100).all()  # a prompt, at the start of its sequence


def test_pairs_cut_both_halves_alike():
    batch = inputs.make_batch(replace(TINY, loss="dpo"), "cpu")
    part = batch.pairs(1, 2, torch.float64)
    assert torch.equal(part.x, batch.x[[1, 3]].double())
    assert torch.equal(part.ref, batch.ref[[1, 3]])
    assert part.w.requires_grad
    assert part.w is not batch.w


# What is computed


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_the_peers_loss_is_the_library_s(loss, ignored):
    case = replace(TINY, loss=loss, ignored=ignored, dtype="float64")
    batch = inputs.make_batch(case, "cpu")
    if batch.ref is not None:  # some far below, where hellinger goes on along its tangent
        batch = replace(batch, ref=batch.ref + torch.linspace(-2, 9, 32).view_as(batch.ref))
    args = (batch.x, batch.w, batch.y, *(() if loss == "mle" else (batch.ref,)))
    options = {} if loss == "mle" else {"beta": peers.BETA[loss]}
    expected = getattr(fused_losses.reference, f"linear_{loss}_loss")(*args, **options)
    found, gradients = instruments.truth(case, batch)
    torch.testing.assert_close(found, expected.detach())
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, batch.leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "products"),
    [
        ({}, 3),
        ({"ignored": 0.5}, 3),
        ({"loss": "dpo"}, 3),
        ({"trained": "hidden"}, 2),
        ({"trained": "hidden", "loss": "dpo"}, 2),
        ({"trained": "nothing"}, 1),
    ],
)
def test_a_record_holds_flops_bytes_errors_and_ratios(changes, products):
    case = replace(TINY, **changes)
    record = measured(case)
    found = lines(record)
    ours, eager, bare = found["fused-losses 1 MiB"], found["eager"], found["floor"]
    counted = round(32 * (1 - case.ignored))
    assert record["counted"] == counted
    assert ours["flops"] == bare["flops"] == 2 * products * counted * 16 * 97
    assert eager["flops"] == 2 * products * 32 * 16 * 97  # it pays for ignored labels too
    for line in (ours, eager):
        assert list(line["error"]) == ["loss", "dx", "dw"][:products]
        assert all(error < 1e-5 for error in line["error"].values())
        assert line["time_s"]["min"] <= line["time_s"]["median"]
        assert line["peak_bytes"] >= max(line["gradient_bytes"], counted * 97 * 4)
    assert eager["peak_bytes"] >= 2 * 32 * 97 * 4  # logits and their softmax
    assert ours["gradient_bytes"] == 4 * 16 * (32 * (products > 1) + 97 * (products > 2))
    assert ours["ratio_to_ours"] == 1.0
    assert record["plan"].endswith("z = X W' > row pass") == (products == 1)
    json.dumps(record, allow_nan=False)


def test_logits_that_a_peer_overwrites_are_restored():
    case = replace(TINY, path="logits")
    record = measured(case)
    assert record["ndv"] is None
    assert record["moved_bytes"] == 3 * 32 * 97 * 4
    assert lines(record)["fused-losses, in place"]["error"]["dlogits"] < 1e-5
    batch = inputs.make_batch(case, "cpu")
    run = peers.ours_in_place(case, batch, None)
    before = batch.x.detach().clone()
    first = instruments.call(case, batch, run)[1][0].clone()
    assert not torch.equal(batch.x, before)  # it does overwrite
    assert torch.equal(instruments.call(case, batch, run)[1][0], first)


def test_torch_s_chunks_agree_and_take_the_budget():
    found = lines(measured(replace(TINY, N=64, V=97)))
    if "torch chunked 1 MiB" not in found:
        pytest.skip("this torch has no chunked linear_cross_entropy")
    assert found["torch chunked"]["error"]["dw"] < 1e-5
    assert found["torch chunked 1 MiB"]["error"]["dw"] < 1e-5


@pytest.mark.parametrize(
    ("loss", "trained", "products"),
    [
        ("grpo", "head", 3),
        ("grpo", "hidden", 2),
        ("kto", "head", 3),
        ("distillation", "head", 4),
        ("distillation", "hidden", 3),
        ("sparse teacher", "head", 3),
        ("brier", "head", 3),
        ("brier", "nothing", 1),
    ],
)
def test_ours_costs_the_products_that_cannot_be_avoided(loss, trained, products):
    case = replace(TINY, loss=loss, trained=trained, ignored=0.5, beside=("mle",))
    found = lines(measured(case, only=("eager",)))
    ours, bare = found["fused-losses 1 MiB"], found["floor"]
    assert ours["flops"] == bare["flops"] == 2 * products * 16 * 16 * 97
    assert bare["what"] == f"bare GEMMs, {2 * products} NDV"
    assert ours["peak_bytes"] > ours["gradient_bytes"] - 1
    for line in (ours, found["eager"]):  # against float64
        assert all(error < 1e-5 for error in line["error"].values())


def test_the_plain_losses_are_the_library_s_in_float64():
    for loss in (*OF_RESPONSES, *OF_ROWS):
        case = replace(TINY, loss=loss, ignored=0.25, dtype="float64")
        batch = inputs.make_batch(case, "cpu")
        if loss == "grpo":  # some are clipped, on either side
            batch = replace(batch, ref=batch.ref + torch.linspace(-1, 1, 32).view_as(batch.ref))
        found, gradients = instruments.truth(case, batch)
        expected = peers.ours(case, batch, None)()
        torch.testing.assert_close(found, expected.detach())
        for plain, ours in zip(gradients, torch.autograd.grad(expected, batch.leaves), strict=True):
            torch.testing.assert_close(plain, ours)


def test_trl_s_distillation_computes_the_same_loss():
    pytest.importorskip("trl", reason="a peer of the benchmarks")
    case = replace(TINY, loss="distillation", ignored=0.5)
    found = lines(measured(case, only=("TRL distillation",)))
    assert found["TRL distillation"]["flops"] > found["fused-losses 1 MiB"]["flops"]
    assert max(found["TRL distillation"]["error"].values()) < 1e-4


@pytest.mark.parametrize("loss", [*LOSSES, *OF_RESPONSES])
def test_trl_s_fused_head_computes_the_same_loss_for_eight(loss):
    pytest.importorskip("trl", reason="a peer of the benchmarks")
    found = lines(measured(replace(TINY, loss=loss), only=("TRL",)))
    assert found["TRL"]["flops"] == 8 * 32 * 16 * 97
    assert max(found["TRL"]["error"].values()) < 1e-5


def test_on_large_cases_errors_are_those_of_the_first_pairs():
    limit = replace(BRIEF, error_limit=16 * 16 * 97)
    case = replace(TINY, loss="dpo", only=("eager",))
    record = measure.measure(case, "cpu", limit, log=lambda text: None)
    assert record["error_rows"] == 16
    assert lines(record)["eager"]["error"]["dw"] < 1e-5


def test_the_floor_multiplies_real_operands():
    batch = inputs.make_batch(replace(TINY, ignored=0.5), "cpu")
    x, dz = inputs.softmax_error(batch)
    assert x.shape == (16, 16)
    assert dz.sum(1).abs().max() < 1e-5
    label = batch.y[batch.y != -100]
    assert (dz.gather(1, label[:, None]) < 0).all()
    assert (dz < 0).sum() == 16


# Who takes part


def impostor(change):
    def prepare(case, batch, budget):
        run = peers.eager(case, batch, budget)
        return lambda: change(run())

    return peers.Peer("impostor", prepare, lambda case: True)


def absent(case, batch, budget):
    import no_such_package  # noqa: F401


def failing(case, batch, budget):
    raise RuntimeError("no compiler at /usr/lib/gcc/cc1plus\nand more")


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        (impostor(lambda loss: 2 * loss), "another loss"),
        (impostor(lambda loss: loss.detach() + 2 * (loss - loss.detach())), "wrong gradient: dx"),
        (impostor(lambda loss: loss * float("nan")), "another loss: nan"),
        (peers.Peer("x", absent, lambda case: True), "no_such_package is not installed"),
        (peers.Peer("x", failing, lambda case: True), "RuntimeError: no compiler at cc1plus"),
    ],
)
def test_a_peer_that_computes_something_else_is_left_out_by_name(peer, reason, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", (peer,))
    record = measured(TINY, only=())
    assert [entry["name"] for entry in record["skipped"]] == [peer.name]
    assert record["skipped"][0]["reason"].startswith(reason)
    assert peer.name not in lines(record)


def test_a_peer_that_breaks_down_in_the_rounds_leaves_the_others_their_times(monkeypatch):
    calls = []

    def prepare(case, batch, budget):
        run = peers.eager(case, batch, budget)

        def brittle():
            calls.append(None)
            if len(calls) == 4:  # warmed up, profiled, one round done
                raise RuntimeError("out of memory")
            return run()

        return brittle

    brittle = peers.Peer("brittle", prepare, lambda case: True)
    monkeypatch.setattr(peers, "PEERS", (brittle, peers.PEERS[0]))
    record = measured(TINY, only=())
    assert record["skipped"] == [{"name": "brittle", "reason": "RuntimeError: out of memory"}]
    assert len(lines(record)["eager"]["rounds_s"]) == 2


def test_the_library_itself_is_never_left_out_quietly(monkeypatch):
    wrong = impostor(lambda loss: 2 * loss)
    monkeypatch.setattr(peers, "OURS", wrong)
    with pytest.raises(peers.UnavailableError, match="another loss"):
        measured(TINY)


def test_peers_for_gpus_say_so_on_a_cpu():
    record = measured(TINY, only=("Liger", "cut-cross-entropy", "quack"))
    reasons = {entry["name"]: entry["reason"] for entry in record["skipped"]}
    assert reasons == dict.fromkeys(("Liger", "cut-cross-entropy", "quack"), "needs a GPU")


def test_everyone_takes_a_turn_in_every_round(monkeypatch):
    turns: list[str] = []
    timed = measure.timed

    def noting(case, batch, run):
        turns.append(run.__qualname__.partition(".")[0])
        return timed(case, batch, run)

    monkeypatch.setattr(measure, "timed", noting)
    effort = replace(BRIEF, least=3, most=3)
    case = replace(TINY, budgets=(2,), only=("eager",))
    record = measure.measure(case, "cpu", effort, log=lambda text: None)
    assert turns == ["ours", "eager", "ours"] * 3
    assert record["rounds"] == 3
    assert all(len(line["rounds_s"]) == 3 for line in record["contenders"][1:])


def test_a_ratio_is_taken_within_each_round():
    # The machine is ten times slower in two of three rounds; the peer takes twice as long in all.
    assert measure._ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == 2.0


# Results


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "machine" / "run.json"
    results.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        results.write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        results.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_results_are_filed_by_machine_date_and_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_COMMIT", "abc123")
    about = results.describe_machine("cpu")
    assert about["packages"]["torch"] == torch.__version__
    assert about["cores"] >= 1
    full, quick = (results.result_path(about, tmp_path, quick=flag) for flag in (False, True))
    assert full.name == f"{about['date'][:10]}-abc123.json"
    assert quick.name == f"{about['date'][:10]}-abc123-quick.json"
    assert results.machine_name({"gpu": "NVIDIA H200"}) == "nvidia-h200"


def test_a_build_s_tag_is_recorded_and_gives_the_kernel_report_no_folder_of_its_own():
    pytest.importorskip("triton", reason="the report compiles kernels")
    code = """
import triton
triton.__version__ = "3.6.0+git12ab"
import kernel_report, results, torch
torch.__version__ = "2.11.0+cu130"
print(kernel_report.COMMITTED.name, results.describe_machine("cpu")["packages"]["torch"])
"""
    path = f"{BENCHMARKS}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**ENVIRONMENT, "PYTHONPATH": path},
    )
    assert done.stdout.split() == ["triton-3.6.0", "2.11.0+cu130"]


def test_the_suite_writes_json_and_shows_progress(tmp_path):
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "--quick", "--seconds", "0"]
    command += ["-k", "logits", "--results", str(tmp_path), "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/1] mle, from logits" in done.stdout
    assert "    eager: first run" in done.stdout
    assert "  = mle, from logits" in done.stdout
    (path,) = tmp_path.glob("*/*-quick.json")
    content = json.loads(path.read_text())
    assert content["machine"]["threads"] >= 1
    assert [record["case"]["path"] for record in content["cases"]] == ["logits"]


def run_file(folder: Path) -> Path:
    """A result file as a full run leaves it, of tiny cases."""
    kinds = [
        replace(TINY, budgets=(2,)),
        replace(TINY, loss="pearson", beside=("mle",)),
        replace(TINY, path="logits"),
        *(replace(TINY, N=N, series="N") for N in (32, 64)),
    ]
    content = {
        "schema": 1,
        "machine": results.describe_machine("cpu"),
        "quick": False,
        "cases": [measured(case, only=("eager", "Liger")) for case in kinds],
    }
    path = folder / "machine" / "run.json"
    results.write_json(path, content)
    return path


def test_the_report_is_drawn_from_json_alone(tmp_path):
    path = run_file(tmp_path)
    script = f"""
import runpy, sys
sys.modules["torch"] = sys.modules["fused_losses"] = None  # importing them raises
sys.argv = ["report.py", {str(path)!r}]
sys.path.insert(0, {str(BENCHMARKS)!r})
runpy.run_path({str(BENCHMARKS / "report.py")!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = (path.parent / "run.md").read_text("utf-8")
    assert f"| {TINY.name} |" in text
    assert "| bare GEMMs, 6 NDV |" in text
    assert "| fused-losses mle 1 MiB |" in text
    assert "| copy, 3 NV elements moved |" in text
    assert "- Liger: needs a GPU" in text
    for name in ("memory", "scaling"):
        image = path.parent / f"run-{name}.png"
        assert image.name in text
        assert image.read_bytes().startswith(b"\x89PNG")
    widths = {line.count("|") for line in text.splitlines() if line.startswith(("| mle", "| case"))}
    assert len(widths) == 1


def test_targets_are_met_or_missed_by_the_numbers():
    case = replace(TINY, N=1024, D=576, V=49152)
    ours = {"peer": "fused-losses", "ratio_to_floor": 1.2, "ratio_to_ours": 1.0, "budget_mib": 256}
    rival = {"peer": "TRL", "ratio_to_floor": 2.4, "ratio_to_ours": 2.0, "budget_mib": None}
    record = {
        "name": case.name,
        "case": {**vars(case)},
        "device": "cpu",
        "contenders": [{"kind": "floor"}, ours, rival],
    }
    found = {check.what.partition(": ")[2]: check for check in targets.check([record])}
    assert set(found) == {"TRL over ours", "ours over the floor"}  # nobody else was measured
    assert found["TRL over ours"].met
    assert not found["ours over the floor"].met
    assert targets.check([{**record, "device": "cuda"}]) == []


# The one GPU command, as far as it goes without one


def gpu_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_steps_are_listed_without_running_them(tmp_path):
    done = gpu_command("--list", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    *rows, total = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["tests", "rows", "ceilings", "profile", "suite"]
    assert total.split() == ["together", "up", "to", "570", "s"]
    assert "tests/test_gpu.py" in rows[0]
    assert "--no-slow-peers" in rows[-1]
    assert rows[-1].endswith("--cases A,asked")
    assert not (tmp_path / "out").exists()


def test_steps_that_do_not_exist_are_refused_by_name():
    done = gpu_command("--list", "--steps", "suite,speed")
    assert done.returncode == 2
    assert "no step speed; there are tests, rows" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the command runs, not its rehearsal")
def test_the_whole_command_rehearses_on_a_cpu_within_its_budget(tmp_path):
    """Its rows are those of the carried file: the kernels still give what the interpreter gave."""
    pytest.importorskip("triton", reason="the row passes are Triton kernels")
    start = time.monotonic()
    done = gpu_command("--rehearse", "--budget", "240", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - start < 240
    found = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    ended = {step["step"]: step["status"] for step in found["steps"]}
    assert ended == dict.fromkeys(gpu.FIRST, "passed")
    timed = json.loads((tmp_path / "ceilings.json").read_text("utf-8"))["lines"]
    assert not [line for line in timed if "error" in line]
    names = " ".join(line["name"] for line in timed)
    for part in ("copy", "z = x W'", "dx = dz W", "dW = dz' x", "summed in float32", "gradient"):
        assert part in names
    (suite,) = tmp_path.glob("*/*-quick.json")
    (record,) = json.loads(suite.read_text("utf-8"))["cases"]
    assert record["case"]["path"] == "logits"
    assert "  = mle, from logits" in done.stdout  # the figures are at the end of what is printed
    assert done.stdout.splitlines()[-1] == "suite        passed"


def test_a_budget_that_is_spent_ends_the_run_with_what_is_done_on_disk(tmp_path, capsys):
    plan = [step("print('done')"), step("import time; time.sleep(60)"), step("never")]
    start = time.monotonic()
    code = gpu._run_all(plan, tmp_path, dict(os.environ), start + 4.0, math.inf, "cpu")
    assert time.monotonic() - start < 4.0 + gpu.END
    assert code == 1
    found = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    statuses = [step["status"] for step in found["steps"]]
    assert statuses == ["passed", "out of time", "skipped"]
    assert found["steps"][-1]["reason"] == "no time left"


def test_a_step_is_told_when_to_start_nothing_new(tmp_path):
    show = "import sys; print(sys.argv[1:])"
    environment = dict(os.environ)
    log = tmp_path / "gpu.log"
    paced = step(show, limit=900.0, paced=True)
    told = gpu.run_step(paced, log, environment, left=100.0)
    assert (told["limit"], told["tail"]) == (100, ["['--stop-after', '75']"])
    told = gpu.run_step(paced, log, environment, left=100.0, stop_after=30.0)
    assert told["tail"] == ["['--stop-after', '30']"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path):
    done = gpu_command("--out", str(tmp_path))
    assert done.returncode == 2
    assert "needs a CUDA or HIP device" in done.stderr


def step(code: str, limit: float = 20.0, **more: object) -> gpu.Step:
    return gpu.Step("step", [sys.executable, "-c", code], limit, **more)


def test_a_step_that_fails_is_recorded_with_its_last_lines(tmp_path):
    log = tmp_path / "gpu.log"
    failed = gpu.run_step(step("print('so far'); raise SystemExit(3)"), log, dict(os.environ))
    assert (failed["status"], failed["code"], failed["tail"]) == ("failed", 3, ["so far"])
    code = "import os; print(os.environ['MODE'])"
    passed = gpu.run_step(step(code, environment={"MODE": "on"}), log, dict(os.environ))
    assert (passed["status"], passed["tail"]) == ("passed", ["on"])
    assert "so far" in log.read_text()
    assert "step: MODE=on " in log.read_text()


def test_a_step_that_hangs_is_ended_with_what_it_started(tmp_path):
    pid_file = tmp_path / "pid"
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))
time.sleep(60)
"""
    ended = gpu.run_step(step(code, limit=3.0), tmp_path / "gpu.log", dict(os.environ))
    assert ended["status"] == "out of time"
    assert ended["seconds"] < 15
    grandchild = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(grandchild)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_step_without_its_tool_is_skipped_by_name(tmp_path):
    found = gpu.run_step(step("", needs="/no/such/tool"), tmp_path / "gpu.log", {})
    assert found == {"step": "step", "status": "skipped", "reason": "no tool"}


def test_wheels_come_after_this_checkout_on_the_path(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "peer-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("peer_of_ours/__init__.py", "name = 'unpacked'\n")
    path = gpu.child_environment(wheels, site)["PYTHONPATH"].split(os.pathsep)
    assert path[:3] == [str(ROOT), str(ROOT / "kernels"), str(site)]
    assert (site / "peer_of_ours" / "__init__.py").read_text() == "name = 'unpacked'\n"


def test_row_results_compare_equal_to_themselves_and_not_to_others(
    device, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("triton", reason="the row passes are Triton kernels")
    monkeypatch.setattr(checks, "TOLERANCE", {torch.float32: 2e-5})
    path = tmp_path / "rows.pt"
    found = dict(list(checks.row_results(device))[:2])
    monkeypatch.setattr(checks, "row_results", lambda device: iter(found.items()))
    checks.save_rows(path, device)
    assert checks.compare_rows(path, device) == 0
    name = next(iter(found))
    found[name][-1][1] += 0.1
    assert checks.compare_rows(path, device) == 1
    assert name in next(x for x in capsys.readouterr().out.splitlines() if "BAD" in x)


def test_every_route_can_be_called_and_profiled(capsys):
    assert checks.small("cpu", "torch") == 0
    assert checks.profiles("cpu", 32, 16, 97) == 0
    shown = capsys.readouterr().out
    for name in ("no gradient", "mle", "hellinger", "dpo", "per token", "logits"):
        assert f"== {name}, trained head" in shown
        assert f"== {name}, frozen head" in shown
