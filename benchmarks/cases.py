"""What is measured, as data: one row per case, with the loss, the shape and the memory budgets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Loss = Literal[
    "mle", "pearson", "hellinger", "dpo", "grpo", "kto", "distillation", "sparse teacher", "brier"
]
Trained = Literal["head", "hidden", "nothing"]


@dataclass(frozen=True)
class Case:
    """One comparison: everything that takes part computes the same loss on the same inputs.

    Attributes:
        loss: What is computed; "dpo" on pairs of sequences, "grpo" and "kto" on sequences,
            "distillation" from a second model's hidden states, "sparse teacher" from its likeliest
            words, "brier" as a function of the user's own on whole rows of logits.
        N: Positions, a multiple of 2 ``length``; ``ignored`` of them carry no label.
        D: Hidden size; on the logits path the size behind the planted logits.
        V: Vocabulary.
        dtype: Of hidden states, head and logits.
        ignored: Share of every sequence, at its start as a prompt is, without labels.
        trained: "head": dX and dW; "hidden": the head is frozen; "nothing": no gradient.
        path: "linear" from hidden states, "logits" from logits.
        budget: Workspace in MiB: the one that ratios refer to.
        budgets: Further workspaces, as points of the plot of time against memory.
        length: Tokens of a sequence.
        beside: Other calls of this library timed in the same rounds: "mle" the plain loss,
            "unmasked" the same with every label counted.
        only: Names of the peers to run; empty for all that know the loss.
        series: Letter of the size that grows from case to case, for the scaling plots.
        quick: Part of ``--quick``.
    """

    loss: Loss
    N: int
    D: int
    V: int
    dtype: str = "float32"
    ignored: float = 0.0
    trained: Trained = "head"
    path: Literal["linear", "logits"] = "linear"
    budget: int = 256
    budgets: tuple[int, ...] = ()
    length: int = 128
    beside: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    series: Literal["", "N", "V", "D"] = ""
    quick: bool = False

    @property
    def products(self) -> int:
        """GEMMs of N D V that cannot be avoided: logits, dX, dW; none on the logits path.

        A second model's logits are one more.
        """
        if self.path == "logits":
            return 0
        second = self.loss == "distillation"
        return {"head": 3, "hidden": 2, "nothing": 1}[self.trained] + second

    @property
    def name(self) -> str:
        """Unique, and readable in a table."""
        parts = [self.loss]
        if self.path == "logits":
            parts.append("from logits")
        parts += {"head": [], "hidden": ["frozen head"], "nothing": ["no gradient"]}[self.trained]
        if self.ignored:
            parts.append(f"{self.ignored:.0%} ignored")
        size = (self.N, self.V) if self.path == "logits" else (self.N, self.D, self.V)
        series = f" scaling {self.series}" if self.series else ""
        return f"{', '.join(parts)}, {size} {self.dtype}{series}"


def _every_kind(base: Case) -> list[Case]:
    """The losses and situations beside plain MLE, at one size."""
    return [
        replace(base, loss="pearson", beside=("mle",)),
        replace(base, loss="hellinger", beside=("mle",)),
        replace(base, loss="dpo", beside=("mle",)),
        replace(base, loss="grpo", beside=("mle",)),
        replace(base, loss="kto", beside=("mle",)),
        replace(base, loss="distillation", beside=("mle",)),
        replace(base, loss="sparse teacher", beside=("mle",)),
        replace(base, loss="brier", beside=("mle",)),
        replace(base, trained="hidden"),
        replace(base, loss="dpo", trained="hidden"),
        replace(base, trained="nothing"),
        replace(base, ignored=0.5, beside=("unmasked",)),
        replace(base, ignored=0.8, beside=("unmasked",)),
        replace(base, path="logits"),
    ]


def _scaling(base: Case, **sizes: tuple[int, ...]) -> list[Case]:
    few = ("eager", "TRL")
    return [
        replace(base, **{letter: size}, series=letter, only=few)
        for letter, values in sizes.items()
        for size in values
    ]


_SMALL = Case("mle", 256, 256, 8192, length=32, budget=64, quick=True)
_WIDE = Case("mle", 1024, 576, 49152)
_LONG = Case("mle", 2048, 2048, 32000)

CPU_CASES: tuple[Case, ...] = (
    replace(_SMALL, budget=4, budgets=(1, 64)),
    *_every_kind(_SMALL),
    replace(_WIDE, budgets=(16, 64, 1024), quick=True),
    replace(_LONG, budgets=(64, 1024)),
    replace(_WIDE, dtype="bfloat16", budgets=(64,)),
    replace(_LONG, dtype="bfloat16"),
    *_every_kind(_WIDE),
    replace(_LONG, trained="hidden", only=("eager", "TRL")),
    replace(_LONG, ignored=0.5, beside=("unmasked",), only=("eager", "TRL")),
    *_scaling(
        Case("mle", 512, 512, 16384),
        N=(256, 512, 1024, 2048),
        V=(8192, 16384, 32768, 65536),
        D=(256, 512, 1024, 2048),
    ),
)

_A = Case("mle", 8192, 4096, 128256, "bfloat16", budget=1024, length=512)
_B = Case("mle", 16384, 2304, 256000, "bfloat16", budget=1024, length=512)
_ASKED = Case("mle", 8192, 4096, 151936, "bfloat16", budget=1024, length=512)
_GPU_SMALL = Case("mle", 1024, 1024, 32000, "bfloat16", budget=64, quick=True)

# Those that matter most come first: `--stop-after` may end the run.
GPU_CASES: tuple[Case, ...] = (
    replace(_A, budgets=(128, 256, 512, 4096)),
    replace(_ASKED, budgets=(512, 2048)),
    *_every_kind(_A),
    replace(_B, budgets=(256, 512)),
    *(replace(_A, path="logits", V=V) for V in (32000, 262144)),
    *_scaling(
        Case("mle", 4096, 2048, 65536, "bfloat16", budget=1024, length=512),
        N=(1024, 4096, 16384),
        V=(32768, 65536, 262144),
        D=(1024, 2048, 8192),
    ),
    replace(_GPU_SMALL, budgets=(16,)),
    *_every_kind(_GPU_SMALL),
)


# Sizes by name, for `--cases`.
SIZES = {
    letter: (case.N, case.D, case.V) for letter, case in (("A", _A), ("B", _B), ("asked", _ASKED))
}


def select(device: str, *, quick: bool, named: str = "") -> list[Case]:
    """Return the cases of a device, in the order in which they run.

    ``named`` holds sizes (A, B, asked) and parts of names ("scaling", "pearson"), separated by
    commas: cases that meet one of them. Empty: all.
    """
    cases = GPU_CASES if device == "cuda" else CPU_CASES
    words = named.split(",") if named else []

    def wanted(case: Case) -> bool:
        size = (case.N, case.D, case.V)
        return any(size == SIZES[word] if word in SIZES else word in case.name for word in words)

    return [case for case in cases if (case.quick or not quick) and (wanted(case) or not words)]
