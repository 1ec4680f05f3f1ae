"""Whether a model keeps sequences apart that lie end to end in one row."""

from __future__ import annotations

from typing import Any

import torch


def check_packing(model: Any, device: torch.device) -> None:
    """Try it out: what one sequence holds must not change the hidden states of the next.

    Any attention that reads position_ids passes (transformers' eager, sdpa and flash kernels, where
    the architecture builds its mask there); recurrent and convolutional layers do not.

    Raises:
        ValueError: The model looks across, or takes no position_ids; with what to do.
    """
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.arange(16, device=device) % vocabulary
    other = (first + 1) % vocabulary
    position_ids = torch.arange(16, device=device).repeat(2)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            seen = [
                model(
                    input_ids=torch.cat([before, first])[None],
                    position_ids=position_ids,
                    use_cache=False,
                    fused=lambda hidden, weight, **options: hidden[0, 16:].clone(),
                ).fused
                for before in (first, other)
            ]
    except TypeError as error:
        raise ValueError(
            f"padding_free=True: {type(model).__name__} does not take position_ids ({error}); "
            "use padding_free=False"
        ) from error
    finally:
        model.train(training)
    # Masked entries have weight 0 exactly; a few roundings are left for other orders of summing.
    allowed = 8 * torch.finfo(seen[0].dtype).eps * seen[0].abs().max()
    if (seen[0] - seen[1]).abs().max() > allowed:
        raise ValueError(
            f"padding_free=True: {type(model).__name__} with attn_implementation="
            f"{model.config._attn_implementation!r} looks from one sequence of a row into "
            "another; use padding_free=False, or load the model with "
            "attn_implementation='sdpa' or 'flash_attention_2' if its architecture supports "
            "position_ids there"
        )
