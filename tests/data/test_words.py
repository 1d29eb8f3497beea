"""Words and sentences in all scripts and Unicode forms."""

import unicodedata
from collections import Counter

import pytest

from recurrent_bart.data.words import n_usual_words, normalise, sentences, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("Nobody's snake_case, 3.5", ["nobody", "s", "snake", "case", "3", "5"], id="Latin"),
        pytest.param("Tiếng Việt", ["tiếng", "việt"], id="Vietnamese"),
        pytest.param("Русский ЯЗЫК", ["русский", "язык"], id="Cyrillic"),
        pytest.param("Ελληνική γλώσσα", ["ελληνική", "γλώσσα"], id="Greek"),
        pytest.param("Հայերեն լեզու։", ["հայերեն", "լեզու"], id="Armenian"),
        pytest.param("ქართული ენა", ["ქართული", "ენა"], id="Georgian"),
        pytest.param("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"], id="Hebrew"),
        pytest.param("كَتَبَ وَلَدٌ؟", ["كَتَبَ", "وَلَدٌ"], id="Arabic"),
        pytest.param("می\u200cخواهم", ["میخواهم"], id="Persian"),
        pytest.param("हिन्दी की किताब।", ["हिन्दी", "की", "किताब"], id="Devanagari"),
        pytest.param("বাংলা ভাষা", ["বাংলা", "ভাষা"], id="Bengali"),
        pytest.param("ਪੰਜਾਬੀ ਬੋਲੀ", ["ਪੰਜਾਬੀ", "ਬੋਲੀ"], id="Gurmukhi"),
        pytest.param("ગુજરાતી ભાષા", ["ગુજરાતી", "ભાષા"], id="Gujarati"),
        pytest.param("தமிழ் மொழி", ["தமிழ்", "மொழி"], id="Tamil"),
        pytest.param("తెలుగు భాష", ["తెలుగు", "భాష"], id="Telugu"),
        pytest.param("ಕನ್ನಡ ಭಾಷೆ", ["ಕನ್ನಡ", "ಭಾಷೆ"], id="Kannada"),
        pytest.param("മലയാളം ഭാഷ", ["മലയാളം", "ഭാഷ"], id="Malayalam"),
        pytest.param("සිංහල භාෂාව", ["සිංහල", "භාෂාව"], id="Sinhala"),
        pytest.param("བོད་སྐད་ཡིན།", ["བོད", "སྐད", "ཡིན"], id="Tibetan"),
        pytest.param("አማርኛ ቋንቋ።", ["አማርኛ", "ቋንቋ"], id="Ethiopic"),
        pytest.param("한국어 문장", ["한국어", "문장"], id="Hangul"),
        pytest.param("ภาษาที่ดี", ["ภ", "า", "ษ", "า", "ที่", "ดี"], id="Thai"),
        pytest.param("ພາສາດີ", ["ພ", "າ", "ສ", "າ", "ດີ"], id="Lao"),
        pytest.param("ខ្មែរ។", ["ខ្មែ", "រ"], id="Khmer"),
        pytest.param("မြန်မာ ဗုဒ္ဓ", ["မြ", "န်", "မာ", "ဗု", "ဒ္ဓ"], id="Myanmar"),
        pytest.param("中文，𠮷野家", ["中", "文", "𠮷", "野", "家"], id="Han"),
        pytest.param("人々のデータ・2本", ["人", "々", "の", "デ", "ー", "タ", "2", "本"], id="Japanese"),
        pytest.param("๒๕๖๓ 2,000 ½", ["๒๕๖๓", "2", "000", "1", "2"], id="numbers"),
        pytest.param("❤️ … — !? \u0301", [], id="no words"),
    ],
)
def test_words_keep_their_marks_in_every_script(text, expected):
    assert words(text) == [unicodedata.normalize("NFKC", word) for word in expected]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("कि", "की"), ("பு", "பி"), ("বি", "বু"), ("ગિ", "ગુ"), ("ਪਿ", "ਪੁ"), ("తి", "తు"), ("മി", "മു"), ("සි", "සු")),
        *(("كَتَبَ", "كُتِبَ"), ("סֵפֶר", "סַפָּר"), ("ที่", "ที"), ("ກີ", "ກູ"), ("រី", "រូ"), ("မီ", "မူ"), ("e\u0301", "e\u0300")),
    ],
)
def test_words_with_different_marks_differ(one, other):
    assert words(one) != words(other)


@pytest.mark.parametrize(
    ("form", "usual"),
    [
        ("ＡＢＣ　１２３", "abc 123"),
        ("ｶﾞｷﾞｸﾞﾃﾞｰﾀ", "ガギグデータ"),
        ("e\u0301te\u0301", "été"),
        (unicodedata.normalize("NFD", "한국어"), "한국어"),
        (unicodedata.normalize("NFD", "Tiếng Việt"), "tiếng việt"),
        ("ﬁnal", "final"),
        ("STRASSE", "straße"),
        ("ΟΔΟΣ", "οδος"),
        ("co\u00adoperate", "cooperate"),
        ("葛\U000e0100", "葛"),
        ("ﷺ", "صلى الله عليه وسلم"),
    ],
)
def test_unicode_forms_of_one_text_have_the_same_words(form, usual):
    assert words(form) == words(usual) != []
    assert normalise(normalise(form)) == normalise(form) == normalise(usual)


def test_a_zero_width_space_separates_words():
    assert words("ab\u200bcd") == ["ab", "cd"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("寒い．雨だ．「そう。」と言った。", ["寒い．", "雨だ．", "「そう。」と言った。"]),
        ("議長（田中。）は『行く！』と。次", ["議長（田中。）は『行く！』と。", "次"]),
        ("「『行く。』か。」と。次。", ["「『行く。』か。」と。", "次。"]),
        ("彼は「行く。帰る。\n次」だ。", ["彼は「行く。", "帰る。", "次」だ。"]),
        ("中文。還有！真的？", ["中文。", "還有！", "真的？"]),
        ("Да. Нет! Как?", ["Да.", "Нет!", "Как?"]),
        ("Ναι. Όχι!", ["Ναι.", "Όχι!"]),
        ("네. 아니요! 왜?", ["네.", "아니요!", "왜?"]),
        ("نعم. لا! لماذا؟ هنا", ["نعم.", "لا!", "لماذا؟", "هنا"]),
        ("כן. לא! למה?", ["כן.", "לא!", "למה?"]),
        ("ใช่\nไม่", ["ใช่", "ไม่"]),
        ("ஆம். இல்லை!", ["ஆம்.", "இல்லை!"]),
        ("One is 3.5. Two? Three!\nFour", ["One is 3.5.", "Two?", "Three!", "Four"]),
        ("寒い。雨だ！？晴れ．次は3．5キロ", ["寒い。", "雨だ！？", "晴れ．", "次は3．5キロ"]),
        ("寒い｡雨だ!?晴れ.次は3.5キロ", ["寒い｡", "雨だ!?", "晴れ.", "次は3.5キロ"]),
        ("यह है। वह है।", ["यह है।", "वह है।"]),
        ("یہ ہے۔ وہ ہے؟ ہاں", ["یہ ہے۔", "وہ ہے؟", "ہاں"]),
        ("ይህ ነው። ያ ነው።", ["ይህ ነው።", "ያ ነው።"]),
        ("Սա է։ Նա է։", ["Սա է։", "Նա է։"]),
        ("នេះ។ នោះ។", ["នេះ។", "នោះ។"]),
        ("ဒါ။ ဟို။", ["ဒါ။", "ဟို။"]),
    ],
)
def test_sentences_end_by_the_rules_of_each_script(text, expected):
    assert sentences(text) == expected


def test_many_quotes_are_read_in_linear_time():
    text = "「寒い。" * 20_000 + "」" * 20_000
    assert sentences(text) == [text]
    assert len(sentences("（。" * 20_000)) == 20_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            ("one two three", 3),
            ("東京都に行く", 3),
            ("ภาษาที่ดีมาก", 3),
            ("한국어 문장", 2),
            ("BARTを使う", 2),
            ("हिन्दी की", 2),
        ),
        *(("", 0), ("ខ្មែរខ្មែ", 1), ("မြန်မာ", 1)),
    ],
)
def test_unspaced_scripts_have_several_characters_in_a_word(text, expected):
    assert n_usual_words(Counter(words(text))) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("「これは（例。」そう。次。", ["「これは（例。」そう。", "次。"]),
        ("「これは（例。）。」そう。次。", ["「これは（例。）。」そう。", "次。"]),
        ("）あ。「い", ["）あ。", "「い"]),
    ],
)
def test_a_bracket_that_nothing_closes_leaves_the_quote_around_it(text, expected):
    assert sentences(text) == expected
