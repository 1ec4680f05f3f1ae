"""Lines of the (LINES, N) tensor of per-row results that every row pass fills, on any backend.

LOSS, DLOGP = d loss / d logp and DLSE = d loss / d lse are those of the token loss (0 without one).
SHIFT and SUM make probabilities, ``exp(z - SHIFT) / SUM``; REST is ``1 - p_y`` without
cancellation.
"""

LOSS, LOGP, LSE, ENTROPY, TOP1, DLOGP, DLSE, SHIFT, SUM, REST = range(10)
LINES = 10
