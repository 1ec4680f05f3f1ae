"""fuse_lm_head(model, labels=True): a plain labelled call has the model's loss and no logits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from linear_oracle import NewTensors
from test_fuse_lm_head import (
    GQA,
    V,
    assert_same_gradients,
    batch,
    gradients,
    make,
    mle,
)
from tiny_training import history, llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from fused_losses.integrations import fuse_lm_head, unfuse_lm_head

SHIFTED = torch.arange(14).view(2, 7).masked_fill(torch.eye(2, 7) > 0, -100)


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("llama", {}),
        ("llama", {"num_items_in_batch": 13}),
        ("llama", {"ignore_index": 7}),
        ("llama", {"shift_labels": SHIFTED}),
        ("gemma2", {"num_items_in_batch": torch.tensor(13.0)}),
        ("cohere", {}),
        ("bert", {"num_items_in_batch": 13}),
    ],
)
def test_a_labelled_call_has_the_models_own_loss_and_gradients(model_type, given):
    model = make(model_type)
    ids, labels = batch()
    if "ignore_index" in given:
        labels = labels.masked_fill(labels == -100, 7)
    own = model(input_ids=ids, labels=labels, **given).loss
    want = gradients(model, own)
    output = fuse_lm_head(model, labels=True)(input_ids=ids, labels=labels, **given)
    assert output.logits is None
    torch.testing.assert_close(output.loss.double(), own.double(), rtol=1e-5, atol=0.0)
    assert_same_gradients(gradients(model, output.loss), want, rel=1e-5)


def test_a_router_s_auxiliary_loss_is_added_as_the_model_adds_it():
    config = AutoConfig.for_model("mixtral", **GQA, num_local_experts=4, output_router_logits=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, labels = batch()
    own = model(input_ids=ids, labels=labels)
    output = fuse_lm_head(model, labels=True)(ids, None, None, None, None, labels)
    assert type(output) is type(own)
    assert own.aux_loss > 0
    torch.testing.assert_close(output.loss, own.loss, rtol=1e-5, atol=0.0)


def test_no_storage_of_tokens_by_vocabulary_is_made(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE_BYTES", str(2**18))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **GQA | dict(vocab_size=5000))
    )
    ids = torch.randint(0, 5000, (2, 48))
    logits = 2 * 48 * 5000 * 4

    def largest(**inputs: Any) -> int:
        with NewTensors(*model.parameters()) as seen:
            model(input_ids=ids, **inputs).loss.backward()
        return seen.largest

    assert largest(labels=ids) >= logits
    fuse_lm_head(model, labels=True)
    model(input_ids=ids[:, :4], labels=ids[:, :4])  # verified once, with logits of one position
    weights = 5000 * 32 * 4  # the head's gradient, and nothing larger
    assert largest(labels=ids) <= weights


def test_the_plain_trainer_trains_as_it_does_with_logits(tmp_path):
    ids = torch.randint(0, 90, (8, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[::2, :6] = -100  # micro-batches of unequal weight
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]

    def run(model: Any) -> tuple[Any, float]:
        args = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, logging_steps=1,
            gradient_accumulation_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        return history(trainer, "loss", "grad_norm"), trainer.evaluate()["eval_loss"]

    fused, plain = run(fuse_lm_head(llama(), labels=True)), run(llama())
    assert fused[1] == pytest.approx(plain[1], rel=1e-4)
    for ours, theirs in zip(fused[0], plain[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_calls_without_labels_have_logits_and_a_copy_answers_labels_too():
    model = fuse_lm_head(make("llama"), labels=True)
    ids, labels = batch()
    assert model(input_ids=ids).logits.shape == (2, 7, V)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 9)
    assert copy.deepcopy(model)(input_ids=ids, labels=labels).logits is None
    assert model(input_ids=ids, fused=mle(labels)).loss is not None
    assert unfuse_lm_head(model)(input_ids=ids, labels=labels).logits is not None


def test_a_labelled_call_of_a_fused_model_tells_once_that_it_makes_logits():
    model = fuse_lm_head(make("llama"))
    ids, labels = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids)
        model(input_ids=ids, fused=mle(labels))
    with pytest.warns(UserWarning, match=r"fuse_lm_head\(model, labels=True\)"):
        assert model(input_ids=ids, labels=labels).logits is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, labels=labels)
        assert fuse_lm_head(model, labels=True)(input_ids=ids, labels=labels).logits is None


class OwnLoss(type(llama())):
    """A model that makes its loss of its logits by itself."""

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **kwargs)
        output["loss"] = output.logits.logsumexp(-1).sum()
        return output


class OtherLabels(type(llama())):
    """A model that has its loss of other labels than it was given."""

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, labels=labels.flip(0), **kwargs)


def test_a_model_whose_loss_is_another_is_refused_by_name():
    ids, labels = batch()
    ids, labels = ids.clamp(max=90), labels.clamp(max=90)
    config = llama().config
    with pytest.raises(NotImplementedError, match="OwnLoss did not call its loss function"):
        fuse_lm_head(OwnLoss(config), labels=True)(ids, labels)
    with pytest.raises(NotImplementedError, match="calls its loss function with other labels"):
        fuse_lm_head(OtherLabels(config), labels=True)(ids, labels)

    model = llama()
    model.loss_function = lambda logits, labels, **rest: 2 * ForCausalLMLoss(logits, labels, **rest)
    fuse_lm_head(model, labels=True)
    with pytest.raises(NotImplementedError, match=r"loss function of LlamaForCausalLM is .*lambda"):
        model(input_ids=ids, labels=labels)

    model.loss_function = ForCausalLMLoss  # its own, given by hand, is served and stays
    assert model(input_ids=ids, labels=labels).logits is None
    assert model.loss_function is ForCausalLMLoss
