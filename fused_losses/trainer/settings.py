"""What the trainers refuse before anything is computed: settings that would be passed over."""

from __future__ import annotations

from typing import Any

from fused_losses.integrations.cut_sequences import refuse_cut_sequences

# Arguments of transformers' and TRL's trainers that stand on what there is not here.
_NO_LOGITS = "needs logits, which are never made here"
_UNSERVED = {
    "compute_metrics": f"{_NO_LOGITS}: evaluation logs eval_loss, eval_nll, "
    "eval_mean_token_accuracy, eval_entropy and more by itself; others can be added in the "
    "trainer's method sums()",
    "preprocess_logits_for_metrics": f"{_NO_LOGITS}; see the trainer's method sums()",
    "compute_loss_func": f"{_NO_LOGITS}: give SFTTrainer a loss=TokenLoss(...) of your own",
    "data_collator": "would have to collate labels and references as the losses read them: put "
    "what it does into the dataset",
    "model_init": "is called after references are computed: give the model",
    "optimizer_cls_and_kwargs": "is not taken: give optimizers, or args.optim",
    "tokenizer": "is called processing_class",
}


def check_args(args: Any, expected: type) -> None:
    """Raise unless the trainer was given its own config."""
    if not isinstance(args, expected):
        raise TypeError(f"args must be a {expected.__name__}, got {type(args).__name__}")


def refuse_unserved(trainer: str, given: dict[str, Any]) -> None:
    """Raise if a trainer was given arguments that it does not have.

    Raises:
        TypeError: With the cure, where it is an argument of transformers' or TRL's trainers.
    """
    for name, value in given.items():
        if name not in _UNSERVED:
            raise TypeError(f"{trainer} got an unexpected keyword argument {name!r}")
        if value is not None:
            raise TypeError(f"{trainer}: {name} {_UNSERVED[name]}")


def check_setting(model: Any, args: Any) -> None:
    """Raise where training would be another than the one asked for.

    Raises:
        ValueError: Named, with the cure.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would run DataParallel; start "
            "one process per GPU (accelerate launch, torchrun), or set CUDA_VISIBLE_DEVICES to one"
        )
    refuse_cut_sequences(args)
    if args.world_size > 1:
        _check_processes(args)
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True replaces model.forward when training starts, and with it the "
            "fused head: set it to False; Liger's other kernels can be applied to the model's "
            "class before the model is made, with fused_linear_cross_entropy=False"
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits=True: the router's auxiliary loss is not part of these "
            "losses; set it to False"
        )
    peft = getattr(model, "active_peft_config", None)
    if args.lays_end_to_end and getattr(peft, "is_prompt_learning", False):
        raise ValueError(
            f"{type(peft).__name__}: PEFT puts one learnt prompt before a row and takes no "
            "position_ids, so sequences cannot lie end to end; set padding_free=False and "
            "packing=False"
        )


def _check_processes(args: Any) -> None:
    """Raise for what several processes cannot do together, or would do wrongly in silence."""
    loads = args.accelerator_config
    if loads.dispatch_batches:
        raise ValueError(
            "accelerator_config.dispatch_batches=True: one process would join the batches of all "
            "and cut them by rows, but here a batch holds sequences end to end, or pairs as two "
            "halves; leave it at None: each process loads its own"
        )
    if not loads.even_batches:
        raise ValueError(
            "accelerator_config.even_batches=False: a process without a last batch would leave "
            "the others waiting; leave it at True: what fills up a last batch is not counted, "
            "and dataloader_drop_last=True leaves that batch out"
        )
    if args.auto_find_batch_size:
        raise ValueError(
            f"auto_find_batch_size=True with {args.world_size} processes: the one that ran out of "
            "memory would start over, while the others wait for it; set "
            "per_device_train_batch_size, and gradient_accumulation_steps in its stead"
        )
