"""Reference log-probs on disk: one Arrow file per model and data, whole or not there at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import xxhash
from datasets import Dataset

from fused_losses.integrations.shares import on_all

_KEY = b"fused_losses.reference"


@dataclass(frozen=True)
class CacheKey:
    """What a file of reference log-probs belongs to.

    Attributes:
        model: Fingerprint of the reference model.
        data: Fingerprint of the tokens and labels.
        precision: Precision of the forward pass beside the weights': no, tf32, bf16 or fp16.
        software: Versions that ran it, and the kind of device.
        rows: Number of sequences.
    """

    model: str
    data: str
    precision: str
    software: str
    rows: int

    def path(self, folder: str | os.PathLike[str]) -> Path:
        """Return the file in the folder."""
        software = xxhash.xxh3_64_hexdigest(self.software.encode())[:8]
        name = f"ref-{self.model[:16]}-{self.data[:16]}-{self.precision}-{software}.arrow"
        return Path(folder) / name


def found_or_made(
    folder: str | os.PathLike[str],
    key: CacheKey,
    make: Callable[[], Sequence[np.ndarray]],
    what: str,
    *,
    writes: bool,
    lengths: Sequence[int] | None = None,
) -> Dataset:
    """Return the column ``ref_logps`` from the folder, on every process; make it where it lacks.

    Args:
        folder: May be one that all processes share, or one per machine.
        key: The same on all processes.
        make: Makes the log-probs; called on every process if one of them lacks the file.
        what: What is done, for the message of an error.
        writes: Whether this process writes the file: one per machine.
        lengths: Tokens of each sequence, which a file must fit.

    Raises:
        ValueError: The file does not fit, or nobody wrote it where this process looks.
        RuntimeError: Another process failed; named.
    """
    if not all(on_all(lambda: load(folder, key, lengths) is not None, what)):
        logps = make()
        on_all(lambda: store(folder, key, logps) if writes else None, what)
    found = []

    def read() -> None:
        dataset = load(folder, key, lengths)
        if dataset is None:
            raise ValueError(
                f"the reference cache {key.path(folder)} was written by the first process of this "
                "machine, but not here: give all processes of a machine one ref_cache_dir"
            )
        found.append(dataset)

    on_all(read, what)
    return found[0]


def load(
    folder: str | os.PathLike[str], key: CacheKey, lengths: Sequence[int] | None = None
) -> Dataset | None:
    """Return the cached column ``ref_logps``, None if there is no file.

    ``lengths``: tokens of each sequence, where they are known.

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
    if lengths is not None:
        here = pc.list_value_length(dataset.data.column("ref_logps")).to_numpy()
        wrong = (here != np.asarray(lengths)).nonzero()[0]
        if len(wrong):
            raise ValueError(
                f"the reference cache {path} holds {here[wrong[0]]} log-probs of row {wrong[0]}, "
                f"which has {lengths[wrong[0]]} tokens; {cure}"
            )
    parts = dataset.data.column("ref_logps").chunks
    sizes = [pc.list_value_length(part).to_numpy(zero_copy_only=False) for part in parts]
    digest = _digest(sizes, [part.flatten().to_numpy(zero_copy_only=False) for part in parts])
    # Files of version 0.2 do not say what they hold.
    if found.get("digest", digest) != digest:
        raise ValueError(f"the reference cache {path} does not hold what was written; {cure}")
    return dataset


def _digest(sizes: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> str:
    """A hash of lengths and log-probs, each in any pieces."""
    found = xxhash.xxh3_128()
    for pieces, dtype in ((sizes, np.int32), (values, np.float32)):
        for piece in pieces:
            found.update(np.ascontiguousarray(piece, dtype).data)
    return found.hexdigest()


def store(folder: str | os.PathLike[str], key: CacheKey, logps: Sequence[np.ndarray]) -> None:
    """Write the file in one move."""
    path = key.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    said = asdict(key) | {"digest": _digest([np.fromiter(map(len, logps), np.int32)], logps)}
    schema = pa.schema([("ref_logps", pa.list_(pa.float32()))], {_KEY: json.dumps(said).encode()})
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
