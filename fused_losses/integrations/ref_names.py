"""The name of a reference, in a dataset's column and in the cache, and what it must agree with."""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset

from fused_losses.integrations.fingerprint import model_fingerprint, precision_of, software_of
from fused_losses.integrations.ref_cache import CacheKey
from fused_losses.integrations.shares import on_all

REF_MODEL = "ref_model"
logger = logging.getLogger(__name__)


class NamedModel:
    """A reference model as it stands, in the precision of the run.

    Args:
        model: A model of transformers or PEFT. It is named when its name is first asked for.
        mixed_precision: As accelerate calls it: no, bf16 or fp16.
        device: Where it runs.

    Raises:
        NotImplementedError: Another mixed precision, named.
    """

    def __init__(self, model: Any, mixed_precision: str, device: torch.device) -> None:
        if mixed_precision not in ("no", "bf16", "fp16"):
            raise NotImplementedError(
                f"mixed precision {mixed_precision!r} is not served: the reference has to take the "
                "policy's path; use bf16=True, fp16=True or neither"
            )
        self.model = model
        self.mixed_precision = mixed_precision
        self.device = device

    @functools.cached_property
    def fingerprint(self) -> str:
        """Name of weights, adapters and what else decides their log-probs."""
        return model_fingerprint(self.model)

    @property
    def precision(self) -> str:
        """Precision of the forward pass beside the weights' own."""
        return precision_of(self.mixed_precision, self.device)

    @property
    def name(self) -> str:
        """What the column ``ref_model`` says: fingerprint and precision."""
        return f"{self.fingerprint}-{self.precision}"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the run computes its policy."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    def key(self, data: str, rows: int, name: str) -> CacheKey:
        """Return the key of a dataset's references in the cache.

        Raises:
            ValueError: The processes hold different models or data.
        """

        def make() -> CacheKey:
            return CacheKey(self.fingerprint, data, self.precision, software_of(self.device), rows)

        keys = on_all(make, f"naming the reference of {name}")
        for rank, key in enumerate(keys):
            for field in fields(key):
                here, there = getattr(keys[0], field.name), getattr(key, field.name)
                if here != there:
                    raise ValueError(
                        f"reference log-probs of {name}: process {rank} has another {field.name} "
                        f"than process 0, {there} instead of {here}; give every process the same "
                        "(seed before a model or its adapters are drawn: transformers.set_seed)"
                    )
        return keys[0]

    def check(self, dataset: Dataset, name: str) -> None:
        """Raise unless the references that a dataset brings along are this model's.

        A dataset without the column ``ref_model`` is taken as it is.

        Raises:
            ValueError: They are of another model, or of another precision; named, with the cure.
        """
        if REF_MODEL not in dataset.column_names:
            return
        on_all(lambda: self._check(dataset, name), f"checking the references of {name}")

    def _check(self, dataset: Dataset, name: str) -> None:
        if any(p.is_meta or hasattr(p, "ds_id") for p in self.model.parameters()):
            logger.warning(
                "%s: its ref_logps cannot be compared with the weights, which this process does "
                "not hold; they are taken as they are",
                name,
            )
            return
        for i, of in enumerate(dataset[REF_MODEL]):
            if of == self.name:
                continue
            files = ", ".join(f["filename"] for f in dataset.cache_files) or "memory"
            where = f"{name}, row {i}, column {REF_MODEL!r} (dataset in {files})"
            weights, _, precision = str(of).rpartition("-")
            if weights == self.fingerprint:
                raise ValueError(
                    f"{where}: its ref_logps were computed in the mixed precision {precision!r}, "
                    f"the policy here in {self.precision!r}. Compute them with the bf16, fp16 and "
                    "tf32 of this run, or drop the ref_logps columns to have it done"
                )
            raise ValueError(
                f"{where}: its ref_logps are of the model {of}, the reference here is "
                f"{self.name}: other weights, adapters, config or attention implementation. Drop "
                "the ref_logps columns to compute them anew, pass the model they are of as "
                f"ref_model, or drop the column {REF_MODEL} to use them as they are"
            )
