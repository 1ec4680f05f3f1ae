"""Plain TRL beside its integration here and this library's own trainers: five steps, every number.

A sample of the grid runs, in which every two settings meet; ``FUSED_LOSSES_PARITY=pairs``
makes every loss meet every setting, ``all`` runs the whole product (hours).
"""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import llama, tokenizer

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

import datasets  # noqa: E402
import transformers  # noqa: E402

from fused_losses.integrations import trl as integration  # noqa: E402
from fused_losses.preference import PAIR_LOSSES  # noqa: E402
from fused_losses.trainer import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

EXTENT = os.environ.get("FUSED_LOSSES_PARITY", "sample")
Case = dict[str, str]

# ------------------------------------------------------------------ data

ROWS = 22  # five steps of four, and a rest that is never seen
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def words(seed: int, least: int, most: int) -> list[str]:
    """Random texts of lower-case letters."""
    g = random.Random(seed)
    return ["".join(g.choices("abcdefgh ", k=g.randint(least, most))) + "x" for _ in range(ROWS)]


ASKED, TOLD, WRONG = words(1, 1, 8), words(2, 1, 12), words(3, 1, 12)


def turns(role: str, text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": role, "content": text}]


def conversation(i: int) -> list[dict[str, str]]:
    """Two questions and two answers."""
    parts = zip(("user", "assistant") * 2, (ASKED[i], WRONG[i], TOLD[i], ASKED[-i]), strict=True)
    return [m for role, text in parts for m in turns(role, text)]


def table(row: Callable[[int], dict[str, Any]]) -> datasets.Dataset:
    """A dataset of all rows."""
    return datasets.Dataset.from_list([row(i) for i in range(ROWS)])


def tokens(i: int) -> dict[str, Any]:
    """Token ids of a question and its answer, and which of them are the answer."""
    ids = [tokenizer()(text)["input_ids"] for text in (ASKED[i], TOLD[i])]
    return {"input_ids": ids[0] + ids[1], "completion_mask": [0] * len(ids[0]) + [1] * len(ids[1])}


SFT_DATA: dict[str, tuple[datasets.Dataset, dict[str, Any]]] = {
    "text": (table(lambda i: {"text": ASKED[i] + TOLD[i]}), {}),
    "completion": (table(lambda i: {"prompt": ASKED[i], "completion": TOLD[i]}), {}),
    "whole": (
        table(lambda i: {"prompt": ASKED[i], "completion": TOLD[i]}),
        {"completion_only_loss": False},
    ),
    "answer": (
        table(
            lambda i: {
                "prompt": turns("user", ASKED[i]),
                "completion": turns("assistant", TOLD[i]),
            }
        ),
        {},
    ),
    "assistant": (table(lambda i: {"messages": conversation(i)}), {"assistant_only_loss": True}),
    "tokens": (table(tokens), {"completion_only_loss": True}),
}
DPO_DATA: dict[str, datasets.Dataset] = {
    "text": table(lambda i: {"prompt": ASKED[i], "chosen": TOLD[i], "rejected": WRONG[i]}),
    "messages": table(
        lambda i: {
            "prompt": turns("user", ASKED[i]),
            "chosen": turns("assistant", TOLD[i]),
            "rejected": turns("assistant", WRONG[i]),
        }
    ),
}

# ------------------------------------------------------------------ the grid

ACCUMULATION: dict[str, dict[str, Any]] = {
    "one batch": {"per_device_train_batch_size": 4},
    "two micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
PRECISION: dict[str, dict[str, Any]] = {"fp32": {"bf16": False}, "bf16": {"bf16": True}}
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "kept": {"gradient_checkpointing": False},
    "checkpointed": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}
ADAPTER: dict[str, dict[str, Any] | None] = {
    "full": None,
    "LoRA": {},
    "LoRA and head": {"modules_to_save": ["lm_head"]},
}
EVALUATION = ("one set", "several sets")
SFT_LAYOUT: dict[str, dict[str, Any]] = {
    "padded": {"max_length": 24},
    "keep_end": {"max_length": 12, "truncation_mode": "keep_end"},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 48},
    "packed, evaluated padded": {"packing": True, "max_length": 48, "eval_packing": False},
}
SFT_LOSS: dict[str, dict[str, Any]] = {
    "nll": {},
    "dft": {"loss_type": "dft"},
    "smoothed": {"label_smoothing_factor": 0.1},
}
DPO_LOSS: dict[str, dict[str, Any]] = {
    name: {"loss_type": [name]}
    | ({"label_smoothing": 0.1} if name in ("robust", "exo_pair", "aot") else {})
    for name, loss in PAIR_LOSSES.items()
    if not loss.reference_free
} | {
    "bco_pair": {"loss_type": ["bco_pair"]},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "sft": {"loss_type": ["sft"]},
    "sigmoid and sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.2]},
    "a mixture": {"loss_type": ["ipo", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ipo and hinge": {"loss_type": ["ipo", "hinge"], "loss_weights": [0.8, 1.5]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "length desensitised": {"ld_alpha": 0.5},
}
# What DPOConfig takes; sft is a term beside a pair loss there, and a trainer of its own.
OURS = {*PAIR_LOSSES, "sft"}
DPO_LAYOUT: dict[str, dict[str, Any]] = {
    "padded": {"max_length": 64},
    "cut": {"max_length": 16},
    "padding-free": {"padding_free": True},  # TRL pads
}
REFERENCE: dict[str, dict[str, Any]] = {
    "in each step": {},
    "precomputed": {"precompute_ref_log_probs": True},
}

SETTINGS: dict[str, tuple[str, ...]] = {
    "accumulation": tuple(ACCUMULATION),
    "precision": tuple(PRECISION),
    "checkpointing": tuple(CHECKPOINTING),
    "adapter": tuple(ADAPTER),
    "evaluation": EVALUATION,
}
SFT_GRID = SETTINGS | {
    "data": tuple(SFT_DATA),
    "layout": tuple(SFT_LAYOUT),
    "loss": tuple(SFT_LOSS),
}
DPO_GRID = SETTINGS | {
    "data": tuple(DPO_DATA),
    "layout": tuple(DPO_LAYOUT),
    "reference": tuple(REFERENCE),
    "loss": tuple(DPO_LOSS),
}


def cases(grid: Mapping[str, tuple[str, ...]]) -> list[Case]:
    """Draw cases until every two settings have met; see the module's docstring."""
    if EXTENT == "all":
        return [
            dict(zip(grid, choice, strict=True)) for choice in itertools.product(*grid.values())
        ]
    g = random.Random(0)
    crossed = [name for name in grid if EXTENT == "pairs" or name != "loss"]
    plainly = {("precision", "fp32"), ("accumulation", "one batch")}
    wanted = {frozenset({("loss", loss), *plainly}) for loss in grid["loss"]}
    for one, other in itertools.combinations(crossed, 2):
        both = itertools.product(grid[one], grid[other])
        wanted |= {frozenset({(one, a), (other, b)}) for a, b in both}

    def met(case: Case) -> set[frozenset[tuple[str, str]]]:
        return {s for s in wanted if s <= case.items()}

    chosen = []
    while wanted:
        # Some that have a wanted pair, and of them the one that has most.
        drawn = [
            {name: g.choice(values) for name, values in grid.items()} | dict(g.choice(order))
            for order in [sorted(wanted, key=sorted)]
            for _ in range(30)
        ]
        chosen.append(max(drawn, key=lambda case: len(met(case))))
        wanted -= met(chosen[-1])
    return chosen


# ------------------------------------------------------------------ runs

SILENT: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 5,
    "learning_rate": 0.05,
    # Adam divides roundings by themselves, where a gradient is 0.
    "optim": "sgd",
    "per_device_eval_batch_size": ROWS,
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def options_of(case: Case) -> dict[str, Any]:
    """Options that all trainers call by one name."""
    return (
        SILENT
        | ACCUMULATION[case["accumulation"]]
        | PRECISION[case["precision"]]
        | CHECKPOINTING[case["checkpointing"]]
    )


def run(
    trainer: Any, config: Any, data: datasets.Dataset, case: Case, **more: Any
) -> list[dict[str, float]]:
    """Evaluate, take five steps, evaluate: what was logged."""
    adapter = ADAPTER[case["adapter"]]
    made = tokenizer()
    made.chat_template = TEMPLATE
    if adapter is not None:
        more["peft_config"] = peft.LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
            # Where policy and reference agree, TRL's accuracies are those of roundings.
            init_lora_weights=False,
            **adapter,
        )
        if trainer is DPOTrainer:
            # TRL compares with the adapters off, ours with what the run starts from.
            more["ref_model"] = llama()
    held_out = data.select(range(4, 10))
    if case["evaluation"] == "several sets":
        held_out = {"near": held_out, "far": data.select(range(3))}
    model = llama()
    torch.manual_seed(42)  # adapters are drawn after args.seed is set
    done = trainer(
        model=model,
        args=config,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=made,
        **more,
    )
    logs = [done.evaluate()]
    done.train()
    return [*logs, *done.state.log_history, done.evaluate()]


TIMES = ("_time", "runtime", "per_second", "total_flos", "epoch")
# TRL takes the mean of the micro-batches' means of these, our own trainers that of the tokens.
OF_TOKENS = ("entropy", "mean_token_accuracy")
# A count of comparisons, each of which a rounding of bf16 may turn.
COUNTS = ("mean_token_accuracy", "rewards/accuracies")
TOLERANCE = {"fp32": {"rel": 3e-5, "abs": 3e-6}, "bf16": {"rel": 5e-2, "abs": 5e-2}}
# Exponentials of log-ratios, and a steep blend: a pair's weight changes by many roundings.
STEEP = {"fp32": {"rel": 1e-3, "abs": 1e-4}, "bf16": {"rel": 0.2, "abs": 0.1}}


def assert_equal(got: Any, want: Any, case: Case) -> None:
    """Compare the numbers that both logged."""
    but = COUNTS if case["precision"] == "bf16" else ()
    if got[0].keys() != want[0].keys() and case["accumulation"] != "one batch":
        but += OF_TOKENS
    steep = case["loss"] in ("discopop", "forward_kl")
    near = (STEEP if steep else TOLERANCE)[case["precision"]]
    assert len(got) == len(want)
    found, seen = [], set[str]()
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        for name in mine.keys() & theirs.keys():
            if name.endswith(TIMES) or name.endswith(but):
                continue
            seen.add(name)
            if mine[name] != pytest.approx(theirs[name], **near):
                found.append(f"log {i}: {name} is {mine[name]:.9g}, in TRL {theirs[name]:.9g}")
    assert {"loss", "grad_norm", "num_tokens", "train_loss"} <= seen
    if found:
        pytest.fail("\n".join(sorted(found)), pytrace=False)


def names(cases: list[Case]) -> list[str]:
    return ["-".join(case.values()).replace(" ", "_") for case in cases]


SFT_CASES, DPO_CASES = cases(SFT_GRID), cases(DPO_GRID)


@pytest.mark.parametrize("case", SFT_CASES, ids=names(SFT_CASES))
def test_sft_takes_trls_steps(case: Case, tmp_path: Path) -> None:
    data, scope = SFT_DATA[case["data"]]
    options = options_of(case) | SFT_LAYOUT[case["layout"]] | scope | SFT_LOSS[case["loss"]]
    theirs, mixed = (
        run(kind, trl.SFTConfig(str(tmp_path), **copy.deepcopy(options)), data, case)
        for kind in (trl.SFTTrainer, integration.SFTTrainer)
    )
    assert [log.keys() for log in mixed] == [log.keys() for log in theirs]
    assert_equal(mixed, theirs, case)
    if case["loss"] != "dft":  # TRL's
        assert_equal(run(SFTTrainer, SFTConfig(str(tmp_path), **options), data, case), theirs, case)


@pytest.mark.parametrize("case", DPO_CASES, ids=names(DPO_CASES))
def test_dpo_takes_trls_steps(case: Case, tmp_path: Path) -> None:
    data = DPO_DATA[case["data"]]
    loss = DPO_LOSS[case["loss"]]
    options = options_of(case) | DPO_LAYOUT[case["layout"]] | {"beta": 0.3}

    def reference() -> dict[str, Any]:
        return {"ref_model": llama(seed=1)} if case["adapter"] == "full" else {}

    given = options | loss | REFERENCE[case["reference"]]
    theirs, mixed = (
        run(kind, trl.DPOConfig(str(tmp_path), **copy.deepcopy(given)), data, case, **reference())
        for kind in (trl.DPOTrainer, integration.DPOTrainer)
    )
    assert [log.keys() for log in mixed] == [log.keys() for log in theirs]
    assert_equal(mixed, theirs, case)
    named = loss.get("loss_type", ["TRL's"])
    # Of several micro-batches, TRL's sft is the mean of their means, ours that of their tokens.
    averages = "sft" in named and case["accumulation"] != "one batch"
    if OURS.issuperset(named) and named != ["sft"] and not averages:
        own = DPOConfig(str(tmp_path), **options | loss | {"drop_unlearnable_rows": True})
        assert_equal(run(DPOTrainer, own, data, case, **reference()), theirs, case)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_our_means_over_micro_batches_are_trls_of_one_batch(kind: str, tmp_path: Path) -> None:
    case = {"precision": "fp32", "checkpointing": "kept", "adapter": "full", "loss": "nll"}
    case |= {"evaluation": "one set"}
    data, trainers, configs = {
        "sft": (
            SFT_DATA["completion"][0],
            (SFTTrainer, trl.SFTTrainer),
            (SFTConfig, trl.SFTConfig),
        ),
        "dpo": (DPO_DATA["text"], (DPOTrainer, trl.DPOTrainer), (DPOConfig, trl.DPOConfig)),
    }[kind]
    more = {} if kind == "sft" else {"ref_model": llama(seed=1)}
    own, theirs = (
        run(
            trainer,
            config(str(tmp_path), **options_of(case | {"accumulation": batches})),
            data,
            case | {"accumulation": batches},
            **copy.deepcopy(more),
        )
        for trainer, config, batches in zip(trainers, configs, reversed(ACCUMULATION), strict=True)
    )
    assert_equal(own, theirs, case | {"accumulation": "one batch"})


def test_lora_on_the_head_which_trl_refuses_takes_the_steps_of_transformers(tmp_path: Path) -> None:
    def adapted() -> Any:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        torch.manual_seed(5)
        return peft.get_peft_model(llama(), config)

    rows = table(lambda i: {"input_ids": tokens(i)["input_ids"], "labels": tokens(i)["input_ids"]})
    options = SILENT | ACCUMULATION["two micro-batches"]
    plain = transformers.Trainer(
        adapted(),
        transformers.TrainingArguments(str(tmp_path), **options),
        trl.trainer.sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0),
        rows,
    )
    own = SFTTrainer(adapted(), SFTConfig(str(tmp_path), **options), rows)
    for trainer in (plain, own):
        trainer.train()
    steps = [t.state.log_history for t in (own, plain)]
    for mine, theirs in zip(*(log[:-1] for log in steps), strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=3e-5)
    config = trl.SFTConfig(str(tmp_path), **SILENT, bf16=False)
    with pytest.raises(ValueError, match="lm_head"):
        trl.SFTTrainer(adapted(), config, None, rows, processing_class=tokenizer())
