"""The reference on sequences, pairs, linear heads and losses of one's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pair_cases import CASES, takes_reference
from torch import Tensor

from fused_losses import reference
from fused_losses.preference import PAIR_LOSSES
from fused_losses.stats import TokenStats
from fused_losses.token_losses import TOKEN_LOSSES

B, T, V, D = 4, 5, 7, 3
IGNORED = -100
TRANSFORM = {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.8}
MEMBERS = list(TOKEN_LOSSES)
each_member = pytest.mark.parametrize("name", MEMBERS)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """A (B, T) batch with ignored labels, one row all ignored, and a head that makes its logits."""
    x = torch.randn(B, T, D, dtype=torch.float64)
    weight = torch.randn(V, D, dtype=torch.float64)
    bias = torch.randn(V, dtype=torch.float64)
    target = torch.randint(V, (B, T))
    target[0, 1] = target[3, 4] = target[2, :3] = IGNORED
    target[1] = IGNORED
    logits = x @ weight.T + bias
    ref_logps = reference.token_stats(logits, target).logps + 0.4 * torch.randn_like(logits[..., 0])
    return {
        "x": x.requires_grad_(),
        "weight": weight.requires_grad_(),
        "bias": bias.requires_grad_(),
        "logits": logits.requires_grad_(),
        "target": target,
        "ref_logps": ref_logps,
    }


def _grad(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


# dft's gradient is none of a function: its weight is not differentiated.
@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "dft"])
def test_sequence_losses_are_right_to_second_order(name: str) -> None:
    logits = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1, 3], [IGNORED, IGNORED], [2, 0]])
    ref_logps = torch.full((3, 2), -1.4, dtype=torch.float64)
    options: dict[str, Any] = {"loss": name, "beta": 0.3, "level": "sequence"}

    def loss(logits: Tensor) -> Tensor:
        return reference.token_loss(logits, target, ref_logps, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, [logits])
    assert torch.autograd.gradgradcheck(loss, [logits], fast_mode=True)


@pytest.mark.parametrize("case", PAIR_LOSSES)
def test_dpo_is_right_to_second_order(case: str) -> None:
    x = torch.randn(4, 2, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1, 3], [IGNORED, 2], [2, 0], [1, IGNORED]])
    options = CASES[case]
    ref_logps = -torch.linspace(1.0, 2.4, 8, dtype=torch.float64).view(4, 2)
    ref = ref_logps if takes_reference(options["loss_type"]) else None

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return reference.linear_dpo_loss(x, weight, target, ref, sft_weight=0.3, **options)

    assert torch.autograd.gradcheck(loss, [x, weight], fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, [x, weight], fast_mode=True)


@each_member
def test_a_sequence_is_scored_by_the_sum_of_its_log_ratios(
    batch: dict[str, Tensor], name: str
) -> None:
    target, ref_logps = batch["target"], batch["ref_logps"]
    value = torch.randn(B, dtype=torch.float64) * 0.1
    options: dict[str, Any] = {"loss": name, "beta": 0.3, "level": "sequence", "value": value}
    losses = reference.token_loss(batch["logits"], target, ref_logps, reduction="none", **options)
    logps = reference.token_stats(batch["logits"], target).logps
    for b in range(B):
        counted = target[b] != IGNORED
        member = TOKEN_LOSSES[name]
        if member.uses_reference:
            ratio = (logps[b] - ref_logps[b])[counted].sum()
            expected = (value[b] - member.phi_and_weight(0.3 * ratio + value[b], 4.0)[0]) / 0.3
        else:
            ratio = logps[b][counted].sum()
            expected = -ratio * (ratio.exp() if name == "dft" else 1.0)
        torch.testing.assert_close(losses[b], expected if counted.any() else ratio * 0)
    mean = reference.token_loss(batch["logits"], target, ref_logps, **options)
    torch.testing.assert_close(mean, losses.sum() / 3)  # row 1 has no counted token
    by_items = reference.token_loss(batch["logits"], target, ref_logps, num_items=8, **options)
    torch.testing.assert_close(by_items, losses.sum() / 8)


@pytest.mark.parametrize("value", [0.3, "per sequence"])
def test_packed_segments_score_as_the_rows_they_were_packed_from(
    batch: dict[str, Tensor], value: Any
) -> None:
    if value == "per sequence":
        value = 0.1 * torch.randn(B, dtype=torch.float64)
    # Ids are local to a row, in any order of appearance: 0 and 7 occur in both rows.
    ids = torch.tensor([0, 7]).repeat_interleave(T).repeat(2, 1)
    packed = [
        batch[key].reshape(2, 2 * T, *batch[key].shape[2:])
        for key in ("logits", "target", "ref_logps")
    ]
    options: dict[str, Any] = {"beta": 0.3, "level": "sequence", "value": value}
    for reduction in ("mean", "sum"):
        options["reduction"] = reduction
        rows = batch["logits"], batch["target"], batch["ref_logps"]
        torch.testing.assert_close(
            reference.hellinger_loss(*packed, segment_ids=ids, **options),
            reference.hellinger_loss(*rows, **options),
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (4, 0)])
def test_nothing_counted_gives_zero_attached_to_the_graph(
    shape: tuple[int, int], reduction: Any
) -> None:
    x = torch.full((*shape, D), math.nan, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    target, ref_logps = torch.full(shape, IGNORED), torch.full(shape, math.nan)
    calls = {
        "mle": lambda: reference.linear_mle_loss(x, weight, target, reduction=reduction),
        "sequence": lambda: reference.linear_hellinger_loss(
            x, weight, target, ref_logps, level="sequence", reduction=reduction
        ),
        "dpo": lambda: reference.linear_dpo_loss(x, weight, target, ref_logps, reduction=reduction),
        "own": lambda: reference.linear_loss(x, weight, target, lambda stats, rows: 1 / 0),
    }
    for name, call in calls.items():
        if name == "dpo" and shape[0]:
            with pytest.warns(UserWarning, match="no counted token"):
                loss = call()
        else:
            loss = call()
        assert (loss == 0).all()
        for gradient in _grad(loss.sum(), x, weight):
            assert (gradient == 0).all()


@pytest.mark.filterwarnings("ignore:a response has no counted token")
@pytest.mark.parametrize("form", ["token_loss", "pearson_loss", "hellinger_loss", "dpo_loss"])
@pytest.mark.parametrize("shift", [False, True])
def test_linear_forms_are_the_logits_forms_of_the_product(
    batch: dict[str, Tensor], form: str, shift: bool
) -> None:
    inputs = batch["x"], batch["weight"], batch["bias"]
    head = (*inputs[:2], batch["target"])
    ref_logps, options = batch["ref_logps"], {"shift": shift, "beta": 0.4, **TRANSFORM}
    got = getattr(reference, f"linear_{form}")(
        *head, ref_logps, linear_bias=batch["bias"], workspace_bytes=1, **options
    )
    logits = F.linear(*inputs)
    expected = getattr(reference, form)(logits, batch["target"], ref_logps, inplace=True, **options)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(_grad(got, *inputs), _grad(expected, *inputs))
    stats = reference.linear_token_stats(*head, linear_bias=batch["bias"], entropy=True)
    torch.testing.assert_close(stats, reference.token_stats(logits, batch["target"], entropy=True))


class TestLinearLoss:
    """The loss of one's own, called once with all counted tokens."""

    def test_tokens_come_by_unit_and_then_by_position(self, batch: dict[str, Tensor]) -> None:
        seen: list[tuple[TokenStats, Tensor]] = []
        units = torch.tensor([[3], [0], [1], [0]]).expand(B, T)

        def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
            seen.append((stats, rows))
            return stats.logps.sum()

        head = batch["x"], batch["weight"], batch["target"]
        reference.linear_loss(*head, loss_fn, units=units, entropy=True)
        ((stats, rows),) = seen
        # Row 1 has no counted token; labels 0, 1; 2, :3 and 3, 4 are ignored.
        assert rows.tolist() == [15, 16, 17, 18, 13, 14, 0, 2, 3, 4]
        everything = reference.linear_token_stats(*head, entropy=True)
        for x, y in zip(stats, everything, strict=True):
            torch.testing.assert_close(x, y.flatten()[rows])
        reference.linear_loss(*head, loss_fn)
        assert seen[1][1].tolist() == sorted(rows.tolist())

    def test_it_expresses_the_losses_of_the_library(self, batch: dict[str, Tensor]) -> None:
        inputs = batch["x"], batch["weight"], batch["bias"]
        ref_logps, head = batch["ref_logps"], (*inputs[:2], batch["target"])

        def pearson(stats: TokenStats, rows: Tensor) -> Tensor:
            ratio = stats.logps - ref_logps.flatten()[rows]
            return (-ratio + 0.3 * ratio**2 / 4).sum()

        got = reference.linear_loss(*head, pearson, linear_bias=batch["bias"])
        expected = reference.linear_pearson_loss(
            *head, ref_logps, linear_bias=batch["bias"], beta=0.3, reduction="sum"
        )
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(_grad(got, *inputs), _grad(expected, *inputs))

    @pytest.mark.parametrize(("result", "got"), [(torch.zeros(2), r"\(2,\)"), (0.0, "float")])
    def test_a_result_that_is_no_scalar_tensor_is_refused(
        self, batch: dict[str, Tensor], result: Any, got: str
    ) -> None:
        head = batch["x"], batch["weight"], batch["target"]
        with pytest.raises(ValueError, match=f"0-d tensor, got .*{got}"):
            reference.linear_loss(*head, lambda stats, rows: result)


class TestPairs:
    """DPO on rows [chosen; rejected]."""

    def test_references_per_token_per_response_and_absent_agree(
        self, batch: dict[str, Tensor]
    ) -> None:
        logits, ref_logps = batch["logits"], batch["ref_logps"]
        target = batch["target"].clamp(min=0)
        sums = ref_logps.sum(-1)
        loss = reference.dpo_loss(logits, target, ref_logps)
        torch.testing.assert_close(reference.dpo_loss(logits, target, sums), loss)
        logps = reference.token_stats(logits, target).logps.sum(-1)
        expected, *_ = reference.preference_loss(logps[:2], logps[2:], sums[:2], sums[2:])
        torch.testing.assert_close(loss, expected.mean())
        free, *_ = reference.preference_loss(logps[:2], logps[2:])
        got = reference.dpo_loss(logits, target, None, reduction="none")
        torch.testing.assert_close(got, free)
        got = reference.dpo_loss(logits, target, None, num_items=5)
        torch.testing.assert_close(got, free.sum() / 5)

    def test_an_empty_response_has_ratio_zero_and_a_warning(self, batch: dict[str, Tensor]) -> None:
        logits, target = batch["logits"], batch["target"]  # row 1, chosen of pair 1, is empty
        sums = batch["ref_logps"].masked_fill(target == IGNORED, 0).sum(-1)
        sums[1] = math.nan
        with pytest.warns(UserWarning, match="no counted token"):
            losses = reference.dpo_loss(logits, target, sums, reduction="none")
        rejected = reference.token_stats(logits, target).logps[3].sum() - sums[3]
        torch.testing.assert_close(losses[1], -F.logsigmoid(-0.1 * rejected))

    @pytest.mark.filterwarnings("ignore:a response has no counted token")
    def test_a_pair_without_counted_tokens_does_not_count(self, batch: dict[str, Tensor]) -> None:
        logits, target = batch["logits"], batch["target"].clone()
        target[3] = IGNORED  # pair 1 is now empty on both sides
        losses = reference.dpo_loss(logits, target, batch["ref_logps"], reduction="none")
        assert losses[1] == 0
        mean = reference.dpo_loss(logits, target, batch["ref_logps"])
        torch.testing.assert_close(mean, losses[0])

    @pytest.mark.parametrize("option", [{"token_weight": torch.ones(B, T)}, {"z_loss": 0.1}])
    def test_options_of_single_tokens_are_refused(
        self, batch: dict[str, Tensor], option: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match="takes no token_weight or z_loss"):
            reference.dpo_loss(batch["logits"], batch["target"], batch["ref_logps"], **option)

    @pytest.mark.parametrize("shape", [(3, 2), (4,)])
    def test_rows_that_form_no_pairs_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="chosen rows, then as many rejected"):
            reference.dpo_loss(torch.zeros(*shape, V), torch.zeros(shape, dtype=torch.long), None)


def test_sequences_of_a_flat_target_need_segments() -> None:
    with pytest.raises(ValueError, match="needs segment_ids"):
        reference.token_loss(torch.zeros(3, V), torch.zeros(3, dtype=torch.long), level="sequence")


def test_a_head_that_does_not_fit_is_named(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"linear_weight must be .*D = 3"):
        reference.linear_mle_loss(batch["x"], batch["weight"].T, batch["target"])
    with pytest.raises(ValueError, match="input must be target's shape"):
        reference.linear_mle_loss(batch["x"][:2], batch["weight"], batch["target"])


def test_no_gradient_flows_to_references(batch: dict[str, Tensor]) -> None:
    logits, target = batch["logits"], batch["target"].clamp(min=0)
    ref_logps = batch["ref_logps"].requires_grad_()
    sums = ref_logps.detach().sum(-1).requires_grad_()
    total = (
        reference.hellinger_loss(logits, target, ref_logps)
        + reference.hellinger_loss(logits, target, ref_logps, level="sequence")
        + reference.dpo_loss(logits, target, ref_logps)
        + reference.dpo_loss(logits, target, sums)
    )
    total.backward()
    assert logits.grad.count_nonzero() > 0
    assert ref_logps.grad is sums.grad is None
