"""Whether two models rank the states of a text alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fused_losses import linear_token_stats
from fused_losses.integrations import fuse_lm_head
from fused_losses.trainer.sequences import encode_text


class ValueAgreement(NamedTuple):
    """How far two models agree on the order of states.

    Attributes:
        mean: Mean of Kendall's tau over the texts that have one.
        per_text: Kendall's tau-b of each text, in [-1, 1]; NaN where fewer than two states can be
            told apart.
    """

    mean: float
    per_text: tuple[float, ...]


def value_agreement(
    model_a: Any,
    model_b: Any,
    texts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    is_boundary: Callable[[str], bool] = lambda token: "\n" in token,
    workspace_bytes: int | None = None,
) -> ValueAgreement:
    r"""Kendall's rank correlation of two models' state values at the step boundaries of texts.

    The value of a state is the log-normaliser of the next token's logits (13), read after each
    token that ends a step, and at the end of the text. Both models must use one tokenizer. The
    models' heads are fused in place (:func:`fused_losses.integrations.fuse_lm_head`), so no logits
    are made; plain calls of the models are unchanged by that.

    A caveat: (13) gives ``V(s) = beta * lse(s) + C(s)``, and the policy does not identify the shift
    C(s). Comparing states by lse is therefore empirical, as in the paper; a tau near 1 says that
    the two models' normalisers rank the steps alike, not that their true values do. beta cancels.

    Args:
        model_a: A causal LM of transformers, or a PeftModel.
        model_b: Another, with the same vocabulary.
        texts: Texts, or token ids of texts.
        tokenizer: Of both models.
        is_boundary: Whether a decoded token ends a step; by default, whether it holds a line end.
        workspace_bytes: Budget of a chunk's logits.

    Returns:
        The :class:`ValueAgreement`.

    Raises:
        ValueError: No texts, or no text with two steps.
        ImportError: scipy is not installed.

    References:
        Implicit Reward as the Bridge, arXiv 2507.00018 (value dominance).
    """
    from scipy.stats import kendalltau

    per_text = []
    for text in texts:
        ids = encode_text(tokenizer, text, end=False) if isinstance(text, str) else list(text)
        ends = [t for t, token in enumerate(ids) if is_boundary(tokenizer.decode([token]))]
        at = sorted({*ends, len(ids) - 1}) if ids else []
        if len(at) < 2:
            per_text.append(float("nan"))
            continue
        values = [_values(model, ids, at, workspace_bytes) for model in (model_a, model_b)]
        per_text.append(float(kendalltau(*values).statistic))
    known = [tau for tau in per_text if tau == tau]
    if not known:
        raise ValueError(
            f"none of the {len(per_text)} texts has two step boundaries to rank; give longer "
            "texts or another is_boundary"
        )
    return ValueAgreement(sum(known) / len(known), tuple(per_text))


@torch.no_grad()
def _values(model: Any, ids: list[int], at: list[int], workspace_bytes: int | None) -> list[float]:
    fuse_lm_head(model)
    input_ids = torch.tensor([ids], device=model.device)
    # From the end: a learnt prompt puts virtual tokens before the text.
    where = torch.tensor(at, device=model.device) - len(ids)

    def normalisers(hidden: torch.Tensor, weight: torch.Tensor, **head: Any) -> torch.Tensor:
        # Any label will do: the normaliser does not depend on it.
        return linear_token_stats(
            hidden[0, where], weight, input_ids[0, where], workspace_bytes=workspace_bytes, **head
        ).lse

    training = model.training
    model.eval()
    try:
        return model(input_ids=input_ids, use_cache=False, fused=normalisers).fused.tolist()
    finally:
        model.train(training)
