"""``nn.Module`` twins of the functions: they hold the options, and only those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fused_losses import functional as F
from fused_losses.functional.options import keywords_of
from fused_losses.policy import policy_loss
from fused_losses.preference import preference_loss
from fused_losses.stats import TokenStats


class _Options(nn.Module):
    """Calls ``function`` with the options given at construction.

    Tensors of a batch (``ref_logps``, ``token_weight``, ``num_items`` ...) go to ``forward``, as do
    options that change from call to call; those win.
    """

    function: ClassVar[Callable[..., Any]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        allowed = keywords_of(type(self).function)
        for name in options:
            if name not in allowed:
                raise TypeError(
                    f"{type(self).__name__}() got an unexpected option {name!r}; "
                    f"it takes {', '.join(sorted(allowed))}"
                )
        self.options = options

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function on a batch."""
        return type(self).function(*args, **{**self.options, **kwargs})

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _Loss(_Options):
    """A module whose function returns one tensor."""

    __call__: Callable[..., Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch."""
        return super().forward(*args, **kwargs)


class _Statistics(_Options):
    """A module whose function returns statistics of each token."""

    __call__: Callable[..., TokenStats]

    def forward(self, *args: Any, **kwargs: Any) -> TokenStats:
        """Return the statistics of a batch."""
        return super().forward(*args, **kwargs)


class MLELoss(_Loss):
    """Module of :func:`fused_losses.mle_loss`."""

    function = staticmethod(F.mle_loss)


class PearsonLoss(_Loss):
    """Module of :func:`fused_losses.pearson_loss`."""

    function = staticmethod(F.pearson_loss)


class HellingerLoss(_Loss):
    """Module of :func:`fused_losses.hellinger_loss`."""

    function = staticmethod(F.hellinger_loss)


class TokenLossModule(_Loss):
    """Module of :func:`fused_losses.token_loss`."""

    function = staticmethod(F.token_loss)


class DPOLoss(_Loss):
    """Module of :func:`fused_losses.dpo_loss`."""

    function = staticmethod(F.dpo_loss)


class DivergenceLoss(_Loss):
    """Module of :func:`fused_losses.divergence_loss`."""

    function = staticmethod(F.divergence_loss)


class KTOLoss(_Loss):
    """Module of :func:`fused_losses.kto_loss`."""

    function = staticmethod(F.kto_loss)


class TokenStatistics(_Statistics):
    """Module of :func:`fused_losses.token_stats`."""

    function = staticmethod(F.token_stats)


class LinearMLELoss(_Loss):
    """Module of :func:`fused_losses.linear_mle_loss`."""

    function = staticmethod(F.linear_mle_loss)


class LinearPearsonLoss(_Loss):
    """Module of :func:`fused_losses.linear_pearson_loss`."""

    function = staticmethod(F.linear_pearson_loss)


class LinearHellingerLoss(_Loss):
    """Module of :func:`fused_losses.linear_hellinger_loss`."""

    function = staticmethod(F.linear_hellinger_loss)


class LinearTokenLoss(_Loss):
    """Module of :func:`fused_losses.linear_token_loss`."""

    function = staticmethod(F.linear_token_loss)


class LinearDPOLoss(_Loss):
    """Module of :func:`fused_losses.linear_dpo_loss`."""

    function = staticmethod(F.linear_dpo_loss)


class LinearDivergenceLoss(_Loss):
    """Module of :func:`fused_losses.linear_divergence_loss`."""

    function = staticmethod(F.linear_divergence_loss)


class LinearSparseDivergenceLoss(_Loss):
    """Module of :func:`fused_losses.linear_sparse_divergence_loss`."""

    function = staticmethod(F.linear_sparse_divergence_loss)


class LinearKTOLoss(_Loss):
    """Module of :func:`fused_losses.linear_kto_loss`."""

    function = staticmethod(F.linear_kto_loss)


class LinearLoss(_Loss):
    """Module of :func:`fused_losses.linear_loss`."""

    function = staticmethod(F.linear_loss)


class LinearTokenStatistics(_Statistics):
    """Module of :func:`fused_losses.linear_token_stats`."""

    function = staticmethod(F.linear_token_stats)


class LinearPolicyLoss(_Loss):
    """Module of :func:`fused_losses.linear_policy_loss`."""

    function = staticmethod(F.linear_policy_loss)


class PolicyLoss(_Loss):
    """Module of :func:`fused_losses.policy_loss`."""

    function = staticmethod(policy_loss)


class PreferenceLoss(_Options):
    """Module of :func:`fused_losses.preference_loss`."""

    function = staticmethod(preference_loss)
    __call__: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses, chosen rewards and rejected rewards."""
        return super().forward(*args, **kwargs)
