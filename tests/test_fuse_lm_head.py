"""A fused head gives the model's own loss and gradients, on architectures built from configs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_losses

pytest.importorskip("transformers")

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from fused_losses.integrations import fuse_lm_head, unfuse_lm_head

V = 101
BASE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=V,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = BASE | dict(num_key_value_heads=2)
HEADS = GQA | dict(head_dim=8)
GPT = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=V, n_positions=64, bos_token_id=1)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)

# model_type -> (config, the options its head needs; "linear_bias" by name)
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (GQA | dict(tie_word_embeddings=True), {}),
    "mistral": (GQA, {}),
    "qwen3": (HEADS, {}),
    "gemma2": (HEADS | dict(final_logit_softcapping=3.0), {"softcap": 3.0}),
    "gemma3_text": (HEADS | dict(final_logit_softcapping=4.0), {"softcap": 4.0}),
    "recurrent_gemma": (
        GQA
        | dict(lru_width=32, attention_window_size=16, logits_soft_cap=3.0)
        | dict(block_types=["recurrent", "attention"]),
        {"softcap": 3.0},
    ),
    "phi": (BASE, {"linear_bias": True}),
    "gptj": (GPT | dict(rotary_dim=4), {"linear_bias": True}),
    "bert": (BASE | dict(is_decoder=True), {"linear_bias": True}),  # dense and norm before the head
    "gpt2": (GPT, {}),
    "gpt_neox": (BASE, {}),
    "cohere": (GQA | dict(logit_scale=0.3), {"logit_scale": 0.3}),
    "granite": (GQA | dict(logits_scaling=4.0), {"logit_scale": 0.25}),
    "hyperclovax": (GQA | dict(logits_scaling=0.4), {"logit_scale": 0.4}),  # multiplies by it
    "minicpm3": (BASE | LATENT | dict(dim_model_base=8), {}),  # has divided the hidden states
    "falcon_h1": (
        HEADS
        | dict(lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)
        | dict(mamba_d_state=8),
        {"logit_scale": 0.3},
    ),
    "olmo2": (GQA, {}),
    "starcoder2": (GQA, {}),
    "stablelm": (GQA, {}),
    "falcon": (dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=V), {}),
    "mpt": (dict(d_model=32, n_heads=4, n_layers=2, vocab_size=V, max_seq_len=64), {}),
    "bloom": (dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=V), {}),
    "opt": (BASE | dict(ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64), {}),
    "mamba": (dict(hidden_size=32, num_hidden_layers=2, vocab_size=V, state_size=8), {}),
}


def make(model_type: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A tiny random model whose logits are large enough for a scale or a cap to show."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = AutoConfig.for_model(model_type, **ARCHITECTURES[model_type][0] | overrides)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if model_type == "mpt":
        try:
            model(torch.ones(1, 2, dtype=torch.int64))
        except RuntimeError as error:  # 5.0 masks with a number that no float holds
            pytest.skip(f"transformers {transformers.__version__} runs no mpt in {dtype}: {error}")
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(30.0)
        if head.bias is not None:
            head.bias.normal_()
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which some are ignored."""
    ids = torch.randint(3, V, (2, 7))
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, labels


def mle(labels: Tensor) -> Any:
    return lambda hidden, weight, **options: fused_losses.linear_mle_loss(
        hidden, weight, labels, shift=True, **options
    )


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], rel: float) -> None:
    """Every parameter's gradient, in relative norm; the floor serves those that are zero."""
    assert got.keys() == want.keys()
    floor = 1e-6 * sum(float(g.norm()) ** 2 for g in want.values()) ** 0.5
    for name, g in want.items():
        assert float((got[name] - g).norm()) <= rel * (float(g.norm()) + floor), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_fused_loss_and_its_gradients_are_the_models_own(model_type):
    model = make(model_type)
    ids, labels = batch()
    own = model(input_ids=ids, labels=labels).loss
    want = gradients(model, own)
    assert fuse_lm_head(model) is model
    output = model(input_ids=ids, fused=mle(labels))
    assert output.fused is output.loss
    assert output.logits is None
    torch.testing.assert_close(output.loss.double(), own.double(), rtol=1e-6, atol=0.0)
    assert_same_gradients(gradients(model, output.loss), want, rel=1e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_function_gets_what_the_head_gets_and_the_options_it_needs(model_type):
    _, needed = ARCHITECTURES[model_type]
    model = fuse_lm_head(make(model_type))
    ids, labels = batch()

    def look(hidden: Tensor, weight: Tensor, **options: Any) -> tuple[Any, ...]:
        return hidden, weight, options

    hidden, weight, options = model(input_ids=ids, fused=look).fused
    head = model.get_output_embeddings()
    assert hidden.shape == (2, 7, weight.shape[1])
    assert weight is head.weight
    assert options.keys() == needed.keys()
    if "linear_bias" in needed:
        assert options["linear_bias"] is head.bias
    else:
        assert options == pytest.approx(needed)
    for name in needed:  # these options matter: a loss without one is another
        rest = {key: value for key, value in options.items() if key != name}
        loss, other = (mle(labels)(hidden, weight, **o) for o in (options, rest))
        assert abs(float((loss - other).detach())) > 1e-3 * float(loss.detach())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_everything_but_fused_calls_stays_as_it_was(model_type):
    model = make(model_type)
    plain = copy.deepcopy(model)
    fuse_lm_head(model)
    ids, labels = batch()
    model(input_ids=ids, fused=mle(labels))
    for given in (model, plain):
        given.requires_grad_(True)
    ours, theirs = (m(input_ids=ids, labels=labels) for m in (model, plain))
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)
    generated = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*generated)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_model_trains_with_checkpointing_and_dropout_as_it_would_without():
    model = make("gpt2", attn_pdrop=0.1, resid_pdrop=0.1).train()
    model.gradient_checkpointing_enable()
    ids, labels = batch()
    torch.manual_seed(3)
    own = model(input_ids=ids, labels=labels).loss
    want = gradients(model, own)
    fuse_lm_head(model)
    torch.manual_seed(3)
    loss = model(input_ids=ids, fused=mle(labels)).loss
    torch.testing.assert_close(loss.double(), own.double(), rtol=1e-6, atol=0.0)
    assert_same_gradients(gradients(model, loss), want, rel=1e-5)


def test_other_fields_of_the_output_are_as_usual():
    config = AutoConfig.for_model(
        "mixtral", **GQA, num_local_experts=4, output_router_logits=True, output_hidden_states=True
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, labels = batch()
    own = model(input_ids=ids, labels=labels)
    output = fuse_lm_head(model)(input_ids=ids, fused=mle(labels))
    assert isinstance(output, type(own))
    assert set(output.keys()) == {*own.keys(), "fused"} - {"logits"}
    assert torch.equal(output.aux_loss, own.aux_loss)
    assert torch.equal(output.hidden_states[-1], own.hidden_states[-1])
    loss = output.loss + config.router_aux_loss_coef * output.aux_loss
    torch.testing.assert_close(loss, own.loss, rtol=1e-5, atol=0.0)


def test_a_function_may_return_anything():
    model = fuse_lm_head(make("llama"))
    ids, labels = batch()
    output = model(input_ids=ids, fused=lambda h, w, **o: {"shape": w.shape, "options": o})
    assert output.fused == {"shape": (V, 32), "options": {}}
    assert output.loss is None
    loss, stats = model(
        input_ids=ids,
        fused=lambda h, w, **o: fused_losses.with_stats(
            fused_losses.linear_mle_loss, h, w, labels, shift=True, **o
        ),
    ).fused
    assert stats.logps.shape == labels.shape
    mean = -stats.logps.sum() / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(loss, mean)


def test_logits_to_keep_keeps_hidden_states():
    model = fuse_lm_head(make("llama"))
    ids, _ = batch()
    output = model(input_ids=ids, logits_to_keep=2, fused=lambda hidden, weight: hidden)
    assert output.fused.shape == (2, 2, 32)


def test_fusing_twice_is_fusing_once_and_unfusing_restores():
    model = make("llama")
    before = model.forward
    fuse_lm_head(fuse_lm_head(model))
    assert unfuse_lm_head(model) is model
    assert model.forward == before
    assert "forward" not in vars(model)
    assert unfuse_lm_head(model) is model


def test_a_copy_is_fused_with_its_own_weights_and_a_pickled_model_comes_back_plain():
    model = fuse_lm_head(make("llama"))
    ids, labels = batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    assert twin(input_ids=ids, fused=mle(labels)).loss.item() == pytest.approx(
        float(torch.log(torch.tensor(float(V)))), rel=1e-6
    )
    loaded = pickle.loads(pickle.dumps(model))
    plain = loaded(input_ids=ids, labels=labels).loss
    fused = fuse_lm_head(loaded)(input_ids=ids, fused=mle(labels)).loss
    assert float(fused) == pytest.approx(float(plain), rel=1e-6)


def test_a_saved_model_is_the_model(tmp_path):
    model = make("llama", torch.float32)
    fuse_lm_head(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
