"""A teacher that is known by a few likely words of each position: its checks, and what they mean.

What the K words leave of the teacher's probability is the rest. It is ignored, or the K
probabilities are made to sum to one without it, or it is one more word, the bucket, against which
stands what the student gives to all other words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fused_losses.arguments import check_choice, check_ids
from fused_losses.divergences import Divergence, check_divergence

Rest = Literal["ignore", "renormalise", "bucket"]

_OVER = 1e-2  # by which rounded probabilities may exceed one


@dataclass(frozen=True)
class SparseDivergence:
    """A divergence over a teacher's K words of each position.

    Attributes:
        divergence: Of the words and, if there is one, the bucket.
        rest: What becomes of the rest.
    """

    divergence: Divergence
    rest: Rest

    @staticmethod
    def of(divergence: Any, mixture: Any, rest: Any) -> SparseDivergence:
        """Check the options.

        Raises:
            TypeError: Not a name.
            ValueError: No such name; a divergence that needs all of both distributions, without a
                bucket.
        """
        check_choice("rest", rest, ("ignore", "renormalise", "bucket"))
        if isinstance(divergence, Divergence):
            raise TypeError(
                "divergence must be a name for a sparse teacher, got a Divergence, whose slope is "
                "known up to a multiple of p only; use linear_divergence_loss"
            )
        chosen = check_divergence(divergence, mixture)
        if rest != "bucket" and chosen.name != "forward_kl":
            raise ValueError(
                f"divergence={chosen.name!r} compares whole distributions, and rest={rest!r} "
                "leaves the teacher's other words open: pass rest='bucket', or use 'forward_kl'"
            )
        return SparseDivergence(chosen, rest)

    def losses(self, logp: Tensor, logp_of_ids: Tensor, ids: Tensor, logq: Tensor) -> Tensor:
        """Return the divergence of each row, (R,), differentiable in the student's log-probs.

        Args:
            logp: (R, V) of the student; read for the bucket only.
            logp_of_ids: (R, K) of the student.
            ids: (R, K).
            logq: (R, K) of the teacher, constant.
        """
        if self.rest == "renormalise":
            total = logq.logsumexp(-1, keepdim=True)
            logq = logq - total.clamp(min=torch.finfo(logq.dtype).min)  # of no words: -inf
        elif self.rest == "bucket":
            given = logq > -torch.inf
            # A word with probability 0 belongs to the rest, as those do that are not named.
            count = torch.zeros_like(logp, dtype=torch.int8)
            named = count.scatter_add_(-1, ids, given.to(torch.int8)) != 0
            # Never 0, whose logarithm has no gradient, and which 1 minus a rounded sum may be.
            least = torch.finfo(logp.dtype).tiny
            p_rest = logp.exp().masked_fill(named, 0.0).sum(-1, keepdim=True).clamp(min=least)
            q_rest = (1.0 - logq.exp().sum(-1, keepdim=True)).clamp(min=least)
            # A word without probability has no part of its own: both sides are 0 there.
            logp_of_ids = logp_of_ids.masked_fill(~given, torch.finfo(logp.dtype).min)
            logp_of_ids = torch.cat([logp_of_ids, p_rest.log()], -1)
            logq = torch.cat([logq.clamp(min=torch.finfo(logq.dtype).min), q_rest.log()], -1)
        return self.divergence.torch_fn(logp_of_ids, logq)[0].sum(-1)


def check_sparse_teacher(ids: Any, logps: Any, leading: torch.Size, vocabulary: int) -> None:
    """Raise unless ids and log-probs are of K words at each of the student's positions.

    Raises:
        TypeError: Not a tensor of integers, and one of floats.
        ValueError: Other positions, unequal shapes, no word, or more than there are.
    """
    check_ids("teacher_ids", ids)
    if not isinstance(logps, Tensor) or not logps.is_floating_point():
        got = logps.dtype if isinstance(logps, Tensor) else type(logps).__name__
        raise TypeError(f"teacher_logps must be a floating-point tensor, got {got}")
    if ids.dim() < 1 or ids.shape[:-1] != leading:
        raise ValueError(
            "teacher_ids must be (..., K), one row of K words for each of the student's positions "
            f"{tuple(leading)}, got {tuple(ids.shape)}; run both models on the same tokens, with "
            "the same padding"
        )
    if logps.shape != ids.shape:
        raise ValueError(
            f"teacher_logps must have teacher_ids' shape {tuple(ids.shape)}, a log-prob of each "
            f"word, got {tuple(logps.shape)}"
        )
    K = ids.shape[-1]
    if not 0 < K <= vocabulary:
        raise ValueError(
            f"teacher_ids has K = {K} words of each position, and the vocabulary has {vocabulary}; "
            "pass between 1 and that many"
        )


def check_sparse_numbers(ids: Tensor, logps: Tensor, vocabulary: int) -> None:
    """Raise unless rows (n, K) are words of the vocabulary, each once, with their log-probs.

    Raises:
        IndexError: A word outside the vocabulary.
        ValueError: A word twice; log-probs that are none.
    """
    outside = (ids < 0) | (ids >= vocabulary)
    if outside.any():
        raise IndexError(
            f"teacher_ids holds {int(ids[outside][0])}, outside the student's vocabulary "
            f"[0, {vocabulary}): use a teacher of the same tokenizer; a word that is not there is "
            "any word with teacher_logps -inf"
        )
    given = logps > -torch.inf
    # Words without probability fill up: each is made one of its own.
    own = -1 - torch.arange(ids.shape[-1], device=ids.device)
    words = torch.where(given, ids.long(), own).sort(-1).values
    twice = (words[..., 1:] == words[..., :-1]).any(-1)
    if twice.any():
        raise ValueError(
            f"teacher_ids names a word twice, in {ids[twice][0].tolist()}: its probability would "
            "count twice; give what fills up teacher_logps -inf"
        )
    sums = logps.double().exp().sum(-1)
    wrong = ~(sums <= 1.0 + _OVER)  # NaN is wrong too
    if wrong.any():
        raise ValueError(
            "teacher_logps of a position have probabilities that sum to "
            f"{float(sums[wrong][0]):.6g}, more than 1: pass log-probs over the whole vocabulary, "
            "logits.log_softmax(-1), of its K likeliest words, not logits"
        )
