"""Fused heads under PEFT: adapters on the body, on the head, a trained copy of the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_losses

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from transformers import AutoConfig, AutoModelForCausalLM

from fused_losses.integrations import fuse_lm_head, unfuse_lm_head

V = 61
IDS = torch.randint(0, V, (2, 7), generator=torch.Generator().manual_seed(1))
LABELS = torch.where(torch.arange(7) < 2, -100, IDS)


def make(model_type: str = "llama", **overrides: Any) -> Any:
    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=V,
        **overrides,
    )
    return AutoModelForCausalLM.from_config(config).double()


def with_adapter(model: Any, targets: list[str], adapter: str = "default", **options: Any) -> Any:
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", **options
    )
    if isinstance(model, peft.PeftModel):
        model.add_adapter(adapter, config)
        model.base_model.set_adapter([*model.active_adapters, adapter])
    else:
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model


def mle(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return fused_losses.linear_mle_loss(hidden, weight, LABELS, shift=True, **options)


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=IDS, **inputs).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_as_unfused(model: Any) -> None:
    want_loss, want = loss_and_gradients(model, labels=LABELS)
    loss, got = loss_and_gradients(model, fused=mle)
    torch.testing.assert_close(loss.double(), want_loss.double(), rtol=1e-6, atol=0.0)
    assert got.keys() == want.keys()
    for name, g in want.items():
        torch.testing.assert_close(got[name], g, rtol=1e-5, atol=1e-6 * float(g.norm()))


@pytest.mark.parametrize("first", ["fuse", "adapt"])
def test_adapters_on_the_body_train_as_unfused(first):
    model = make()
    if first == "fuse":
        model = with_adapter(fuse_lm_head(model), ["q_proj", "down_proj"])
    else:
        model = fuse_lm_head(with_adapter(model, ["q_proj", "down_proj"]))
    assert_as_unfused(model)
    unfuse_lm_head(model)
    assert "forward" not in vars(model.get_base_model())


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_head_trains_as_unfused(tied):
    model = make("granite", logits_scaling=0.5, tie_word_embeddings=tied)
    model = fuse_lm_head(with_adapter(model, ["lm_head", "v_proj"], use_rslora=True))
    assert_as_unfused(model)


def test_adapters_that_are_switched_off_merged_or_several_are_as_unfused():
    model = with_adapter(
        make("cohere", logit_scale=2.0, tie_word_embeddings=False), ["lm_head", "o_proj"]
    )
    fuse_lm_head(model)
    with model.disable_adapter():
        off = model(input_ids=IDS, fused=mle).loss
        torch.testing.assert_close(off, model(input_ids=IDS, labels=LABELS).loss.to(off.dtype))
    on = model(input_ids=IDS, fused=mle).loss
    assert abs(float((on - off).detach())) > 1e-3
    model = with_adapter(model, ["lm_head"], "second")
    assert len(model.active_adapters) == 2
    assert_as_unfused(model)
    model.merge_adapter()
    merged = model(input_ids=IDS, fused=mle).loss
    want = model(input_ids=IDS, labels=LABELS).loss
    torch.testing.assert_close(merged.float(), want.float())
    with model.disable_adapter():  # unmerges
        again = model(input_ids=IDS, fused=mle).loss
    torch.testing.assert_close(again, off)


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
def test_a_trained_copy_of_the_head_trains_as_unfused(targets):
    model = fuse_lm_head(with_adapter(make(), targets, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.1)
    assert_as_unfused(model)
    on = model(input_ids=IDS, fused=mle).loss
    with model.disable_adapter():
        off = model(input_ids=IDS, fused=mle).loss
        torch.testing.assert_close(off, model(input_ids=IDS, labels=LABELS).loss.to(off.dtype))
    assert abs(float((on - off).detach())) > 1e-6


def test_adapters_that_are_not_a_product_are_refused_by_name():
    model = fuse_lm_head(with_adapter(make(), ["lm_head"], lora_dropout=0.1))
    with pytest.raises(NotImplementedError, match=r"lora_dropout=0\.1 on the head would be left"):
        model(input_ids=IDS, fused=mle)
    model.eval()  # no dropout here
    assert_as_unfused(model)
    model = fuse_lm_head(with_adapter(make(), ["lm_head"], use_dora=True))
    with pytest.raises(NotImplementedError, match=r"variant Dora.* on the head"):
        model(input_ids=IDS, fused=mle)
    model = fuse_lm_head(with_adapter(make(), ["lm_head"], lora_bias=True))
    with pytest.raises(NotImplementedError, match="lora_bias"):
        model(input_ids=IDS, fused=mle)
    ia3 = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    model = fuse_lm_head(peft.get_peft_model(make(), ia3))
    with pytest.raises(NotImplementedError, match="the head is a Linear, whose forward is not"):
        model(input_ids=IDS, fused=mle)


def test_a_prompt_that_is_learnt_lengthens_the_hidden_states():
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = fuse_lm_head(peft.get_peft_model(make(), config))
    hidden = model(input_ids=IDS, fused=lambda hidden, weight: hidden).fused
    assert hidden.shape == (2, 3 + 7, 32)
    with pytest.raises(ValueError, match="target must have input's leading shape"):
        model(input_ids=IDS, fused=mle)
