# %% [markdown]
# # From F.cross_entropy to DPO, without the logits
#
# A walk through the library on a real model (SmolLM2-135M-Instruct) and real data (HumanEval, pairs
# verified by running their tests). Run it as a script (`python examples/walkthrough.py`, about
# two minutes on two cores), or open it as a notebook: editors and Jupytext read the `# %%` marks.
# The figures go to `outputs/walkthrough`.

# %%
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import smollm
import torch
import torch.nn.functional as F
import training_sets
from batches import Batch, collate, encode, schedule
from memory import peak_bytes
from storage import atomic_file

import fused_losses
from fused_losses.token_losses import TOKEN_LOSSES

STEPS = 8  # of each training; a few say nothing about which loss is better
OUTPUT = Path("outputs/walkthrough")
OUTPUT.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)


def save(figure: Any, name: str) -> None:
    """Write a figure, whole or not at all."""
    with atomic_file(OUTPUT / name) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)
    print(f"figure: {OUTPUT / name}")


# %% [markdown]
# ## 1. What a training step does at its end
#
# The body of the model makes hidden states (B, T, D). Its head, one matrix (V, D), turns each into
# a logit per word, and `F.cross_entropy` turns these into one number per token. `labels` are -100
# where nothing is learnt: on the prompt.

# %%
model, tokenizer = smollm.load()
data = training_sets.load(tokenizer, examples=16, heldout=4)
rows = [encode(tokenizer, row["prompt"], row["completion"]) for row in data.train]
batch = collate(rows[:2])
with torch.no_grad():
    hidden = smollm.hidden_states(model, batch.input_ids, batch.attention_mask)
weight = smollm.head(model).weight.detach()

logits = hidden @ weight.T  # (B, T, V)
eager = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
print(f"logits {tuple(logits.shape)}, {logits.nbytes / 2**20:.0f} MiB, for a loss of {eager:.5f}")

# %% [markdown]
# ## 2. The same number without the logits
#
# `linear_mle_loss` takes hidden states and head. `shift=True` scores each label by the position
# before it, which is what the slices above did.

# %%
fused = fused_losses.linear_mle_loss(hidden, weight, batch.labels, shift=True)
print(f"eager {eager:.6f}, fused {fused:.6f}, difference {abs(eager - fused):.1e}")

plan = fused_losses.explain(
    fused_losses.linear_mle_loss, hidden.requires_grad_(), weight, batch.labels, shift=True
)
print(plan)

# %% [markdown]
# `explain` says what a call will do before it runs: how many tokens count (the prompt's are
# dropped before the first product), how many chunks they take, how many FLOPs and bytes that is.
#
# What it saves grows with the number of tokens. (The fused call's workspace, 32 MiB here, is made
# by the first call and kept on a CPU, so it shows in the first point only.)

# %%
counts = [128, 256, 512, 1024]
head = weight.clone().requires_grad_()
peaks: dict[str, list[float]] = {"eager": [], "fused": []}
for count in counts:
    x = hidden.detach().flatten(0, 1).repeat(-(-count // hidden[..., 0].numel()), 1)[:count]
    x = x.clone().requires_grad_()
    y = torch.randint(weight.shape[0], (count,))
    ways = {
        "eager": lambda x=x, y=y: F.cross_entropy(x @ head.T, y).backward(),
        "fused": lambda x=x, y=y: fused_losses.linear_mle_loss(
            x, head, y, workspace_bytes=32 * 2**20
        ).backward(),
    }
    for name, run in ways.items():
        peaks[name].append(peak_bytes(run, x.device) / 2**20)
        x.grad = head.grad = None
figure, axis = plt.subplots(layout="constrained")
for name, values in peaks.items():
    axis.plot(counts, values, "o-", label=name)
axis.axhline(head.nbytes / 2**20, color="0.7", linestyle=":", label="gradient of the head")
axis.set(xlabel="tokens", ylabel="peak of new memory, MiB", title="Head and loss, with gradients")
axis.legend()
save(figure, "memory.png")

# %% [markdown]
# ## 3. The reward that fine-tuning learns in silence
#
# Every policy has an implicit reward against the model that it started from: beta times the
# log-ratio of the two. DPO is built on it; maximum likelihood has it as well, but in its gradient
# the tie to the start has cancelled. Other members of the family keep it. They differ in one
# function phi of the reward; its derivative is a token's weight in the gradient.

# %%
r = torch.linspace(-0.9, 2.5, 200)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for name in ("mle", "pearson", "hellinger"):
    phi, token_weight = TOKEN_LOSSES[name].phi_and_weight(r, 4.0)
    left.plot(r, phi, label=name)
    right.plot(r, token_weight.expand_as(r), label=name)
left.set(xlabel="implicit reward r", title="phi(r)")
right.set(xlabel="implicit reward r", title="weight of a token, phi'(r)")
right.axhline(0.0, color="0.8", linewidth=0.8)
left.legend()
save(figure, "family.png")

# %% [markdown]
# `pearson` lowers the weight of a token that has been lifted, and pulls it back beyond r = 2.
#
# ## 4. SFT with that tie
#
# The reference's log-probs are data: computed once, by `linear_token_stats`, without gradients. The
# statistics that we watch come from the loss's own pass, by `with_stats`.


# %%
@torch.no_grad()
def with_reference(batch: Batch, start: Any) -> Batch:
    """The batch with the start model's log-probs of its labels."""
    hidden = smollm.hidden_states(start, batch.input_ids, batch.attention_mask)
    stats = fused_losses.linear_token_stats(
        hidden, smollm.head(start).weight, batch.labels, shift=True
    )
    return batch._replace(ref_logps=stats.logps)


start = copy.deepcopy(model).eval().requires_grad_(False)
rewards: dict[str, list[float]] = {}
for name in ("mle", "pearson"):
    policy = copy.deepcopy(start).requires_grad_(True).train()
    optimiser = torch.optim.AdamW(policy.parameters(), lr=2e-5)
    rewards[name] = []
    for at in schedule(len(rows), 2, STEPS, seed=0):
        batch = with_reference(collate([rows[i] for i in at]), start)
        hidden = smollm.hidden_states(policy, batch.input_ids, batch.attention_mask)
        inputs = (hidden, smollm.head(policy).weight, batch.labels)
        if name == "mle":
            loss, stats = fused_losses.with_stats(fused_losses.linear_mle_loss, *inputs, shift=True)
        else:
            loss, stats = fused_losses.with_stats(
                fused_losses.linear_pearson_loss, *inputs, batch.ref_logps, beta=1.0, shift=True
            )
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        gain = (stats.logps - batch.ref_logps)[batch.counted].mean().item()
        rewards[name].append(gain)
        print(f"{name}: loss {loss.item():+.4f}, implicit reward {gain:+.4f}")

# %% [markdown]
# The Pearson loss starts at 0, where policy and reference agree, and turns negative: compare runs
# by the likelihood, not by the loss.
#
# ## 5. DPO from there
#
# Rows are [chosen; rejected]. The reference is now the SFT model, so the first loss is log 2. One
# number per pair weighs all its tokens; the engine keeps a pair's logits together, and needs no
# more matrix products than for cross-entropy.

# %%
reference = copy.deepcopy(policy).eval().requires_grad_(False)
pairs = [
    [encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
    for row in data.train_pairs
]
optimiser = torch.optim.AdamW(policy.parameters(), lr=5e-6)
losses, margins = [], []
for at in schedule(len(pairs), 1, STEPS, seed=0):
    sides = [[pairs[i][side] for i in at] for side in (0, 1)]
    batch = with_reference(collate(sides[0] + sides[1]), reference)
    hidden = smollm.hidden_states(policy, batch.input_ids, batch.attention_mask)
    loss, stats = fused_losses.with_stats(
        fused_losses.linear_dpo_loss,
        hidden,
        smollm.head(policy).weight,
        batch.labels,
        batch.ref_logps,
        beta=0.1,
        shift=True,
    )
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    losses.append(loss.item())
    margins.append((stats.chosen_rewards - stats.rejected_rewards).mean().item())
    print(f"dpo: loss {losses[-1]:.4f}, margin {margins[-1]:+.4f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for name, values in rewards.items():
    left.plot(range(1, STEPS + 1), values, label=name)
left.set(title="SFT: implicit reward of the batch (beta 1)", xlabel="step")
left.legend()
right.plot(range(1, STEPS + 1), losses, label="loss")
right.plot(range(1, STEPS + 1), margins, label="margin")
right.set(title="DPO", xlabel="step")
right.legend()
save(figure, "training.png")

# %% [markdown]
# ## Where to go from here
#
# In a training script nothing of this loop is yours to write: `fuse_lm_head(model)` lets any causal
# LM of transformers hand its hidden states to such a loss, and `fused_losses.trainer` and
# `fused_losses.integrations.trl` have the trainers. The site (`make docs`) has the rest.
