"""Reference log-probs on disk: one Arrow file per model and data, whole or not there at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

_KEY = b"fused_losses.reference"


@dataclass(frozen=True)
class CacheKey:
    """What a file of reference log-probs belongs to.

    Attributes:
        model: Fingerprint of the reference model.
        data: Fingerprint of the tokens and labels.
        precision: Mixed precision of the forward pass: no, bf16 or fp16.
        rows: Number of sequences.
    """

    model: str
    data: str
    precision: str
    rows: int

    def path(self, folder: str | os.PathLike[str]) -> Path:
        """Return the file in the folder."""
        return Path(folder) / f"ref-{self.model[:16]}-{self.data[:16]}-{self.precision}.arrow"


def load(folder: str | os.PathLike[str], key: CacheKey) -> Dataset | None:
    """Return the cached column ``ref_logps``, None if there is no file.

    Raises:
        ValueError: The file belongs to something else, or cannot be read; named, with the cure.
    """
    path = key.path(folder)
    if not path.exists():
        return None
    cure = "delete the file to compute it anew, or use another ref_cache_dir"
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            found = json.loads((reader.schema.metadata or {}).get(_KEY, b"{}"))
        dataset = Dataset.from_file(str(path))
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise ValueError(f"the reference cache {path} cannot be read ({error}); {cure}") from error
    found["rows"] = len(dataset) if found.get("rows") == key.rows else found.get("rows")
    for name, expected in asdict(key).items():
        if found.get(name) != expected:
            raise ValueError(
                f"the reference cache {path} belongs to another {name}: expected {expected}, found "
                f"{found.get(name)}; {cure}"
            )
    return dataset


def store(folder: str | os.PathLike[str], key: CacheKey, logps: Sequence[np.ndarray]) -> Dataset:
    """Write the file in one move, and return its column ``ref_logps``."""
    path = key.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [("ref_logps", pa.list_(pa.float32()))], {_KEY: json.dumps(asdict(key)).encode()}
    )
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for first in range(0, len(logps), 1000):
                    part = pa.array(logps[first : first + 1000], pa.list_(pa.float32()))
                    writer.write_batch(pa.record_batch([part], schema=schema))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return Dataset.from_file(str(path))
