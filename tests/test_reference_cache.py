"""The files of reference log-probs: whole, and of what they say, whatever happens meanwhile."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from tiny_training import llama, sft_config, sft_rows

from fused_losses.integrations import ref_cache
from fused_losses.integrations.fingerprint import data_fingerprint
from fused_losses.trainer import precompute_ref_logps


def key(rows: int) -> ref_cache.CacheKey:
    return ref_cache.CacheKey("m" * 32, "d" * 32, "no", "torch", rows)


def column(rows: int, first: float = 0.0) -> list[np.ndarray]:
    """Sequences of 0 to 4 numbers, each its own."""
    return [np.arange(i % 5, dtype=np.float32) - first - i for i in range(rows)]


@pytest.mark.parametrize("rows", [1, 999, 1000, 1001, 2000, 2003])
def test_a_column_of_any_length_comes_back_whole(tmp_path: Path, rows: int) -> None:
    ref_cache.store(tmp_path, key(rows), column(rows))
    found = ref_cache.load(tmp_path, key(rows))
    assert found is not None
    assert found["ref_logps"][:] == [list(row) for row in column(rows)]


def test_tokens_that_are_cut_otherwise_have_another_name() -> None:
    def named(*rows: list[int]) -> str:
        data = {"input_ids": list(rows), "labels": list(rows)}
        return data_fingerprint(Dataset.from_dict(data), "")

    names = {named([1, 2], [3]), named([1], [2, 3]), named([1, 2, 3]), named([3], [1, 2])}
    assert len(names) == 4
    # More than are read at a time, and a last one that differs.
    many = [[i] for i in range(1005)]
    assert named(*many) != named(*many[:-1], [7])
    assert named(*many) == named(*many)


def test_a_full_disk_leaves_the_file_that_was_there_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref_cache.store(tmp_path, key(3), column(3))
    (before,) = tmp_path.iterdir()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pa.ipc.RecordBatchStreamWriter, "write_batch", full)
    with pytest.raises(OSError, match="No space left"):
        ref_cache.store(tmp_path, key(3), column(3, 9.0))
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)  # a disk that says so late
    with pytest.raises(OSError, match="No space left"):
        ref_cache.store(tmp_path, key(3), column(3, 9.0))
    assert list(tmp_path.iterdir()) == [before]
    assert ref_cache.load(tmp_path, key(3))["ref_logps"][1] == list(column(3)[1])  # type: ignore[index]


def test_two_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    """As two runs of one cache do: both find nothing, both compute, both write."""
    together, failed = threading.Barrier(2), []

    def run(first: float) -> None:
        def make() -> list[np.ndarray]:
            together.wait(10)
            return column(1500, first)

        try:
            found = ref_cache.found_or_made(tmp_path, key(1500), make, "testing", writes=True)
            whole = [[list(row) for row in column(1500, f)] for f in (0.0, 5.0)]
            assert found["ref_logps"][:] in whole
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(first,)) for first in (0.0, 5.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_lacks_its_end_or_its_sense_is_refused(tmp_path: Path) -> None:
    ref_cache.store(tmp_path, key(40), column(40))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 64, len(whole) // 3, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"{path.name} (cannot be read|belongs to another)"):
            ref_cache.load(tmp_path, key(40))
    path.write_bytes(b"\x80\x04\x95cposix\nsystem\n." * 9)  # a pickle is not even looked at
    with pytest.raises(ValueError, match="cannot be read"):
        ref_cache.load(tmp_path, key(40))


def test_references_of_another_length_than_their_tokens_are_refused(tmp_path: Path) -> None:
    config = sft_config(tmp_path, ref_cache_dir=str(tmp_path))
    made = precompute_ref_logps(llama(), sft_rows(4), config)
    (path,) = tmp_path.glob("ref-*.arrow")
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        table = reader.read_all()
    short = [row[:-1] for row in made["ref_logps"]]
    table = table.set_column(0, table.schema.field(0), pa.array(short, pa.list_(pa.float32())))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=rf"{path.name} .*tokens.*delete the file"):
        precompute_ref_logps(llama(), sft_rows(4), config)


def test_a_number_that_changed_on_the_disk_is_found(tmp_path: Path) -> None:
    rows = column(1500)
    ref_cache.store(tmp_path, key(1500), rows)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    at = whole.rindex(rows[-1].tobytes())
    path.write_bytes(whole[: at + 2] + bytes([whole[at + 2] ^ 1]) + whole[at + 3 :])
    with pytest.raises(ValueError, match=rf"{path.name} does not hold what was written; delete"):
        ref_cache.load(tmp_path, key(1500))


def test_a_file_of_a_version_that_wrote_no_digest_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda said: dumps({**said, "digest": None}))
    ref_cache.store(tmp_path, key(3), column(3))
    with pytest.raises(ValueError, match="does not hold what was written"):
        ref_cache.load(tmp_path, key(3))
    monkeypatch.setattr(
        json, "dumps", lambda said: dumps({k: v for k, v in said.items() if k != "digest"})
    )
    ref_cache.store(tmp_path, key(3), column(3))
    assert ref_cache.load(tmp_path, key(3)) is not None
