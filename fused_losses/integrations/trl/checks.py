"""What TRL's trainers cannot do on this engine: refused by name, before anything is prepared."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from datasets import IterableDataset

import fused_losses
from fused_losses.integrations.cut_sequences import refuse_cut_sequences
from fused_losses.integrations.trl.references import COLUMN

# Initialisations of LoRA that take the adapter's product out of the base weights.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def arguments_of(trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor by name; a ``ValueError`` if they cut sequences."""
    given = inspect.signature(trainer).bind(*args, **kwargs).arguments
    refuse_cut_sequences(given.get("args"))
    return given


def token_loss_of(loss: str | fused_losses.TokenLoss) -> fused_losses.TokenLoss:
    """Return a member of the family, by its name or itself.

    Raises:
        ValueError: No member has this name.
    """
    if not isinstance(loss, str):
        return loss
    if loss not in fused_losses.TOKEN_LOSSES:
        choices = ", ".join(map(repr, fused_losses.TOKEN_LOSSES))
        raise ValueError(f"loss must be one of {choices} or a TokenLoss, got {loss!r}")
    return fused_losses.TOKEN_LOSSES[loss]


def check_sft(given: dict[str, Any], loss: fused_losses.TokenLoss, options: dict[str, Any]) -> None:
    """Raise where a token loss cannot be what these arguments of ``SFTTrainer`` train on.

    Args:
        given: Arguments by name.
        loss: The token loss.
        options: Its ``beta``, ``value`` and ``max_weight``.

    Raises:
        ValueError: An option out of its range; TRL's own losses beside one other than ``mle``; data
            that references cannot be made for.
        NotImplementedError: References for images.
    """
    if loss.name == "mle":
        return
    _check_options(loss, options)
    args = given.get("args")
    for name, instead in (
        ("loss_type='dft'", getattr(args, "loss_type", "nll") == "dft"),
        ("label_smoothing_factor", getattr(args, "label_smoothing_factor", 0.0) > 0.0),
        ("compute_loss_func", given.get("compute_loss_func") is not None),
    ):
        if instead:
            raise ValueError(f"{name} would replace loss={loss.name!r}: drop one of them")
    if loss.uses_reference:
        for name, data, packs in _datasets(given):
            _check_references_of(name, data, packs, loss)


def _check_options(loss: fused_losses.TokenLoss, options: dict[str, Any]) -> None:
    """The library's own checks, on one token."""
    logits, zero = torch.zeros(1, 2), torch.zeros(1)
    ref = zero if loss.uses_reference else None
    fused_losses.reference.token_loss(logits, zero.long(), ref, loss=loss, **options)


def _datasets(given: dict[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Name, data and whether TRL packs it, of all that is given."""
    args = given.get("args")
    packing = getattr(args, "packing", False)
    eval_packing = getattr(args, "eval_packing", None)
    if given.get("train_dataset") is not None:
        yield "train_dataset", given["train_dataset"], packing
    evaluated = given.get("eval_dataset")
    packing = packing if eval_packing is None else eval_packing
    if isinstance(evaluated, dict):
        for name, data in evaluated.items():
            yield f"eval_dataset[{name!r}]", data, packing
    elif evaluated is not None:
        yield "eval_dataset", evaluated, packing


def _check_references_of(name: str, data: Any, packs: bool, loss: fused_losses.TokenLoss) -> None:
    columns = data.column_names or next(iter(data)).keys()
    if "image" in columns or "images" in columns:
        raise NotImplementedError(
            f"{name} has images, which TRL tokenises batch by batch: the references of "
            f"loss={loss.name!r} are per token and made before training; use loss='mle'"
        )
    if COLUMN in columns:
        if packs:
            raise ValueError(
                f"{name} brings {COLUMN!r}, which packing would lose with the rows they belong to: "
                "drop the column to have it made of the packed rows, or set packing=False"
            )
    elif isinstance(data, IterableDataset):
        raise ValueError(
            f"{name} is a stream and must bring its own {COLUMN!r} column, one log-prob of the "
            "reference per token; or give a datasets.Dataset"
        )


def check_dpo(given: dict[str, Any]) -> None:
    """Raise where the pair losses cannot be what these arguments of ``DPOTrainer`` train on.

    Raises:
        NotImplementedError: ``use_weighting``; adapters that change the base weights.
        ValueError: An option out of its range.
    """
    if given.get("ref_model") is None:
        check_adapters(given)
    args = given.get("args")
    if args is None:
        return
    if args.use_weighting:
        raise NotImplementedError("use_weighting (WPO) needs trl.DPOTrainer's own head")
    loss = one_pair_loss(args.loss_type, args.f_divergence_type, args.ld_alpha)
    if loss is not None:
        logps, one = torch.full((1,), -1.0), torch.ones(1)
        options = pair_loss_options(
            args.loss_type[0], args.beta, args.label_smoothing, args.discopop_tau
        )
        fused_losses.preference_loss(
            *[logps] * 4, chosen_lengths=one, rejected_lengths=one, **options
        )
    elif args.label_smoothing > 0.0 and "sigmoid" in args.loss_type:
        warnings.warn(
            f"label_smoothing={args.label_smoothing:g} does not reach loss_type='sigmoid' here: it "
            "does where that is the only loss, with reverse_kl and without ld_alpha; all else are "
            "TRL's formulas, whose sigmoid takes none",
            stacklevel=3,
        )


def check_adapters(given: dict[str, Any]) -> None:
    """Raise where TRL's reference would not be the start.

    It is the base, or a second adapter that TRL initialises like the first.

    Raises:
        NotImplementedError: An initialisation that changes the base weights.
    """
    configs = {"peft_config": given.get("peft_config")}
    configs |= getattr(given.get("model"), "peft_config", None) or {}
    for name, config in configs.items():
        init = getattr(config, "init_lora_weights", None)
        if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
            raise NotImplementedError(
                f"init_lora_weights={init!r} of {name} changes the base weights, and TRL takes its "
                "reference from those as if they were the start: give a ref_model, or use "
                "fused_losses.trainer.DPOTrainer, whose reference is the model as it starts"
            )


def one_pair_loss(loss_types: list[str], f_divergence_type: str, ld_alpha: float | None) -> Any:
    """Return the one loss of this library that TRL's options name, or None."""
    standard = f_divergence_type == "reverse_kl" and ld_alpha is None
    if not standard or len(loss_types) != 1:
        return None
    return fused_losses.preference.PAIR_LOSSES.get(loss_types[0])


def pair_loss_options(
    loss_type: str, beta: float, label_smoothing: float, discopop_tau: float
) -> dict[str, Any]:
    """Return those of TRL's options that a pair loss of this library reads."""
    loss = fused_losses.preference.PAIR_LOSSES[loss_type]
    options = {"loss_type": loss_type, "beta": beta}
    if loss.smoothing_below > 0.0:
        options["label_smoothing"] = label_smoothing
    if "discopop_tau" in loss.takes:
        options["discopop_tau"] = discopop_tau
    return options


def refuse_liger(args: Any) -> None:
    """Raise if Liger would replace what answers in the head's place.

    Raises:
        ValueError: ``use_liger_kernel``.
    """
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel would patch the model whose head this trainer answers for: set it "
            "to False; model_init_kwargs={'use_kernels': True} loads layer kernels"
        )


def check_kto(given: dict[str, Any]) -> None:
    """Raise where KTO cannot be what these arguments of ``KTOTrainer`` train on.

    Raises:
        NotImplementedError: Images; adapters that change the base weights.
        ValueError: An option out of its range; ``use_liger_kernel``.
    """
    if given.get("ref_model") is None:
        check_adapters(given)
    args = given.get("args")
    if args is not None:
        refuse_liger(args)
        if args.loss_type not in KTO_LOSSES:
            named = ", ".join(map(repr, KTO_LOSSES))
            raise ValueError(f"loss_type must be one of {named}, got {args.loss_type!r}")
        options = kto_options(args.beta, args.desirable_weight, args.undesirable_weight)
        label, zero = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1)
        fused_losses.kto_loss(torch.zeros(1, 1, 2), label, zero, label[0] > 0, **options)
    data = given.get("train_dataset")
    columns = () if data is None else (data.column_names or next(iter(data)).keys())
    if "image" in columns or "images" in columns:
        raise NotImplementedError(
            "train_dataset has images, whose references TRL cannot take in a call of their own: "
            "use trl.KTOTrainer"
        )


KTO_LOSSES = ("kto", "apo_zero_unpaired")


def kto_options(beta: float, desirable: float, undesirable: float) -> dict[str, Any]:
    """Return TRL's options in this library's words."""
    return {"beta": beta, "desirable_weight": desirable, "undesirable_weight": undesirable}


def check_gkd(given: dict[str, Any]) -> None:
    """Raise where arguments of ``GKDTrainer`` ask for logits.

    Raises:
        ValueError: As above.
    """
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if given.get(name) is not None:
            raise ValueError(
                f"{name} needs logits, which this trainer never makes: leave it out, or use "
                "trl.experimental.gkd.GKDTrainer"
            )
