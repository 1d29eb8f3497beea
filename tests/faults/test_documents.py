"""Unreadable documents."""

import pytest

from recurrent_bart.training.lifecycle.exit_codes import ExitCode

DONE, FAULT, MISTAKE = ExitCode.DONE, ExitCode.FAULT, ExitCode.MISTAKE
pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_document_that_cannot_be_collated_is_named(run, n_workers):
    changes = {"dataloader_num_workers": n_workers, "max_steps": 50}
    ended = run.train(fault="document_unreadable", index=5, ranks=[0, 1], changes=changes)
    assert MISTAKE in ended.codes, ended.text()
    assert set(ended.codes) <= {MISTAKE, FAULT}
    assert "document 'train-5': its sections are damaged" in ended.text()
    assert "Traceback" not in ended.text()


BROKEN = {
    "line": ('{"id": 7, "sections": ["ant b', "train.jsonl:3: unreadable line"),
    "column": ('{"id": 7, "text": "ant"}', "train.jsonl:3: no column 'document'"),
    "type": ('{"id": 7, "document": 3, "summary": "ant"}', "train.jsonl:3: column 'document' must be a text"),
    "target": ('{"id": 7, "document": "ant", "summary": " "}', "train.jsonl:3: the summary is empty"),
}


@pytest.fixture(params=BROKEN)
def broken(request, run, tmp_path):
    """Return a run whose third document is unusable, and the expected message."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for split in ("train", "validation"):
        lines = (run.documents / f"{split}.jsonl").read_text().splitlines()
        if split == "train":
            lines[2] = BROKEN[request.param][0]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    run.documents = folder
    return run, BROKEN[request.param][1]


def test_a_broken_document_is_named_by_its_line(broken):
    run, message = broken
    ended = run.train(1)
    assert ended.codes == [MISTAKE], ended.text()
    assert "error: " in ended.text()
    assert message in ended.text()
    assert not run.folder.exists()


def test_broken_documents_may_be_skipped_and_are_counted(broken):
    run, message = broken
    ended = run.train(1, changes={"skip_bad_samples": True, "max_steps": 1, "warmup_steps": 1})
    assert ended.codes == [DONE], ended.text()
    assert "train.jsonl are skipped: " in ended.text()
    assert message in ended.text()
    assert "documents  23 for training" in ended.text()
    assert [record["n_bad_documents"] for record in run.records() if "loss" in record] == [1]
    # Skipped documents count also if documents come from the cache.
    ended = run.resume(1, changes={"max_steps": 2})
    assert ended.codes == [DONE], ended.text()
    assert [record["n_bad_documents"] for record in run.records() if "loss" in record] == [1, 1]
