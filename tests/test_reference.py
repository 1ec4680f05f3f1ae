"""The reference per token: torch's own where torch has it, twice differentiable, exact at edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import reference
from fused_losses.token_losses import TOKEN_LOSSES, TokenLoss

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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("ignore_index", [IGNORED, 2])
def test_mle_is_cross_entropy(
    batch: dict[str, Tensor], reduction: Any, label_smoothing: float, ignore_index: int
) -> None:
    target = batch["target"]
    if ignore_index != IGNORED:
        target = torch.where(target == IGNORED, ignore_index, target)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    flat = batch["logits"].reshape(-1, V), target.reshape(-1)
    expected = F.cross_entropy(*flat, reduction=reduction, **options)
    got = reference.mle_loss(batch["logits"], target, reduction=reduction, **options)
    torch.testing.assert_close(got.reshape(expected.shape), expected)
    gradients = [_grad(loss.square().sum(), batch["logits"])[0] for loss in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_the_transform_is_softcap_of_scale_over_temperature_and_z_loss_squares_lse() -> None:
    logits, target = torch.randn(6, V), torch.randint(V, (6,))
    z = 3.0 * torch.tanh(1.3 * logits / 3.0) / 0.8
    got = reference.mle_loss(logits, target, z_loss=0.1, reduction="none", **TRANSFORM)
    expected = F.cross_entropy(z, target, reduction="none") + 0.1 * z.logsumexp(-1) ** 2
    torch.testing.assert_close(got, expected)


def test_statistics_are_those_of_the_distribution(batch: dict[str, Tensor]) -> None:
    logits, target = batch["logits"], batch["target"]
    stats = reference.token_stats(logits, target, entropy=True)
    distribution = torch.distributions.Categorical(logits=logits)
    counted = target != IGNORED
    logps = distribution.log_prob(target.clamp(min=0))
    torch.testing.assert_close(stats.logps, torch.where(counted, logps, 0.0))
    torch.testing.assert_close(stats.lse, torch.where(counted, logits.logsumexp(-1), 0.0))
    torch.testing.assert_close(stats.entropy, torch.where(counted, distribution.entropy(), 0.0))
    assert stats.is_top1.equal(counted & (logits.argmax(-1) == target))
    assert reference.token_stats(logits, target).entropy is None


def test_top1_takes_the_first_maximum_and_impossible_classes_have_no_entropy() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, -math.inf]] * 2, requires_grad=True)
    stats = reference.token_stats(logits, torch.tensor([1, 2]), entropy=True)
    assert stats.is_top1.tolist() == [True, False]
    (gradient,) = _grad(stats.entropy.sum(), logits)
    assert stats.entropy.isfinite().all()
    assert gradient.isfinite().all()


# dft's gradient is none of a function: its weight is not differentiated.
@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "dft"])
def test_token_losses_are_right_to_second_order_with_all_options(name: str) -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    value = (0.1 * torch.randn(3, dtype=torch.float64)).requires_grad_()
    target, weight = torch.tensor([1, IGNORED, 3]), torch.tensor([0.5, 9.0, -2.0])
    ref_logps = torch.tensor([-1.0, math.nan, -2.5], dtype=torch.float64)
    options: dict[str, Any] = {"z_loss": 0.1, "token_weight": weight, "beta": 0.7, **TRANSFORM}
    if name == "mle":
        options["label_smoothing"] = 0.1

    def loss(logits: Tensor, value: Tensor) -> Tensor:
        options["value"] = value
        return reference.token_loss(logits, target, ref_logps, loss=name, **options)

    inputs = [logits, value.detach() if name == "mle" else value]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_statistics_are_right_to_second_order() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, IGNORED, 3])

    def stats(logits: Tensor) -> tuple[Tensor, ...]:
        return reference.token_stats(logits, target, entropy=True, **TRANSFORM)[:3]

    assert torch.autograd.gradcheck(stats, [logits])
    assert torch.autograd.gradgradcheck(stats, [logits], fast_mode=True)


@each_member
def test_ignored_positions_are_never_read_and_get_a_gradient_of_exactly_zero(
    batch: dict[str, Tensor], name: str
) -> None:
    target, ignored = batch["target"], batch["target"] == IGNORED
    spoilt = {
        key: batch[key].detach().masked_fill(ignored[..., None], math.nan).requires_grad_()
        for key in ("logits", "x")
    }
    ref_logps = batch["ref_logps"].masked_fill(ignored, math.nan)
    poison = torch.zeros(B, T).masked_fill(ignored, math.nan)
    options = {"loss": name, "value": poison, "token_weight": poison + 1, "beta": 0.5}
    head = batch["weight"], target, ref_logps
    pairs = [
        (
            reference.token_loss(spoilt["logits"], target, ref_logps, **options),
            reference.token_loss(batch["logits"], target, batch["ref_logps"], loss=name, beta=0.5),
            (spoilt["logits"], batch["logits"]),
        ),
        (
            reference.linear_token_loss(spoilt["x"], *head, linear_bias=batch["bias"], **options),
            reference.linear_token_loss(
                batch["x"], *head, linear_bias=batch["bias"], loss=name, beta=0.5
            ),
            (spoilt["x"], batch["x"]),
        ),
    ]
    for got, expected, (spoilt_input, clean_input) in pairs:
        torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
        (gradient,), (clean,) = _grad(got, spoilt_input), _grad(expected, clean_input)
        assert gradient.equal(clean)
        assert (gradient[ignored] == 0).all()
    loss = reference.linear_token_loss(spoilt["x"], *head, **options)
    assert _grad(loss, batch["weight"])[0].isfinite().all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@each_member
def test_shift_scores_each_label_by_the_position_before_it(
    batch: dict[str, Tensor], name: str, level: Any
) -> None:
    logits, target, ref_logps = batch["logits"], batch["target"], batch["ref_logps"]
    value = 0.1 * torch.randn(B, T) if level == "token" else 0.1
    later = value[:, 1:] if isinstance(value, Tensor) else value
    options: dict[str, Any] = {"loss": name, "level": level, "reduction": "none"}
    got = reference.token_loss(logits, target, ref_logps, value=value, shift=True, **options)
    expected = reference.token_loss(
        logits[:, :-1], target[:, 1:], ref_logps[:, 1:], value=later, **options
    )
    if level == "token":
        assert (got[:, 0] == 0).all()
        got = got[:, 1:]
    torch.testing.assert_close(got, expected)


def test_shifted_statistics_are_a_valid_reference(batch: dict[str, Tensor]) -> None:
    logits, target = batch["logits"], batch["target"]
    ref_logps = reference.token_stats(logits.detach(), target, shift=True).logps
    assert (ref_logps[:, 0] == 0).all()
    losses = reference.pearson_loss(logits, target, ref_logps, shift=True, reduction="none")
    assert (losses == 0).all()


def test_the_mean_counts_labels_not_weights_and_num_items_replaces_the_count() -> None:
    logits, target = torch.randn(5, V, requires_grad=True), torch.tensor([1, 2, IGNORED, 4, 5])
    weight = torch.tensor([0.0, 2.0, 5.0, -1.0, 0.5])
    losses = reference.mle_loss(logits, target, reduction="none")
    assert losses[2] == 0
    total = (weight * losses).sum()
    options = {"token_weight": weight}
    torch.testing.assert_close(reference.mle_loss(logits, target, **options), total / 4)
    for num_items in (7, 7.0, torch.tensor(7)):
        got = reference.mle_loss(logits, target, num_items=num_items, **options)
        torch.testing.assert_close(got, total / 7)
    nothing = reference.mle_loss(logits, target, num_items=0)
    assert nothing.item() == 0.0
    assert (_grad(nothing, logits)[0] == 0).all()


def test_low_precision_is_computed_in_float32_and_gradients_keep_their_dtypes() -> None:
    logits = torch.randn(6, V, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(V, (6,), dtype=torch.int32)
    loss = reference.mle_loss(logits, target)
    assert loss.dtype == torch.float32
    assert loss.equal(F.cross_entropy(logits.float(), target.long()))
    assert _grad(loss, logits)[0].dtype == torch.bfloat16
    x = torch.randn(6, D, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    loss = reference.linear_mle_loss(x, weight, target)
    assert loss.dtype == torch.float64
    assert [g.dtype for g in _grad(loss, x, weight)] == [torch.float16, torch.float64]


def test_a_users_own_member_of_the_family_is_taken() -> None:
    # phi = log(1 + r): f of the reverse KL divergence
    own = TokenLoss("own", None, lambda r: (r.log1p(), 1 / (1 + r)), r0=lambda cap: 1 / cap - 1)
    logits, target = torch.zeros(1, 4), torch.tensor([2])
    ref_logps = torch.tensor([-2 * math.log(4)])
    loss = reference.token_loss(logits, target, ref_logps, loss=own)
    assert loss.item() == pytest.approx(-math.log(1 + math.log(4)))


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"ref_logps": None}, "loss='pearson' needs ref_logps"),
    ({"label_smoothing": 0.1}, "label_smoothing belongs to 'mle'"),
    ({"loss": "chi"}, "mle, pearson, hellinger.*got 'chi'"),
    ({"level": "word"}, "level must be 'token' or 'sequence'"),
    ({"reduction": "max"}, "reduction must be"),
    ({"reduction": "sum", "num_items": 3}, "num_items needs reduction='mean'"),
    ({"num_items": -1}, "num_items must be a number >= 0"),
    ({"num_items": math.nan}, "num_items must be a number >= 0"),
    ({"level": "sequence", "token_weight": torch.ones(B, T)}, "takes no token_weight"),
    ({"level": "sequence", "z_loss": 0.1}, "takes no token_weight, z_loss"),
    ({"segment_ids": torch.zeros(B, T)}, "segment_ids needs level='sequence'"),
    (
        {"level": "sequence", "segment_ids": torch.zeros(B, T), "reduction": "none"},
        "no shape to return with segment_ids",
    ),
    ({"level": "sequence", "segment_ids": torch.zeros(B)}, r"shape \(4, 5\), got \(4,\)"),
    ({"ref_logps": torch.zeros(B)}, r"ref_logps must have shape \(4, 5\), got \(4,\)"),
    ({"ref_logps": torch.zeros(B, T).bfloat16()}, "float32 or float64, got torch.bfloat16"),
    ({"token_weight": torch.ones(T)}, "token_weight must have target's shape"),
    ({"value": torch.ones(3)}, r"value must broadcast to shape \(4, 5\), got \(3,\)"),
    ({"target": torch.zeros(B, dtype=torch.long)}, r"target is \(4,\), logits are \(4, 5, 7\)"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_what_does_not_combine_is_refused(
    batch: dict[str, Tensor], options: dict[str, Any], message: str
) -> None:
    arguments = {key: batch[key] for key in ("logits", "target", "ref_logps")}
    with pytest.raises(ValueError, match=message):
        reference.token_loss(**{**arguments, "loss": "pearson", **options})


@pytest.mark.parametrize("label", [V, -1])
def test_a_label_outside_the_vocabulary_is_named_with_its_position(
    batch: dict[str, Tensor], label: int
) -> None:
    batch["target"][3, 1] = label
    with pytest.raises(IndexError, match=rf"label {label} at position \(3, 1\) .*outside \[0, 7\)"):
        reference.mle_loss(batch["logits"], batch["target"])


def test_a_nan_in_a_counted_row_reaches_its_loss_and_its_gradient_alone() -> None:
    logits = torch.randn(3, V)
    logits[1, 4] = math.nan
    logits.requires_grad_()
    losses = reference.mle_loss(logits, torch.tensor([1, 2, 3]), reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    (gradient,) = _grad(losses.sum(), logits)
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


def test_an_impossible_label_costs_infinitely_much() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0]], requires_grad=True)
    loss = reference.mle_loss(logits, torch.tensor([0]))
    assert loss.item() == math.inf


@each_member
def test_only_lse_sees_a_constant_added_to_a_row_and_nothing_a_permuted_vocabulary(
    batch: dict[str, Tensor], name: str
) -> None:
    logits, target, ref_logps = batch["logits"], batch["target"], batch["ref_logps"]
    loss = reference.token_loss(logits, target, ref_logps, loss=name)
    shifted = logits + 5.0 * torch.randn(B, T, 1)
    torch.testing.assert_close(reference.token_loss(shifted, target, ref_logps, loss=name), loss)
    order = torch.randperm(V)
    permuted = torch.where(target == IGNORED, IGNORED, order.argsort()[target.clamp(min=0)])
    got = reference.token_loss(logits[..., order], permuted, ref_logps, loss=name)
    torch.testing.assert_close(got, loss)
