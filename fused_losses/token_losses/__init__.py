"""The family of token losses: one file per member, each phi and phi' on a device and in torch.

To add a member, write its file and name it in ``TOKEN_LOSSES``; everything else follows.
"""

from fused_losses.token_losses.base import TokenLoss
from fused_losses.token_losses.dft import dft
from fused_losses.token_losses.hellinger import hellinger
from fused_losses.token_losses.jensen_shannon import jensen_shannon
from fused_losses.token_losses.kl import kl
from fused_losses.token_losses.mle import mle
from fused_losses.token_losses.neyman import neyman
from fused_losses.token_losses.pearson import pearson

_MEMBERS = (mle, pearson, hellinger, neyman, jensen_shannon, kl, dft)

TOKEN_LOSSES: dict[str, TokenLoss] = {member.name: member for member in _MEMBERS}

__all__ = ["TOKEN_LOSSES", "TokenLoss"]
