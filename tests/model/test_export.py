"""Tests that without recurrence one segment compiles and exports to one graph with BART's results."""

import pytest
import torch

from recurrent_bart import RecurrentBartConfig, RecurrentBartForConditionalGeneration
from tiny import TINY, random_ids


@pytest.fixture
def model(bart):
    """Return our model with the weights of the tiny BART."""
    model = RecurrentBartForConditionalGeneration(RecurrentBartConfig(**TINY, pre_seq_len=0)).eval()
    model.load_state_dict(bart.state_dict())
    return model


@pytest.fixture
def document():
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    return {"input_ids": random_ids(2, 20), "attention_mask": mask}


@pytest.mark.parametrize("target", ["labels", "decoder_input_ids"])
def test_it_compiles_as_one_graph(bart, model, document, target):
    inputs = document | {target: random_ids(2, 6)}
    torch._dynamo.reset()
    # fullgraph: a graph break is an error
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found, expected = compiled(**inputs), bart(**inputs)
    torch.testing.assert_close(found.logits, expected.logits)
    if target == "labels":
        torch.testing.assert_close(found.loss, expected.loss)


def test_a_compiled_model_trains_as_bart(bart, model, document):
    inputs = document | {"labels": random_ids(2, 6)}
    torch._dynamo.reset()
    torch.compile(model.train(), backend="aot_eager", fullgraph=True)(**inputs).loss.backward()
    bart.train()(**inputs).loss.backward()
    expected = dict(bart.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_it_exports(bart, model, document, strict):
    inputs = document | {"decoder_input_ids": random_ids(2, 6), "use_cache": False}
    exported = torch.export.export(model, (), kwargs=inputs, strict=strict).module()
    torch.testing.assert_close(exported(**inputs).logits, bart(**inputs).logits)


def test_other_documents_are_still_right_when_compiled(model, document):
    """Check long and segmented documents, whose code has graph breaks."""
    model.config.segment_size = model.config.input_size = 8
    for ids in (document["input_ids"], document["input_ids"][:, :16].reshape(2, 2, 8)):
        inputs = {"input_ids": ids, "decoder_input_ids": random_ids(2, 6)}
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, model(**inputs).logits)
