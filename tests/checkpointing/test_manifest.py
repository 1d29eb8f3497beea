"""Manifest of a checkpoint: complete only with the files of every rank, and checked by all ranks together."""

import errno
import hashlib
import itertools
import json
from concurrent.futures import Future
from pathlib import Path

import pytest

from processes import run_in_processes
from recurrent_bart.checkpointing import manifest
from recurrent_bart.checkpointing.checkpoints import CheckpointError, Checkpoints
from recurrent_bart.checkpointing.manifest import has_all_parts, join_parts, problems, write_and_fsync, write_part


def write_files(folder, rank):
    """Write two files of a rank and the rank's part of the manifest."""
    names = f"engine/shard-{rank}.pt", f"process-{rank}.pt"
    records = {}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = f"{name} of rank {rank}".encode() * (rank + 1)
        records[name] = write_and_fsync(folder / name, lambda file, content=content: file.write(content))
    write_part(folder, rank, records)
    return names


@pytest.fixture
def checkpoint(tmp_path):
    """Return the folder of a whole checkpoint of three ranks."""
    folder = tmp_path / "step-00000002"
    for rank in range(3):
        write_files(folder, rank)
    join_parts(folder, 3, step=2)
    return folder


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_it_has_all_parts_only_with_that_of_every_rank(tmp_path, order):
    for number, rank in enumerate(order):
        assert not has_all_parts(tmp_path, 3)
        write_files(tmp_path, rank)
        assert has_all_parts(tmp_path, 3) == (number == 2)


def test_it_names_the_files_of_all_ranks_with_sizes_and_checksums(checkpoint):
    content = json.loads((checkpoint / "manifest.json").read_text())
    assert content["step"] == 2
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert content["files"] == {
        str(path.relative_to(checkpoint)): {
            "bytes": len(path.read_bytes()),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    # the parts of the ranks are gone
    assert len(files) == 6


@pytest.mark.parametrize("n_shares", [1, 2, 4, 7])
def test_each_file_is_in_the_share_of_one_rank(checkpoint, n_shares):
    for path in checkpoint.rglob("*.pt"):
        path.write_bytes(path.read_bytes() + b"x")
    found = [problems(checkpoint, slice(rank, None, n_shares)) for rank in range(n_shares)]
    assert sorted(itertools.chain(*found)) == problems(checkpoint)
    assert len(problems(checkpoint)) == 6
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_large_file_is_hashed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("recurrent_bart.checkpointing.manifest.CHUNK_BYTES", 4)
    record = write_and_fsync(tmp_path / "a", lambda file: [file.write(part) for part in (b"one", b"two", b"three")])
    assert record == {"bytes": 11, "sha256": hashlib.sha256(b"onetwothree").hexdigest()}
    write_part(tmp_path, 0, {"a": record})
    join_parts(tmp_path, 1)
    assert problems(tmp_path) == []
    for place in range(11):
        damaged = bytearray(b"onetwothree")
        damaged[place] ^= 1
        (tmp_path / "a").write_bytes(damaged)
        assert problems(tmp_path) == ["a is damaged (its checksum differs from the checksum in manifest.json)"]


@pytest.mark.distributed
@pytest.mark.parametrize("number", [0, 1])
def test_damage_that_one_rank_finds_is_known_to_every_rank(checkpoint, number):
    """Damage a file in the share of rank 0 or of rank 1: both ranks refuse the checkpoint."""
    file = sorted(checkpoint.rglob("*.pt"))[number]
    name = str(file.relative_to(checkpoint))
    assert problems(checkpoint, slice(number, None, 2)) == []
    file.write_bytes(b"")

    def load(rank):
        with pytest.raises(ValueError, match=r".") as caught:
            Checkpoints(checkpoint.parent).load(engine=None)
        return str(caught.value)

    for message in run_in_processes(load, 2, checkpoint.parent):
        assert f"no checkpoint can be read: {checkpoint}: {name} is incomplete (0 of" in message


@pytest.mark.distributed
def test_an_error_that_one_rank_meets_in_the_background_stops_every_rank(tmp_path):
    def wait(rank):
        checkpoints = Checkpoints(tmp_path / "checkpoints", in_background=True)
        checkpoints.writing, checkpoints.writing_step = Future(), 4
        if rank == 1:
            checkpoints.writing.set_exception(OSError("no space left"))
        else:
            checkpoints.writing.set_result(None)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.wait()
        # the error is told once
        checkpoints.wait()
        return str(caught.value)

    for message in run_in_processes(wait, 2, tmp_path):
        assert "step-00000004 cannot be written (process 1: no space left; " in message


@pytest.mark.parametrize("name", ["manifest.json", "a file of rank 0"])
def test_a_disk_that_cannot_be_read_is_no_damage(checkpoint, monkeypatch, name):
    error = OSError(errno.ESTALE, "Stale file handle")

    def fail(*given):
        raise error

    monkeypatch.setattr(*((Path, "read_text") if name == "manifest.json" else (manifest, "_sha256")), fail)
    with pytest.raises(OSError, match="Stale"):
        problems(checkpoint)
    with pytest.raises(OSError, match="may be undamaged: start the run again"):
        Checkpoints(checkpoint.parent).find_newest()
    monkeypatch.undo()
    assert Checkpoints(checkpoint.parent).find_newest() == checkpoint
