"""ROUGE equals rouge-score on English and also counts scripts that rouge-score drops."""

import unicodedata

import pytest
from rouge_score import rouge_scorer

from recurrent_bart.data.word_segmenter import WordSegmenter
from recurrent_bart.evaluation.bootstrap import intervals
from recurrent_bart.evaluation.rouge import METRICS, RougeTokenizer, rouge_per_sample
from recurrent_bart.monitoring.fields import WORD_SCORES

PREDICTION = "The cats sat on a mat. It was raining, 3.5 mm fell! Nobody's umbrella helped."
REFERENCE = "A cat was sitting on the mat. Rain fell: 3 mm. No umbrella was of help?"


def rouge(predictions, references, documents=None):
    """Return the mean ROUGE of texts; without `documents`, each text is a separate document."""
    return intervals(rouge_per_sample(predictions, references), documents or range(len(references)))


def test_english_scores_equal_rouge_score():
    """Sentences are on separate lines, as rouge-score requires for Lsum."""
    scorer = rouge_scorer.RougeScorer(list(METRICS), use_stemmer=True)
    reference = "A cat was sitting on the mat.\nRain fell: 3 mm.\nNo umbrella was of help?"
    prediction = "The cats sat on a mat.\nIt was raining, 3.5 mm fell!\nNobody's umbrella helped."
    expected = scorer.score(reference, prediction)
    scores = rouge([PREDICTION], [REFERENCE])
    for name in METRICS:
        assert scores[name].mean == pytest.approx(100 * expected[name].fmeasure)
    assert scores["rougeLsum"].mean != scores["rougeL"].mean


def test_the_mean_over_documents_lies_in_its_interval():
    texts, references = ["a b c d", "x y", "q"], ["a b c d", "x z", "r"]
    score = rouge(texts, references)["rouge1"]
    assert score.mean == pytest.approx((100 + 50 + 0) / 3)
    assert 0 <= score.low < score.mean < score.high <= 100
    assert rouge(texts, references)["rouge1"] == score


def test_japanese_is_scored_by_character():
    scores = rouge(["東京は雨だ。寒い。"], ["東京は晴れだ。寒い。"])
    # Of 7 and 8 characters, 6 are common; of 6 and 7 bigrams, 東京 京は だ寒 寒い are common.
    assert scores["rouge1"].mean == pytest.approx(100 * 2 * 6 / (7 + 8))
    assert scores["rouge2"].mean == pytest.approx(100 * 2 * 4 / (6 + 7))
    assert scores["rougeL"].mean == pytest.approx(100 * 2 * 6 / (7 + 8))


def test_japanese_sentences_count_for_lsum():
    """The order of sentences changes the whole text's longest common subsequence, but not Lsum's matches."""
    scores = rouge(["寒い。雨だ。"], ["雨だ。寒い。"])
    assert scores["rougeLsum"].mean == pytest.approx(100)
    assert scores["rougeL"].mean == pytest.approx(50)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Running cats' snake_case", ["run", "cat", "snake", "case"]),
        ("Über die Brücke running", ["über", "die", "brücke", "run"]),
        ("日本語のtext 2本", ["日", "本", "語", "の", "text", "2", "本"]),
        ("ภาษา", ["ภ", "า", "ษ", "า"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("…—!?", []),
    ],
)
def test_words_of_many_scripts(text, words):
    assert RougeTokenizer().tokenize(text) == words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("कि", "की"), ("பு", "பி"), ("বি", "বু"), ("كَتَبَ", "كُتِبَ"), ("סֵפֶר", "סַפָּר"), ("រី", "រូ"), ("ที่", "ที")),
        *(("e\u0301", "e\u0300"), ("తి", "తు"), ("ກີ", "ກູ"), ("မီ", "မူ"), ("སི", "སུ"), ("ಕಿ", "ಕು"), ("සි", "සු")),
    ],
)
def test_two_different_words_score_0(one, other):
    assert {score.mean for score in rouge([one], [other]).values()} == {0}
    assert rouge([one], [one])["rouge1"].mean == 100


@pytest.mark.parametrize(
    "text",
    [
        "ﾃﾞｰﾀを読む。ＡＢＣ１２３！寒い？はい。",
        unicodedata.normalize("NFD", "Été à Noël. Việt Nam."),
        unicodedata.normalize("NFD", "한국어 문장이다. 둘째 문장."),
        "سَلَام عَلَيْكُم",
        "हिन्दी भाषा है। यह अच्छी है।",
        "ﬁnal co\u00adoperation, ½ of it.",
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_a_perfect_text_scores_100_in_every_unicode_form(text, form):
    """A tokenizer with normalisation decodes to another Unicode form than the reference has."""
    assert {score.mean for score in rouge([unicodedata.normalize(form, text)], [text]).values()} == {100}


def test_texts_of_one_document_are_resampled_together():
    texts, references = ["a b", "a x", "c d", "y z"], ["a b", "a b", "c d", "c d"]
    apart, together = (
        rouge(texts, references)["rouge1"],
        rouge(texts, references, ["one", "one", "two", "two"])["rouge1"],
    )
    assert apart.mean == together.mean == pytest.approx(62.5)
    # The documents score 75 and 50.
    assert (together.low, together.high) == pytest.approx((50, 75))
    assert apart.low < 50 < 75 < apart.high


def test_an_empty_prediction_scores_0():
    assert rouge([""], ["a b"])["rouge1"].mean == 0


def test_the_mean_of_text_scores_is_the_total_score():
    scores = rouge_per_sample(["a b", "c", ""], ["a b", "d", "e"])["rouge1"]
    assert scores.tolist() == [100.0, 0.0, 0.0]
    # rouge-score returns an integer if nothing matches.
    assert rouge_per_sample([""], ["a"])["rouge2"].dtype == float
    assert rouge(["a b", "c", ""], ["a b", "d", "e"])["rouge1"].mean == pytest.approx(scores.mean())


def test_missing_references_are_refused():
    with pytest.raises(ValueError, match="at least one reference text"):
        rouge([], [])
    with pytest.raises(ValueError, match="shorter"):
        rouge(["a", "b"], ["a"])


def test_the_best_reference_counts_for_each_score_by_itself():
    """The first reference has more common words, the second more common bigrams."""
    text, references = "a b c d", ["d c b a", "a b c x y z"]
    found = rouge_per_sample([text, text], [references, references[0]])
    assert found["rouge1"].tolist() == pytest.approx([100, 100])
    assert found["rouge2"].tolist() == pytest.approx([100 * 2 * 2 / (3 + 5), 0])


def test_japanese_words_and_characters_have_scores_of_their_own():
    """Two of four words are common, and five of six characters."""
    pytest.importorskip("fugashi")
    pytest.importorskip("unidic_lite")
    text, target = "京都の予算案", "東京都の予算"
    segment = WordSegmenter("mecab")
    assert [segment([line])[0] for line in (text, target)] == ["京都 の 予算 案", "東京 都 の 予算"]
    found = rouge_per_sample([text], [target], "mecab")
    assert found["rouge1"].tolist() == pytest.approx([100 * 5 / 6])
    assert found["rouge1_words"].tolist() == pytest.approx([50])
    # one of three bigrams
    assert found["rouge2_words"].tolist() == pytest.approx([100 / 3])
    assert found.keys() == {*METRICS, *WORD_SCORES}


def test_half_width_kana_have_the_words_of_full_width_kana():
    pytest.importorskip("fugashi")
    pytest.importorskip("unidic_lite")
    found = rouge_per_sample(["ﾊﾟｿｺﾝの予算、ＢＡＲＴ"], ["パソコンの予算、BARTs"], "mecab")
    assert found["rouge1_words"].tolist() == found["rouge1"].tolist() == [100.0]


def test_reordered_japanese_sentences_have_a_perfect_lsum():
    for mark in "。．！？":
        text, target = f"寒い{mark}雨だ{mark}晴れ{mark}", f"晴れ{mark}寒い{mark}雨だ{mark}"
        assert rouge_per_sample([text], [target])["rougeLsum"].tolist() == [100.0]


@pytest.mark.parametrize(
    ("text", "target"),
    [
        # words
        *(("a b c d e", "a b c d x"), ("а б в г д", "а б в г ж"), ("α β γ δ ε", "α β γ δ ζ")),
        *(("가 나 다 라 마", "가 나 다 라 바"), ("א ב ג ד ה", "א ב ג ד ו"), ("ا ب ت ث ج", "ا ب ت ث ح")),
        *(("क ख ग घ च", "क ख ग घ छ"), ("க ங ச ஞ ட", "க ங ச ஞ ண"), ("አ በ ገ ደ ሀ", "አ በ ገ ደ ወ")),
        *(("ა ბ გ დ ე", "ა ბ გ დ ვ"), ("ক খ গ ঘ ঙ", "ক খ গ ঘ চ"), ("ա բ գ դ ե", "ա բ գ դ զ")),
        # characters
        *(("中文摘要好", "中文摘要壞"), ("あいうえお", "あいうえか"), ("アイウエオ", "アイウエカ")),
        *(("กขคงจ", "กขคงฉ"), ("ກຂຄງຈ", "ກຂຄງສ"), ("កខគឃង", "កខគឃច"), ("ကခဂဃင", "ကခဂဃစ")),
    ],
)
def test_four_of_five_equal_words_or_characters_of_any_script_score_80(text, target):
    assert rouge_per_sample([text], [target])["rouge1"].tolist() == pytest.approx([80])
