"""A document that cannot be read."""

import pytest

from recurrent_bart.training.outcome import ExitCode

DONE, FAULT, MISTAKE = ExitCode.DONE, ExitCode.FAULT, ExitCode.MISTAKE
pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("n_workers", [0, 1])
def test_one_that_cannot_be_made_a_batch_of_is_named(run, n_workers):
    changes = {"dataloader_num_workers": n_workers, "max_steps": 50}
    ended = run.train(fault="document_unreadable", index=5, ranks=[0, 1], changes=changes)
    assert MISTAKE in ended.codes, ended.text()
    assert set(ended.codes) <= {MISTAKE, FAULT}
    assert "document 'train-5': its sections are damaged" in ended.text()
    assert "Traceback" not in ended.text()
