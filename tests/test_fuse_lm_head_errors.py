"""What fuse_lm_head does not serve, it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

import fused_losses

pytest.importorskip("transformers")

from accelerate.utils import convert_outputs_to_fp32
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
)

from fused_losses.integrations import fuse_lm_head, unfuse_lm_head

CONFIG: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=31,
    pad_token_id=0,
)
IDS = torch.arange(10).view(2, 5)


def make(**overrides: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **CONFIG | overrides))


def mle(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return fused_losses.linear_mle_loss(hidden, weight, IDS, shift=True, **options)


def call(model: Any, **inputs: Any) -> Any:
    return model(input_ids=IDS, fused=mle, **inputs)


class Scaled(LlamaForCausalLM):
    """A model that scales its logits as no config says, after a cap."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output


class Masked(LlamaForCausalLM):
    """A model whose last logits are padding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., -3:] = -1e4
        return output


class Twice(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        self.lm_head(torch.zeros(1, 1, 16))
        return output


class Never(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.model(input_ids)


def test_what_is_not_a_model_of_transformers_is_refused():
    for other in (nn.Linear(2, 2), "name", torch.nn.Sequential(make())):
        with pytest.raises(TypeError, match="fuse the model before wrapping it"):
            fuse_lm_head(other)


def test_an_encoder_decoder_and_a_model_without_head_are_refused():
    t5 = AutoConfig.for_model(
        "t5", d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=31
    )
    with pytest.raises(NotImplementedError, match="T5ForConditionalGeneration is an encoder-dec"):
        fuse_lm_head(AutoModelForSeq2SeqLM.from_config(t5))
    with pytest.raises(NotImplementedError, match="LlamaModel has no head"):
        fuse_lm_head(AutoModel.from_config(AutoConfig.for_model("llama", **CONFIG)))


@pytest.mark.parametrize("name", ["labels", "shift_labels", "num_items_in_batch"])
def test_labels_beside_the_function_are_refused_and_told_where_to_go(name):
    model = fuse_lm_head(make())
    with pytest.raises(ValueError, match=rf"^{name} is not taken.*linear_mle_loss"):
        call(model, **{name: IDS})


def test_labels_by_position_are_seen():
    model = fuse_lm_head(make())
    with pytest.raises(ValueError, match=r"^labels"):
        model(IDS, None, None, None, None, IDS, fused=mle)
    call(model, labels=None)


def test_a_function_that_is_none_of_the_kind_is_refused():
    with pytest.raises(TypeError, match=r"fused must be a function .* got bool"):
        fuse_lm_head(make())(input_ids=IDS, fused=True)


def test_an_error_of_the_function_comes_out_as_it_is_and_leaves_the_model_whole():
    model = fuse_lm_head(make())
    with pytest.raises(IndexError, match="label 31"):
        model(
            input_ids=IDS,
            fused=lambda h, w, **o: fused_losses.linear_mle_loss(h, w, IDS + 31, **o),
        )
    assert model(input_ids=IDS).logits.shape == (2, 5, 31)


def test_what_the_model_does_to_its_logits_is_found_out():
    config = AutoConfig.for_model("llama", **CONFIG)
    with pytest.raises(NotImplementedError, match="Scaled does something else between head and"):
        call(fuse_lm_head(Scaled(config)))
    with pytest.raises(NotImplementedError, match="a head output of 110 becomes a logit of -10000"):
        call(fuse_lm_head(Masked(config)))
    # A scale that the config does not hold can be told.
    model = Scaled(config)
    labels = dict(input_ids=IDS, labels=IDS)
    logits = model(**labels).logits
    want = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(call(fuse_lm_head(model, logit_scale=1.5)).loss, want)


def test_a_config_that_says_more_than_the_model_does_is_found_out():
    config = AutoConfig.for_model("llama", **CONFIG)
    config.final_logit_softcapping = 20.0
    model = fuse_lm_head(LlamaForCausalLM(config))
    with pytest.raises(NotImplementedError, match=r"than \{'logit_scale': None, 'softcap': 20.0\}"):
        call(model)


@pytest.mark.parametrize(("option", "exact"), [("logit_scale", 1.5), ("softcap", 20.0)])
def test_a_scale_or_cap_that_is_slightly_off_is_found_out(option, exact):
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 20.0 * torch.tanh(output.logits / 20.0)
            return output

    made = Scaled if option == "logit_scale" else Capped
    for off in (0.99, 0.999, 1.001, 1.01):
        model = made(AutoConfig.for_model("llama", **CONFIG))
        with pytest.raises(NotImplementedError, match="does something else between head and"):
            call(fuse_lm_head(model, **{option: off * exact}))
    call(fuse_lm_head(made(AutoConfig.for_model("llama", **CONFIG)), **{option: exact}))


def test_a_head_that_is_called_never_or_twice_is_refused():
    config = AutoConfig.for_model("llama", **CONFIG)
    with pytest.raises(NotImplementedError, match="Twice calls its head twice"):
        call(fuse_lm_head(Twice(config)))
    with pytest.raises(NotImplementedError, match="Never did not call its Linear head"):
        call(fuse_lm_head(Never(config)))


def test_a_head_of_another_kind_is_refused():
    class LowRank(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = fuse_lm_head(make())
    model.set_output_embeddings(LowRank(16, 31, bias=False))
    with pytest.raises(NotImplementedError, match="the head is a LowRank, whose forward"):
        call(model)
    model.set_output_embeddings(nn.Linear(16, 31, bias=False))
    call(model)


def test_a_quantised_head_is_refused():
    model = fuse_lm_head(make())
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.zeros(31, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"weight is torch\.uint8: a quantised head"):
        call(model)


def test_hooks_on_the_head_run_or_are_refused():
    model = fuse_lm_head(make())
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(NotImplementedError, match=r"forward hooks .*lambda"):
        call(model)
    handle.remove()
    plain = call(model).loss
    head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    torch.testing.assert_close(
        model(input_ids=IDS, labels=IDS).loss, call(model).loss, rtol=1e-5, atol=0.0
    )
    assert call(model).loss.item() != plain.item()


def test_tuples_are_refused():
    with pytest.raises(TypeError, match="return_dict=True"):
        call(fuse_lm_head(make()), return_dict=False)


def test_a_forward_wrapped_since_cannot_be_taken_back():
    model = fuse_lm_head(make())
    inner = model.forward
    model.forward = convert_outputs_to_fp32(model.forward)
    loss = call(fuse_lm_head(model)).loss
    torch.testing.assert_close(loss, model(input_ids=IDS, labels=IDS).loss)
    with pytest.raises(RuntimeError, match="wrapped after fuse_lm_head"):
        unfuse_lm_head(model)
    model.forward = inner
    unfuse_lm_head(model)
    assert "forward" not in vars(model)


def test_a_head_that_deepspeed_has_sharded_is_refused_with_the_cure():
    model = fuse_lm_head(make())
    model.lm_head.weight.ds_id = 0
    with pytest.raises(NotImplementedError, match=r"ZeRO-3.*fully_shard.*ZeRO-2"):
        call(model)


def test_a_part_of_a_head_that_older_transformers_gathers_behind_it_is_refused_with_the_cure():
    def gather(module: Any, inputs: Any, logits: Tensor) -> Tensor:
        return logits

    gather.__module__ = "transformers.integrations.tensor_parallel"
    gather.__qualname__ = "distribute_module.<locals>.<lambda>"
    model = fuse_lm_head(make())
    model.lm_head.register_forward_hook(gather)
    with pytest.raises(NotImplementedError, match="upgrade transformers"):
        call(model)


def test_low_rank_factors_beside_a_shared_head_are_refused(tmp_path: Path):
    peft = pytest.importorskip("peft")
    if dist.is_initialized():
        pytest.skip("needs a process group of its own")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
        model = fuse_lm_head(peft.get_peft_model(make(), config))
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        head = model.base_model.model.lm_head.base_layer
        head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(NotImplementedError, match="LoRA on a head that ranks share"):
            call(model)
    finally:
        dist.destroy_process_group()
