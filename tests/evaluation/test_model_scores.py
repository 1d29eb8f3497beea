"""BERTScore and factuality equal values worked out by hand, on tiny models."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
)

import scoring_models
from recurrent_bart.evaluation.model_scores import BertScore, Factuality
from scoring_models import TINY, VOCABULARY, classifier, save

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return scoring_models.encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def one_hot(tmp_path_factory):
    """Save a model whose embeddings of two different words have the cosine -1 / (19 - 1)."""
    model = BertModel(BertConfig(**TINY | {"hidden_size": 19, "num_attention_heads": 1}))
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
        model.embeddings.word_embeddings.weight.copy_(torch.eye(len(VOCABULARY), 19))
    return save(model, tmp_path_factory.mktemp("one_hot"))


def bertscore(path, text, *targets, layer=-1):
    return BertScore(path, layer, CPU)(text, targets, "")["bertscore"]


def test_f1_of_greedy_matches(one_hot):
    """One of the text's 2 words and one of the target's 4 words match; the remaining words match with -1 / 18."""
    other = -1 / 18
    precision, recall = (1 + other) / 2, (1 + 3 * other) / 4
    expected = 200 * precision * recall / (precision + recall)
    assert bertscore(one_hot, "a b", "a c d e", layer=0) == pytest.approx(expected)
    # The best of several targets counts.
    assert bertscore(one_hot, "a b", "a c d e", "b a", "", layer=0) == pytest.approx(100)


def test_the_last_layer_is_the_default_of_naive_code(encoder):
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():
        own, other = (model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0, 1:-1] for t in ("a b c", "c d"))
    cosines = [[float(torch.cosine_similarity(x, y, dim=0)) for y in other] for x in own]
    precision = sum(max(row) for row in cosines) / 3
    recall = sum(max(column) for column in zip(*cosines, strict=True)) / 2
    expected = 200 * precision * recall / (precision + recall)
    assert bertscore(encoder, "a b c", "c d") == pytest.approx(expected, rel=1e-4)
    assert bertscore(encoder, "a b c", "c d", layer=2) == pytest.approx(expected, rel=1e-4)
    assert bertscore(encoder, "a b c", "c d", layer=1) != pytest.approx(expected, rel=1e-3)


def test_a_text_longer_than_the_model_is_embedded_in_parts(one_hot):
    """The model has room for 14 words."""
    text = "a " * 20
    assert bertscore(one_hot, text + "b", "b", layer=0) == pytest.approx(200 * (1 - 20 / 18) / (22 - 20 / 18), rel=1e-4)


def test_texts_without_tokens(encoder):
    assert bertscore(encoder, "", "a") == 0
    assert bertscore(encoder, "a", "") is None


def test_the_encoder_of_an_encoder_decoder_model_is_used(tmp_path):
    config = BartConfig(
        vocab_size=len(VOCABULARY),
        d_model=16,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = save(BartModel(config), tmp_path)
    assert bertscore(path, "a b c", "a b c") == pytest.approx(100, rel=1e-4)
    with pytest.raises(ValueError, match="has the layers 0 to 1"):
        bertscore(path, "a", "a", layer=2)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there_is_named(encoder, layer):
    with pytest.raises(ValueError, match=rf"--bertscore_layer {layer}: .* has the layers 0 to 2; -1 is the last one"):
        BertScore(encoder, layer, CPU)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--bertscore_model .*: the model cannot be loaded"):
        BertScore(str(tmp_path), -1, CPU)
    with pytest.raises(ValueError, match=r"--factuality_model .*: the model cannot be loaded"):
        Factuality(str(tmp_path), CPU)


class WordsFound(torch.nn.Module):
    """Classifier that supports a sentence with the probability 0.9 if all its words are in the source, else 0.2."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def forward(self, input_ids, token_type_ids, attention_mask):
        supported = []
        for ids, types in zip(input_ids.tolist(), token_type_ids.tolist(), strict=True):
            source = [id for id, kind in zip(ids, types, strict=True) if not kind and id > 3]
            claim = {id for id, kind in zip(ids, types, strict=True) if kind and id > 3}
            self.sources.append("".join(VOCABULARY[id] for id in source))
            supported.append(0.9 if claim <= set(source) else 0.2)
        found = torch.tensor(supported)
        return SimpleNamespace(logits=torch.stack([1 - found, found], dim=1).log())


@pytest.fixture
def scorer(tmp_path):
    scorer = Factuality(classifier(tmp_path), CPU)
    scorer.model = WordsFound()
    return scorer


def test_factuality_is_the_mean_over_sentences_of_the_best_part_of_the_source(scorer):
    """The model reads 16 tokens, so that the source has two parts. No part has both a and l."""
    source = "a b c d. e f g h. i j k l."
    found = scorer("a b. k l. a l. b j.", [], source)["factuality"]
    assert set(scorer.model.sources) == {"abcd.efgh.", "ijkl."}
    assert found == pytest.approx(100 * (0.9 + 0.9 + 0.2 + 0.2) / 4)


def test_a_long_sentence_of_the_source_is_cut(scorer):
    assert scorer("l.", [], "a b c d e f g h i j k l.")["factuality"] == pytest.approx(90)
    assert "".join(dict.fromkeys(scorer.model.sources)) == "abcdefghijkl."


def test_a_text_without_sentences_has_no_factuality(scorer):
    assert scorer("", [], "a.")["factuality"] is None
    assert scorer("a.", [], "")["factuality"] == pytest.approx(20)


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["LABEL_0", "LABEL_1"], 1),
        (["CORRECT", "INCORRECT"], 0),
        (["Supported", "unsupported"], 0),
        (["contradiction", "neutral", "entailment"], 2),
    ],
)
def test_the_label_of_a_supported_sentence_is_found_by_its_name(tmp_path, names, label):
    path = classifier(tmp_path, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    scorer = Factuality(path, CPU)
    inputs = scorer.tokenizer("b c", "a", return_tensors="pt")
    with torch.no_grad():
        expected = scorer.model(**inputs).logits.softmax(dim=-1)[0, label]
    assert scorer("a", [], "b c")["factuality"] == pytest.approx(100 * float(expected), rel=1e-4)


def test_one_logit_is_the_logit_of_the_probability(tmp_path):
    scorer = Factuality(classifier(tmp_path, num_labels=1), CPU)
    with torch.no_grad():
        expected = scorer.model(**scorer.tokenizer("b c", "a", return_tensors="pt")).logits.sigmoid()
    assert scorer("a", [], "b c")["factuality"] == pytest.approx(100 * float(expected), rel=1e-4)


def test_two_labels_of_unknown_meaning_are_refused(tmp_path):
    names = ["yes", "no"]
    path = classifier(tmp_path, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    with pytest.raises(ValueError, match="the labels are yes, no; one of them must be supported, "):
        Factuality(path, CPU)


def test_a_model_without_a_label_for_support_is_refused(tmp_path):
    path = classifier(tmp_path, num_labels=3)
    with pytest.raises(ValueError, match="the labels are label_0, label_1, label_2; one of them must be supported, "):
        Factuality(path, CPU)


def test_a_model_without_a_trained_classifier_is_refused(encoder):
    with pytest.raises(ValueError, match=r"the model has no weights for classifier\.bias, classifier\.weight"):
        Factuality(encoder, CPU)
