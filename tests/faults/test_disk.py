"""Full disks, unwritable folders and damaged checkpoints."""

import pytest
import torch

from recurrent_bart.inference.stream_reader import load_model
from recurrent_bart.training.lifecycle.exit_codes import ExitCode

DONE, FAULT, MISTAKE = ExitCode.DONE, ExitCode.FAULT, ExitCode.MISTAKE
pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_leaves_the_earlier_checkpoint_undamaged(run, rank):
    ended = run.train(fault="disk_full", ranks=[rank], from_checkpoint=2)
    assert ended.codes == [FAULT, FAULT], ended.text()
    message = f"fault on rank 0: {run.checkpoints / 'step-00000004'} cannot be written (process {rank}: "
    assert message in ended.printed[0]
    assert "No space left on device" in ended.printed[0]
    assert "bytes of disk space are free" in ended.printed[0]
    assert run.steps() == [2]
    ended = run.resume()
    assert ended.codes == [DONE, DONE], ended.text()
    assert run.steps() == [4, 6]


@pytest.mark.parametrize("what", ["save_model", "save_tokenizer", "draw_curves", "write_predictions"])
def test_a_full_disk_leaves_the_earlier_model_undamaged(run, what):
    ended = run.train(fault="writing_fails", ranks=[0], what=what, at=3)
    assert ended.codes == [FAULT, FAULT], ended.text()
    (line,) = [line for line in ended.printed[0].splitlines() if line.startswith("fault on rank 0: ")]
    written = run.folder / {"draw_curves": "samples.md", "write_predictions": "predictions.jsonl"}.get(what, "model")
    assert f"{written} cannot be written (" in line
    assert "No space left on device" in line
    assert (
        "bytes of disk space are free). Earlier files are undamaged: free disk space, then continue from the last"
        in line
    )
    assert "Traceback" not in ended.text()
    assert run.outcome()["code"] == FAULT
    # No temporary file is left, and the model is readable.
    assert [path.name for path in run.folder.glob(".*")] == []
    load_model(str(run.folder / "model"), torch.device("cpu"), torch.float32)
    ended = run.resume()
    assert ended.codes == [DONE, DONE], ended.text()


def test_a_full_disk_while_a_run_stops_is_a_fault(run):
    ended = run.train(1, fault="disk_full_and_signalled", ranks=[0])
    assert ended.codes == [FAULT], ended.text()
    assert "cannot be written" in ended.text()
    assert run.steps() == [2]


def test_a_folder_that_becomes_unwritable_is_named(run):
    ended = run.train(1, fault="folder_becomes_a_file", ranks=[0], path=run.checkpoints, at=3)
    assert ended.codes == [FAULT], ended.text()
    assert f"{run.checkpoints / 'step-00000004'} cannot be written" in ended.text()
    run.checkpoints.unlink()
    run.checkpoints.with_name("away").rename(run.checkpoints)
    assert run.steps() == [2]


def a_shard(run, step):
    return next((run.checkpoints / f"step-{step:08d}" / "engine").glob("*optim_states.pt"))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def alter(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, alter, lambda file: file.unlink()], ids=["truncated", "altered", "gone"])
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(run, damage):
    assert run.train(1, changes={"max_steps": 4}).codes == [DONE]
    damage(a_shard(run, 4))
    ended = run.resume(1, changes={"max_steps": 6})
    assert ended.codes == [DONE], ended.text()
    assert a_shard(run, 4).name in ended.text()
    assert "resumed    after step 2" in ended.text()
    assert sorted(run.losses()) == [1, 2, 3, 4, 5, 6]


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(run):
    assert run.train(1, changes={"max_steps": 2}).codes == [DONE]
    truncate(a_shard(run, 2))
    ended = run.resume(1, changes={"max_steps": 6})
    assert ended.codes == [MISTAKE], ended.text()
    assert a_shard(run, 2).name in ended.text()
