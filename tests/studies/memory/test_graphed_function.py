"""Functions captured as CUDA graphs: a CPU runs them eagerly. Tests on a GPU are in tests/gpu."""

import pytest
import torch

from played_graphs import play_graphs
from recurrent_bart.studies.memory import graphed_function
from recurrent_bart.studies.memory.graphed_function import GraphedFunction
from recurrent_bart.studies.memory.single_run import SingleRun
from study_runs import short_run


def test_on_a_processor_work_is_done_each_time():
    seen = []
    work = GraphedFunction(lambda one, other: seen.append(one) or one + other, pool=None)
    for number in range(3):
        assert work(torch.tensor(number), torch.tensor(1)) == number + 1
    assert len(seen) == 3
    assert work.captured == {}


def test_a_recording_is_a_graph_that_keeps_neither_what_it_was_given_nor_what_it_gave(monkeypatch):
    graphs = play_graphs(monkeypatch, graphed_function)
    monkeypatch.setattr(torch.cuda, "current_stream", object)
    given = torch.tensor([1.0, 2.0])
    call = graphed_function._CapturedCall(torch.square, (given,), None)
    given.zero_()
    found = [call.replay((torch.tensor(numbers),)) for numbers in ([3.0, 4.0], [5.0, 6.0])]
    assert [part.tolist() for part in found] == [[9, 16], [25, 36]]
    assert len(graphs) == 1


@pytest.mark.parametrize("n_segments", [1, 3])
def test_a_step_leaves_no_gradient_behind(n_segments):
    single = SingleRun(short_run(), torch.device("cpu"))
    single.update(*single.documents.batch(n_segments))
    assert all(parameter.grad is None for parameter in single.model.parameters())


def test_predicting_leaves_the_model_in_training():
    single = SingleRun(short_run(), torch.device("cpu"))
    predicted = single.predict(*single.documents.batch(2))
    assert predicted.shape == (16, 1)
    assert not predicted.requires_grad
    assert single.model.training
