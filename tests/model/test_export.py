"""Tests that without recurrence one segment compiles and exports to one graph with BART's results."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart import RecurrentBartConfig, RecurrentBartForConditionalGeneration
from tiny import PLAIN_CLASSES, RECURRENT, TINY, open_gates, plain_model, random_ids

pytestmark = pytest.mark.slow
# tracing takes seconds for each layer
ONE_LAYER = {"encoder_layers": 1, "decoder_layers": 1}


@pytest.fixture(params=PLAIN_CLASSES)
def bart(request):
    """Return a plain BART or MBart with one encoder layer and one decoder layer."""
    return plain_model(request.param, **ONE_LAYER)


@pytest.fixture
def model(bart):
    """Return our model with the weights of the plain one."""
    is_mbart = bart.config.model_type == "mbart"
    fields = TINY | ONE_LAYER | {"pre_seq_len": 0, "normalize_before": is_mbart, "wraps_last_label": is_mbart}
    config = RecurrentBartConfig(**fields)
    model = RecurrentBartForConditionalGeneration(config).eval()
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


def test_an_exported_decoder_begins_with_the_document_as_barts_does(bart, model, document):
    exported = torch.export.export(model, (), kwargs=document | {"use_cache": False}, strict=False).module()
    torch.testing.assert_close(exported(**document, use_cache=False).logits, bart(**document).logits)


def test_it_exports_for_documents_and_targets_of_any_length(bart, model, document):
    inputs = document | {"decoder_input_ids": random_ids(2, 6)}
    dynamic = dict.fromkeys(inputs, dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)) | {"use_cache": None}
    exported = torch.export.export(model, (), kwargs=inputs | {"use_cache": False}, dynamic_shapes=dynamic).module()
    shorter = {name: tensor[:1, : tensor.shape[1] - 2] for name, tensor in inputs.items()}
    torch.testing.assert_close(exported(**shorter, use_cache=False).logits, bart(**shorter).logits)


class AfterTheEncoder(torch.nn.Module):
    """Decoder and head behind encoder outputs, the part that clients export as a second graph."""

    def __init__(self, model, form):
        super().__init__()
        self.model, self.form = model, form

    def forward(self, hidden, attention_mask, decoder_input_ids):
        inputs = {"attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids, "use_cache": False}
        return self.model(encoder_outputs=self.form(hidden), **inputs).logits


@pytest.mark.parametrize("form", [BaseModelOutput, lambda hidden: (hidden,)], ids=["object", "tuple"])
@pytest.mark.parametrize("is_masked", [True, False], ids=["mask", "no mask"])
def test_the_decoder_exports_without_the_encoder(bart, model, document, form, is_masked):
    mask = document["attention_mask"] if is_masked else None
    hidden, target = bart.get_encoder()(document["input_ids"], mask).last_hidden_state, random_ids(2, 6)
    inputs = hidden.detach(), mask, target
    exported = torch.export.export(AfterTheEncoder(model, form), inputs, strict=False).module()
    expected = bart(input_ids=document["input_ids"], attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(exported(*inputs), expected)


@pytest.mark.parametrize("fields", [{}, {"prefix_attention": "gated"}, {"decoder_context": "memory"}], ids=str)
def test_the_decoder_behind_a_state_exports_without_the_encoder(document, fields):
    model = RecurrentBartForConditionalGeneration(RecurrentBartConfig(**TINY | ONE_LAYER | RECURRENT | fields)).eval()
    open_gates(model)
    encoded = model.get_encoder()(**document)
    inputs = encoded.last_hidden_state.detach(), encoded.context_mask, random_ids(2, 6)
    decoder = AfterTheEncoder(model, BaseModelOutput)
    exported = torch.export.export(decoder, inputs, strict=False).module()
    torch.testing.assert_close(exported(*inputs), decoder(*inputs))


def test_other_documents_are_still_right_when_compiled(model, document):
    """Check long and segmented documents, whose code has graph breaks."""
    model.config.segment_size = model.config.input_size = 8
    flat = document["input_ids"][:, :16]
    for ids in (flat, flat.reshape(2, 2, 8)):
        inputs = {"input_ids": ids, "decoder_input_ids": random_ids(2, 6)}
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, model(**inputs).logits)
