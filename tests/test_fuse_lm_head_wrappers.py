"""A fused head stays fused, and itself, under what wraps, copies, compiles or calls its model."""

from __future__ import annotations

import inspect
from typing import Any

import accelerate
import pytest
import torch
from test_fuse_lm_head import batch, make, mle
from tiny_training import V, llama
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

import fused_losses
from fused_losses.integrations import fuse_lm_head, unfuse_lm_head
from fused_losses.trainer import value_agreement

peft = pytest.importorskip("peft")

IDS = torch.arange(14).view(2, 7)


@pytest.fixture(autouse=True)
def _clean():
    yield
    torch.compiler.reset()
    accelerate.state.AcceleratorState._reset_state(True)


def with_stats(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """A function that Python alone can run."""
    return fused_losses.with_stats(
        fused_losses.linear_mle_loss, hidden, weight, IDS, shift=True, **options
    )[0]


@pytest.mark.parametrize(
    ("how", "call"),
    [("torch.compile(model)", {"fused": with_stats}), ("model.compile()", {"labels": IDS})],
    ids=["wrapped, fused=", "in place, labels="],
)
def test_a_compiled_model_trains_with_one_graph_of_its_body(how, call):
    model, plain = fuse_lm_head(llama(), labels=True), llama()
    counters.clear()
    if how == "model.compile()":
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    for _ in range(10):  # more than the recompilations that torch allows
        loss = model(input_ids=IDS, **call).loss
    loss.backward()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["stats"]["calls_captured"] > 50


def test_a_plain_call_of_a_fused_model_compiles_into_one_graph():
    model = fuse_lm_head(llama())
    model.config.use_cache = False
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("order", ["fuse, prepare", "prepare, fuse"])
def test_what_accelerate_takes_off_its_wrapper_is_still_fused(order):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = llama()
    if order == "fuse, prepare":
        model = accelerator.prepare(fuse_lm_head(model))
    else:
        fuse_lm_head(accelerator.prepare(model))
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert "fused" not in inspect.signature(model.forward).parameters
    loss = model(input_ids=IDS, fused=with_stats).loss
    assert loss.item() == pytest.approx(llama()(input_ids=IDS, labels=IDS).loss.item(), rel=2e-2)
    assert model(input_ids=IDS).logits.shape == (2, 7, V)
    if order == "fuse, prepare":
        assert loss.item() == pytest.approx(llama()(input_ids=IDS, labels=IDS).loss.item(), 1e-5)
        unfuse_lm_head(model)
        assert model(input_ids=IDS).logits.dtype == torch.float32


def test_a_replica_runs_its_own_layers_and_leaves_its_siblings_heads_alone():
    model = fuse_lm_head(llama(), labels=True)
    replica = model._replicate_for_data_parallel()
    for name, module in model.named_children():  # as torch.nn.parallel.replicate does
        replica._modules[name] = module._replicate_for_data_parallel()
    twice = nn.Parameter(2 * model.lm_head.weight.detach())
    replica.lm_head._parameters = {"weight": twice, "bias": None}
    seen = []

    def meanwhile(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
        seen.append(weight)
        if len(seen) == 1:  # as another thread would
            seen.append(model(input_ids=IDS, fused=with_stats).loss)
        return with_stats(hidden, weight, **options)

    loss = replica(input_ids=IDS, fused=meanwhile).loss
    assert seen[0] is twice
    assert seen[1].item() == pytest.approx(llama()(input_ids=IDS, labels=IDS).loss.item(), 1e-5)
    assert loss.item() != seen[1].item()
    assert replica(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(loss.item(), 1e-6)


def test_the_function_may_call_the_model_plainly_and_with_another_function():
    model = fuse_lm_head(make("llama"))
    ids, labels = batch()
    own = model(input_ids=ids).logits
    seen = []

    def inside(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
        seen.append(model(input_ids=ids).logits)
        seen.append(model(input_ids=ids, fused=mle(labels)).loss)
        return mle(labels)(hidden, weight, **options)

    loss = model(input_ids=ids, fused=inside).loss
    assert torch.equal(seen[0], own)
    assert torch.equal(seen[1], loss)
    assert torch.equal(model(input_ids=ids).logits, own)


class Quantised(Tensor):
    """As quantisation libraries make them: says float32, and computes in its own way."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


@pytest.mark.parametrize("lora", [False, True])
def test_a_head_quantised_as_a_tensor_subclass_is_refused_by_name(lora):
    model = llama().requires_grad_(False)
    inner = model
    if lora:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
        model = peft.get_peft_model(model, config)
        inner = model.base_model.model.lm_head.base_layer
    else:
        inner = model.lm_head
    inner.weight = nn.Parameter(Quantised(inner.weight.detach()), requires_grad=False)
    fuse_lm_head(model, labels=True)
    for call in ({"fused": with_stats}, {"labels": IDS}):
        with pytest.raises(NotImplementedError, match=r"Quantised, a tensor subclass .* quantised"):
            model(input_ids=IDS, **call)


def test_fusing_again_takes_the_options_that_are_given():
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 1.5 * output.logits
            return output

    model = fuse_lm_head(Scaled(llama().config))
    with pytest.raises(NotImplementedError, match="does something else"):
        model(input_ids=IDS, fused=with_stats)
    logits = model(input_ids=IDS).logits
    want = fused_losses.mle_loss(logits, IDS, shift=True)
    fuse_lm_head(model, logit_scale=1.5)
    torch.testing.assert_close(model(input_ids=IDS, fused=with_stats).loss, want)


def test_states_are_ranked_at_their_own_positions_under_a_learnt_prompt():
    from tiny_training import tokenizer

    words, model = tokenizer(), llama()
    ids = words("one\ntwo\nthree")["input_ids"]
    made = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = peft.get_peft_model(model, made)
    with torch.no_grad():
        lse = prompted(input_ids=torch.tensor([ids])).logits[0, 3:].logsumexp(-1)
    at = [t for t, i in enumerate(ids) if i == words.convert_tokens_to_ids("\n")] + [len(ids) - 1]
    from fused_losses.trainer.evaluation import _values

    assert _values(prompted, ids, at, None) == pytest.approx(lse[at].tolist(), rel=1e-5)
    assert value_agreement(prompted, prompted, [ids], words).mean == pytest.approx(1.0)
