"""Lines of the (LINES, N) tensor of per-row results that every row pass fills, on any backend.

LOSS, DLOGP = d loss / d logp and DLSE = d loss / d lse are those of the token loss (0 without one).
SHIFT and SUM make probabilities, ``exp(z - SHIFT) / SUM``; REST is ``1 - p_y`` without
cancellation.

A row that is read in pieces, one range of columns after another, keeps what it knows so far in the
same lines: SHIFT, the sum without the target in SUM, the sum of E log E in ENTROPY, TOP1, and under
the names below the target's logit, the largest logit and the sum of the logits less SHIFT.
"""

LOSS, LOGP, LSE, ENTROPY, TOP1, DLOGP, DLSE, SHIFT, SUM, REST = range(10)
LINES = 10
SO_FAR_TARGET, SO_FAR_LARGEST, SO_FAR_TOTAL = REST, LOGP, LOSS
