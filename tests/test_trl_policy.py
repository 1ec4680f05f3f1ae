"""TRL's GRPOTrainer and KTOTrainer on this engine: TRL's own numbers, and no logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import V, llama, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

import datasets  # noqa: E402

import fused_losses  # noqa: E402
from fused_losses.integrations import trl as ours  # noqa: E402
from fused_losses.integrations.trl.grpo_checks import refuse_sharded  # noqa: E402

SILENT: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 5,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    # Adam divides roundings by themselves, where a gradient is 0.
    "optim": "sgd",
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
}
PROMPTS = datasets.Dataset.from_dict({"prompt": ["abc", "d", "ba ba", "ccc", "hi", "x y z"]})
JUDGED = datasets.Dataset.from_dict(
    {
        "prompt": ["ac", "b d", "ca", "dbdb", "eh", "f", "gg", "hh"],
        "completion": ["cdcd", "dc", "ddd", "c", "gf", "fefe", "aa", "hahaha"],
        "label": [True, False, True, True, False, False, True, False],
    }
)
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model, which TRL loads its reference from."""
    folder = tmp_path_factory.mktemp("start")
    llama().save_pretrained(folder)
    return str(folder)


def low_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward: the share of even tokens, and a little for length."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) + 0.05 * len(ids) for ids in completion_ids]


def grpo(
    kind: Any, folder: Path, options: dict[str, Any], start: str, lora: bool = False, **more: Any
) -> Any:
    """A GRPO trainer of TRL's or ours."""
    given = {"num_generations": 2, "max_completion_length": 6, "loss_type": "grpo"}
    if lora:
        more["peft_config"] = peft.LoraConfig(**LORA, init_lora_weights=False)
    torch.manual_seed(42)
    return kind(
        start,
        low_tokens,
        args=trl.GRPOConfig(str(folder), **SILENT | given | options),
        train_dataset=PROMPTS,
        processing_class=tokenizer(),
        **more,
    )


def kto(
    kind: Any, folder: Path, options: dict[str, Any], ref: int | None = 1, lora: bool = False
) -> Any:
    """A KTO trainer of TRL's or ours."""
    more: dict[str, Any] = {} if ref is None else {"ref_model": llama(seed=ref)}
    if lora:
        more["peft_config"] = peft.LoraConfig(**LORA, init_lora_weights=False)
    torch.manual_seed(42)
    return kind(
        llama(),
        args=trl.KTOConfig(str(folder), **SILENT | options),
        train_dataset=JUDGED,
        eval_dataset=JUDGED.select(range(4)),
        processing_class=tokenizer(),
        **more,
    )


TIMES = ("_time", "runtime", "per_second", "total_flos", "epoch")


def assert_same_logs(make: Callable[[Any], Any], *kinds: Any) -> Any:
    """Train ours and TRL's, from one seed each: the same names, and every number equal."""
    trainers = []
    for kind in kinds:
        trainers.append(make(kind))
        trainers[-1].train()
        if trainers[-1].eval_dataset is not None:
            trainers[-1].evaluate()
    got, want = (trainer.state.log_history for trainer in trainers)
    assert len(got) == len(want)
    found = []
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            # TRL logs None for a mean of nothing.
            near = pytest.approx(value, rel=3e-5, abs=3e-6) if value is not None else None
            if not name.endswith(TIMES) and mine[name] != near:
                found.append(f"log {i}: {name} is {mine[name]}, in TRL {value}")
    if found:
        pytest.fail("\n".join(found), pytrace=False)
    assert {"loss", "grad_norm", "entropy"} <= got[0].keys()
    assert max(log.get("grad_norm", 0.0) for log in got) > 0.0
    return trainers[0]


# Two updates per generation: ratios leave 1, and some are clipped.
TWICE: dict[str, Any] = {"num_iterations": 2, "epsilon": 0.1, "use_bias_correction_kl": False}
IN_ONE_PASS: dict[str, dict[str, Any]] = {
    "grpo": TWICE,
    "grpo, on policy": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "bnpo": TWICE | {"loss_type": "bnpo", "temperature": 0.7},
    "dapo": {
        "loss_type": "dapo",
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "entropy_coef": 0.02,
    },
    "dr_grpo": TWICE | {"loss_type": "dr_grpo", "beta": 0.1, "epsilon_high": 0.2},
    "cispo": TWICE | {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.2},
    "luspo": TWICE | {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "GSPO": TWICE | {"importance_sampling_level": "sequence", "beta": 0.1, "epsilon": 3e-3},
    "adaptive entropy": TWICE
    | {"use_adaptive_entropy": True, "entropy_target": 9.0, "loss_type": "bnpo"},
    "cut responses left out": TWICE | {"mask_truncated_completions": True, "entropy_coef": 0.1},
}
AS_TRL: dict[str, dict[str, Any]] = {
    "sapo": TWICE | {"loss_type": "sapo"},
    "vespo": TWICE | {"loss_type": "vespo"},
    "delta": TWICE | {"delta": 1.2},
    "top entropies": TWICE | {"top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    "off-policy mask": TWICE | {"off_policy_mask_threshold": 1e-4},
    "corrected KL": TWICE | {"use_bias_correction_kl": True, "beta": 0.2},
}


@pytest.mark.filterwarnings("error:target rows")
@pytest.mark.parametrize("case", [*IN_ONE_PASS, *AS_TRL])
def test_grpo_takes_trls_steps(case: str, start: str, tmp_path: Path) -> None:
    options = IN_ONE_PASS.get(case) or AS_TRL[case]
    made: list[None] = []

    def make(kind: Any) -> Any:
        trainer = grpo(kind, tmp_path, copy.deepcopy(options), start)
        if kind is ours.GRPOTrainer:
            count_calls(trainer, made)
        return trainer

    trainer = assert_same_logs(make, ours.GRPOTrainer, trl.GRPOTrainer)
    assert bool(made) == (case in IN_ONE_PASS)
    if case == "grpo":
        assert 0.0 < trainer.state.log_history[1]["clip_ratio/region_mean"] < 1.0


def count_calls(trainer: Any, made: list[None]) -> None:
    """Note each loss that the engine computes within one pass."""
    inner = trainer._policy_options

    def options(*args: Any) -> Any:
        made.append(None)
        return inner(*args)

    trainer._policy_options = options


def test_grpo_of_an_adapter_takes_trls_steps(start: str, tmp_path: Path) -> None:
    options = TWICE | {"beta": 0.3, "max_steps": 3}
    assert_same_logs(
        lambda kind: grpo(kind, tmp_path, options, start, lora=True),
        ours.GRPOTrainer,
        trl.GRPOTrainer,
    )


KTO_CASES: dict[str, dict[str, Any]] = {
    "kto": {"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.3},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize("case", KTO_CASES)
def test_kto_takes_trls_steps(case: str, tmp_path: Path) -> None:
    trainer = assert_same_logs(
        lambda kind: kto(kind, tmp_path, KTO_CASES[case]), ours.KTOTrainer, trl.KTOTrainer
    )
    assert "rewards/chosen" in trainer.state.log_history[0]
    assert "eval_rewards/chosen" in trainer.state.log_history[-1]


@pytest.mark.parametrize("precomputed", [False, True])
def test_kto_of_an_adapter_takes_trls_steps(precomputed: bool, tmp_path: Path) -> None:
    options = {"precompute_ref_log_probs": precomputed}
    assert_same_logs(
        lambda kind: kto(kind, tmp_path, options, ref=None, lora=True),
        ours.KTOTrainer,
        trl.KTOTrainer,
    )


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_rewards_start_at_zero_in_bf16(loss_type: str, tmp_path: Path) -> None:
    options = {"bf16": True, "loss_type": loss_type, "max_steps": 1}
    trainer = kto(ours.KTOTrainer, tmp_path, options, ref=0)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/chosen"] == log["rewards/rejected"] == 0.0
    assert log["loss"] == pytest.approx(0.5, abs=2e-3)


# ------------------------------------------------------------------ one call of the loss


def rollouts(**more: Any) -> dict[str, Any]:
    """Inputs of GRPO's loss, as TRL prepares them: four sequences of up to six sampled tokens."""
    g = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 5 + [0], [1] * 6])
    return {
        "prompt_ids": torch.randint(4, V, (4, 3), generator=g),
        "prompt_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]]),
        "completion_ids": torch.randint(4, V, (4, 6), generator=g),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 0.7, -1.2]),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": -4.0 - torch.rand(4, 6, generator=g),
    } | more


def loss_and_gradients(trainer: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """One call of a trainer's loss."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, copy.deepcopy(inputs))
    loss.backward()
    found = [loss.detach(), *(p.grad for p in trainer.model.parameters() if p.grad is not None)]
    trainer.model.zero_grad()
    return found


WEIGHED = torch.tensor([[0.5], [2.0], [0.0], [1.0]])
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What tools wrote stands in a response, and is not learnt.
    "tools": (
        {"loss_type": "bnpo"},
        {
            "tool_mask": torch.tensor([[1, 0, 1, 1, 0, 1]] * 4),
            "old_per_token_logps": torch.tensor([[-4.0, -40.0, -5.0, -4.0, -40.0, -4.5]] * 4),
        },
    ),
    "vLLM, per token": (
        {"loss_type": "dapo", "epsilon_high": 0.3},
        {"importance_sampling_ratio": WEIGHED * torch.linspace(0.5, 1.5, 6)},
    ),
    "vLLM, per sequence": ({"loss_type": "cispo"}, {"importance_sampling_ratio": WEIGHED}),
    "advantages per token": (
        {"loss_type": "dr_grpo"},
        {"advantages": torch.linspace(-1.0, 1.0, 24).view(4, 6)},
    ),
    "a batch without a token": (
        {"loss_type": "dapo", "entropy_coef": 0.1},
        {
            "completion_mask": torch.zeros(4, 6, dtype=torch.long),
            "num_items_in_batch": torch.tensor(0),
        },
    ),
}


@pytest.mark.filterwarnings("error:target rows")
@pytest.mark.parametrize("case", CALLS)
def test_what_sampling_adds_counts_as_in_trl(case: str, start: str, tmp_path: Path) -> None:
    options, more = CALLS[case]
    got, want = [], []
    for kind, found in ((ours.GRPOTrainer, got), (trl.GRPOTrainer, want)):
        trainer = grpo(kind, tmp_path, options, start)
        trainer.use_vllm = "vLLM" in case  # its ratios are in the inputs; no engine is started
        found += loss_and_gradients(trainer, rollouts(**more))
        logged = trainer._metrics["train"]
        found += [torch.tensor(v) for name, v in logged.items() if name.startswith("clip")]
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6, equal_nan=True)


class Largest(TorchDispatchMode):
    """The most elements that a tensor with a dimension of the vocabulary's size has had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            head = {V, 32}  # or its transpose
            if isinstance(t, torch.Tensor) and V in t.shape and set(t.shape) != head:
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("case", ["grpo", "sapo", "corrected KL"])
def test_grpo_makes_no_logits(
    case: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE_BYTES", str(12 * V * 4))
    trainer = grpo(ours.GRPOTrainer, tmp_path, IN_ONE_PASS.get(case) or AS_TRL[case], start)
    inputs = rollouts(ref_per_token_logps=torch.full((4, 6), -4.0))
    with Largest() as largest:
        trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            6,
        )
        loss_and_gradients(trainer, inputs)
    assert 0 < largest.elements <= 12 * V < int(inputs["completion_mask"].sum()) * V


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_makes_no_logits(
    loss_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE_BYTES", str(12 * V * 4))
    trainer = kto(ours.KTOTrainer, tmp_path, {"loss_type": loss_type})
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with Largest() as largest:
        loss_and_gradients(trainer, inputs)
    assert 0 < largest.elements <= 12 * V < int(inputs["completion_mask"].sum()) * V


def test_a_head_in_fp32_under_bf16_is_trls(start: str, tmp_path: Path) -> None:
    options = {"bf16": True, "cast_lm_head_to_fp32": True}
    got, want = (
        loss_and_gradients(grpo(kind, tmp_path, options, start), rollouts())
        for kind in (ours.GRPOTrainer, trl.GRPOTrainer)
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)


def test_a_policy_starts_at_its_reference_to_the_last_bit(start: str, tmp_path: Path) -> None:
    options = {"bf16": True, "beta": 0.1, "max_steps": 1}
    trainer = grpo(ours.GRPOTrainer, tmp_path, options, start)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0.0


# ------------------------------------------------------------------ the KL of whole distributions


def whole_logits(trainer: Any, inputs: dict[str, Any], direction: str) -> list[torch.Tensor]:
    """Loss, gradients and mean KL of GRPO by whole logits and autograd, old log-probs given."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    T, mask = inputs["completion_ids"].shape[1], inputs["completion_mask"]

    def predicted(model: Any) -> torch.Tensor:
        z = model(input_ids=ids, attention_mask=attention).logits[:, -T - 1 : -1]
        return (z / trainer.temperature).log_softmax(-1)

    model, ref = trainer.model, trainer.ref_model
    logp = predicted(model)
    with torch.no_grad():
        if ref is None:
            with trl.trainer.utils.use_adapter(model, None):
                logq = predicted(model)
        else:
            logq = predicted(ref)
    a, b = (logp, logq) if direction == "reverse_kl" else (logq, logp)
    kl = (a.exp() * (a - b)).sum(-1)
    mine = logp.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    loss = fused_losses.policy_loss(
        mine, inputs["old_per_token_logps"], inputs["advantages"], mask, kl=kl, beta=trainer.beta
    )
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return [*found, (kl * mask).sum().detach() / mask.sum()]


@pytest.mark.parametrize(("direction", "lora"), [("forward_kl", False), ("reverse_kl", True)])
def test_beta_may_weigh_the_kl_of_whole_distributions(
    direction: str, lora: bool, start: str, tmp_path: Path
) -> None:
    options = {"beta": 0.5, "use_bias_correction_kl": False, "temperature": 0.8}
    trainer = grpo(ours.GRPOTrainer, tmp_path, options, start, lora, anchor=direction)
    if not lora:  # away from the reference
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.5)
    # No reference log-probs: nothing reads them.
    found = loss_and_gradients(trainer, rollouts())
    found.append(torch.tensor(trainer._metrics["train"]["kl"][-1]))
    wanted = whole_logits(trainer, rollouts(), direction)
    assert wanted[-1] > 1e-3
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_run_with_it_starts_at_its_reference_and_leaves_out_what_trl_would_estimate(
    start: str, tmp_path: Path
) -> None:
    options = TWICE | {"bf16": True, "beta": 0.1, "max_steps": 2, "loss_type": "dapo"}
    trainer = grpo(ours.GRPOTrainer, tmp_path, options, start, anchor="reverse_kl")
    trainer.train()
    first, second, *_ = trainer.state.log_history
    assert abs(first["kl"]) < 1e-6 < second["kl"]
    assert trainer.beta == 0.1
    assert all("ref_per_token_logps" not in batch for batch in trainer._buffered_inputs)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_liger_kernel": True}, r"use_liger_kernel .*set it to False"),
        ({"loss_type": "ppo"}, r"loss_type must be one of 'grpo'.* got 'ppo'"),
        ({"importance_sampling_level": "group"}, r"importance_sampling_level must be one of"),
        ({"beta": -0.1, "use_bias_correction_kl": False}, "beta"),
        ({"epsilon_high": 0.0}, "epsilon_high"),
    ],
    ids=str,
)
def test_grpo_refuses_before_it_prepares_anything(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=named):
        grpo(ours.GRPOTrainer, tmp_path, options, start="no such folder")


@pytest.mark.parametrize(
    ("options", "anchor", "named"),
    [
        ({}, "reverse_kl", r"anchor='reverse_kl' would not be read: beta, its weight, is 0\.0"),
        ({"beta": 0.1}, "kl", r"anchor must be one of 'forward_kl', 'reverse_kl' or None"),
        ({"beta": 0.1}, "forward_kl", "not taken beside use_bias_correction_kl=True.*or leave"),
        (TWICE | {"beta": 0.1, "loss_type": "sapo"}, "forward_kl", "beside loss_type='sapo'"),
        (TWICE | {"beta": 0.1, "delta": 1.2}, "forward_kl", r"beside delta=1\.2"),
    ],
    ids=str,
)
def test_grpo_refuses_a_kl_that_it_cannot_weigh(
    options: dict[str, Any], anchor: str, named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=named):
        grpo(ours.GRPOTrainer, tmp_path, options, start="no such folder", anchor=anchor)


def test_a_reference_beside_a_sharded_model_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"anchor='forward_kl'.*FSDP or DeepSpeed.*leave anchor"):
        refuse_sharded("forward_kl", sharded=True)
    refuse_sharded(None, sharded=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_liger_kernel": True}, r"use_liger_kernel .*set it to False"),
        ({"loss_type": "bco"}, r"loss_type must be one of 'kto'.* got 'bco'"),
        ({"beta": 0.0}, "beta"),
        ({"undesirable_weight": -1.0}, "undesirable_weight"),
    ],
    ids=str,
)
def test_kto_refuses_before_it_prepares_anything(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=named):
        kto(ours.KTOTrainer, tmp_path, options)


def test_kto_refuses_images_and_adapters_that_change_the_base(tmp_path: Path) -> None:
    args = trl.KTOConfig(str(tmp_path), **SILENT)
    seen = JUDGED.add_column("images", [["a.png"]] * len(JUDGED))
    with pytest.raises(NotImplementedError, match=r"train_dataset has images.*trl\.KTOTrainer"):
        ours.KTOTrainer(llama(), llama(), args, train_dataset=seen, processing_class=tokenizer())
    lora = peft.LoraConfig(**LORA, init_lora_weights="pissa")
    more: dict[str, Any] = {"train_dataset": JUDGED, "processing_class": tokenizer()}
    with pytest.raises(NotImplementedError, match="init_lora_weights='pissa' of peft_config"):
        ours.KTOTrainer(llama(), args=args, peft_config=lora, **more)
