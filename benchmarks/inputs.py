"""Realistic inputs: hidden states aligned with the head's row of their label, logits of spread 4.

Zeros or uniform logits would flatter everyone: matrix products run faster on them, and whoever
skips small probabilities would skip everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

IGNORED = -100
SPREAD = 4.0
# Distance of the reference's hidden states from the policy's: log-ratios of about 0.3 a token.
REFERENCE_NOISE = 0.3
WORDS = 32  # of a sparse teacher, per position
_BLOCK = 512


@dataclass(frozen=True)
class Batch:
    """Sequences, on the pair losses [chosen; rejected] along dimension 0.

    ``x`` is (S, T, D), or the logits (S, T, V) where ``w`` is None. ``labels`` are whole, ``y`` has
    its prompts ignored. The reference model shares the head and has hidden states of its own.
    """

    x: Tensor
    w: Tensor | None
    y: Tensor
    labels: Tensor
    ref: Tensor | None = None  # (S, T) log-probs
    ref_x: Tensor | None = None
    words: Tensor | None = None  # (S, T, WORDS): the reference's likeliest, and their log-probs
    word_logps: Tensor | None = None
    pristine: Tensor | None = None  # logits, which some peers overwrite

    @property
    def counted(self) -> int:
        """Labels that are not ignored."""
        return int((self.y != IGNORED).sum())

    @property
    def leaves(self) -> list[Tensor]:
        """What wants a gradient."""
        return [t for t in (self.x, self.w) if t is not None and t.requires_grad]

    def restore(self) -> None:
        """Undo what an in-place peer did to the logits."""
        if self.pristine is not None:
            self.x.data.copy_(self.pristine)

    def pairs(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Batch:
        """Sequences start to stop of both halves, as fresh leaves."""
        half = self.x.shape[0] // 2

        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else torch.cat([t[start:stop], t[half + start : half + stop]])

        def leaf(t: Tensor | None, like: Tensor | None) -> Tensor | None:
            if t is None or like is None:
                return None
            return t.detach().to(dtype or t.dtype).requires_grad_(like.requires_grad)

        source = self.x if self.pristine is None else self.pristine
        return replace(
            self,
            x=leaf(cut(source), self.x),
            w=leaf(self.w, self.w),
            y=cut(self.y),
            labels=cut(self.labels),
            ref=cut(self.ref),
            ref_x=cut(self.ref_x),
            words=cut(self.words),
            word_logps=cut(self.word_logps),
            pristine=None if self.pristine is None else cut(self.pristine),
        )


def make_batch(case: Case, device: str, seed: int = 0) -> Batch:
    """Draw the inputs of a case; the same seed gives the same on one machine."""
    g = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    S, T = case.N // case.length, case.length
    if S * T != case.N or S % 2:
        raise ValueError(f"N={case.N} is no even number of sequences of {T} tokens")
    zipf = 1.0 / torch.arange(1, case.V + 1, device=device)
    y = torch.multinomial(zipf, case.N, replacement=True, generator=g)
    w = torch.randn(case.V, case.D, generator=g, device=device)
    w /= w.norm(dim=1, keepdim=True)
    confident = torch.rand(case.N, 1, generator=g, device=device) < 0.5
    noise = torch.randn(case.N, case.D, generator=g, device=device)
    x = (12.0 + 12.0 * confident) * w[y] + SPREAD * noise
    ref_x = x + REFERENCE_NOISE * torch.randn(case.N, case.D, generator=g, device=device)
    x, ref_x, w = (t.to(dtype) for t in (x, ref_x, w))
    labels = y.view(S, T)
    y = labels.clone()
    y[:, : round(case.ignored * T)] = IGNORED

    needs_reference = case.loss not in ("mle", "distillation", "sparse teacher", "brier")
    ref = _log_probs(ref_x, w, labels.flatten()).view(S, T) if needs_reference else None
    trains = case.trained != "nothing"
    if case.path == "logits":
        logits = torch.cat([F.linear(part, w) for part in x.split(_BLOCK)]).view(S, T, case.V)
        leaf = logits.clone().requires_grad_(trains)
        return Batch(leaf, None, y, labels, ref, pristine=logits)
    return Batch(
        x.view(S, T, case.D).requires_grad_(trains),
        w.requires_grad_(case.trained == "head"),
        y,
        labels,
        ref,
        None if case.loss == "mle" else ref_x.view(S, T, case.D),
        *(likeliest(ref_x, w, (S, T, WORDS)) if case.loss == "sparse teacher" else ()),
    )


def _log_probs(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    parts = []
    for rows, label in zip(x.split(_BLOCK), y.split(_BLOCK), strict=True):
        logp = F.linear(rows.float(), w.float()).log_softmax(-1)
        parts.append(logp.gather(-1, label[:, None]).squeeze(-1))
    return torch.cat(parts)


@torch.no_grad()
def likeliest(x: Tensor, w: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Words that a model finds likeliest, and their log-probs, as a dataset would hold them."""
    found = [
        F.linear(rows.float(), w.float()).log_softmax(-1).topk(shape[-1])
        for rows in x.split(_BLOCK)
    ]
    words, logps = (
        torch.cat(parts).view(shape)
        for parts in zip(*((f.indices, f.values) for f in found), strict=True)
    )
    return words, logps


def softmax_error(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return counted rows of x and of the true softmax minus one-hot: operands for bare GEMMs."""
    assert batch.w is not None
    mask = batch.y != IGNORED
    x, y, w = batch.x.detach()[mask], batch.y[mask], batch.w.detach()
    dz = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, x.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        p = F.linear(x[rows], w).float().softmax(-1)
        p.scatter_add_(1, y[rows, None], torch.full_like(p[:, :1], -1.0))
        dz[rows] = p
    return x, dz


def most_pairs(case: Case, limit: float) -> int:
    """Pairs of sequences whose N D V stays within the limit; at least one."""
    size = case.V if case.path == "logits" else case.D * case.V
    return max(1, min(case.N // (2 * case.length), math.floor(limit / (2 * case.length * size))))
