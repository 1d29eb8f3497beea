"""bAbI documents have all facts in order between filler sentences, and the question at the end."""

import gzip
import json
import re

import pytest
import torch

from recurrent_bart.studies.tasks.babi import UNKNOWN, load_babi
from recurrent_bart.studies.tasks.memory_tasks import FIRST_SYMBOL

FACTS = ["Mary went to the garden.", "John took the milk.", "John went home."]
OTHER = "Well , one two . Three four five ! Six\nSeven eight nine ten eleven ."


def story(task="qa1", n_facts=3, query="Where is Mary?", answer="garden"):
    return {"task": task, "document": "\n".join(FACTS[:n_facts]), "query": query, "summary": answer}


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for name, records in splits.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return folder


@pytest.fixture
def facts(tmp_path):
    return write(tmp_path / "facts", train=[story(), story("qa2")], validation=[story(n_facts=2)])


@pytest.fixture
def filler(tmp_path):
    train = [{"document": OTHER * 9}, {"document": "Twelve ."}]
    return write(tmp_path / "filler", train=train, validation=[{"document": "One unheard two . " * 30}])


def draw(task, n_segments=4, segment_size=20, seed=0, batch_size=16):
    return task.batch(torch.Generator().manual_seed(seed), batch_size, n_segments, segment_size)


def in_words(task, ids):
    words = {number: word for word, number in task.vocabulary.ids.items()} | {UNKNOWN: "?unknown"}
    return " ".join(words[number] for number in ids.flatten().tolist())


@pytest.mark.parametrize("n_segments", [1, 4, 30])
def test_facts_stand_whole_and_in_order_before_the_question(facts, filler, n_segments):
    task = load_babi("qa1", facts, filler)["train"]
    input_ids, labels = draw(task, n_segments)
    assert input_ids.shape == (16, n_segments, 20)
    assert labels.shape == (16, task.target_length(n_segments)) == (16, 1)
    for document, answer in zip(input_ids, labels, strict=True):
        text = in_words(task, document)
        places = [
            text.index(fact)
            for fact in ("mary went to the garden .", "john took the milk .", "john went home .", "where is mary ?")
        ]
        assert places == sorted(places)
        assert text.endswith("where is mary ?")
        assert in_words(task, answer) == "garden"


def test_facts_come_between_sentences_and_anywhere(facts, filler):
    task = load_babi("qa1", facts, filler)["train"]
    texts = [in_words(task, document) for document in draw(task, n_segments=6, batch_size=64)[0]]
    before = {text.split("mary went")[0].split()[-1] for text in texts if not text.startswith("mary went")}
    # facts follow the end of a sentence or of a line
    assert before == {".", "!", "six"}
    first_segments = [text.split("mary went")[0].count(" ") // 20 for text in texts]
    assert set(first_segments) >= {0, 1, 2, 3}


def test_the_rest_of_a_document_is_a_passage_of_the_other_text(facts, filler):
    task = load_babi("qa1", facts, filler)["train"]
    whole = in_words(task, task.tables_on(torch.device("cpu")).filler)
    for document in draw(task)[0]:
        text = in_words(task, document).removesuffix("where is mary ?")
        for fact in ("mary went to the garden . ", "john took the milk . ", "john went home . "):
            text = text.replace(fact, "")
        # the filler is a ring
        assert text.strip() in f"{whole} {whole}"


def test_documents_follow_from_the_seed(facts, filler):
    task = load_babi("qa1", facts, filler)["train"]
    assert torch.equal(draw(task, seed=1)[0], draw(task, seed=1)[0])
    assert not torch.equal(draw(task, seed=1)[0], draw(task, seed=2)[0])
    assert len({tuple(row) for row in draw(task)[0].flatten(1).tolist()}) > 8


def test_validation_has_stories_and_text_of_its_own_in_the_words_of_training(facts, filler):
    splits = load_babi("qa1", facts, filler)
    validation = splits["validation"]
    assert validation.vocabulary is splits["train"].vocabulary
    text = in_words(validation, draw(validation)[0][0])
    assert "?unknown" in text
    assert "one ?unknown two" in text
    assert "john went home" not in text
    assert "unheard" not in validation.vocabulary.ids


def test_a_small_vocabulary_keeps_every_word_of_the_stories_and_the_frequent_ones(facts, filler):
    ids = load_babi("qa1", facts, filler, n_words=18)["train"].vocabulary.ids
    words = {"mary", "went", "to", "the", "garden", ".", "john", "took", "milk", "home", "where", "is", "?"}
    assert words < set(ids)
    assert len(ids) == 18
    assert "twelve" not in ids
    assert set(ids.values()) == set(range(FIRST_SYMBOL, FIRST_SYMBOL + 18))


def test_stories_that_are_too_long_are_not_drawn(tmp_path, filler):
    short, long = story(n_facts=1, answer="short"), story(n_facts=3, answer="long")
    task = load_babi("qa1", write(tmp_path / "f", train=[long, short], validation=[short]), filler)["train"]
    assert {in_words(task, answer) for answer in draw(task, 1, 12)[1]} == {"short"}
    assert {in_words(task, answer) for answer in draw(task, 1, 40)[1]} == {"short", "long"}
    with pytest.raises(ValueError, match="are too short: the shortest story"):
        draw(task, 1, 9)


def test_a_word_of_few_facts_is_told_from_none_of_many(tmp_path, filler):
    stories = [story(n_facts=1, query="Where?", answer="one"), story(n_facts=3, answer="three")]
    task = load_babi("qa1", write(tmp_path / "f", train=stories, validation=stories), filler)["train"]
    for document, answer in zip(*draw(task, batch_size=64), strict=True):
        text, is_short = in_words(task, document), in_words(task, answer) == "one"
        assert text.endswith("where ?" if is_short else "where is mary ?")
        assert "?unknown" not in text
        assert [text.count(f" {word} ") for word in ("milk", "home")] == ([0, 0] if is_short else [1, 1])
        assert f" {text}".count(" mary went to the garden . ") == 1


def test_files_are_read_once(facts, filler):
    assert load_babi("qa1", facts, filler) is load_babi("qa1", facts, filler)


def test_answers_of_several_words_are_padded(tmp_path, filler):
    stories = [story(answer="milk,apple"), story(answer="nothing")]
    task = load_babi("qa1", write(tmp_path / "f", train=stories, validation=stories), filler)["train"]
    answers = {tuple(row) for row in draw(task)[1].tolist()}
    ids = task.vocabulary.ids
    assert answers == {(ids["milk"], ids[","], ids["apple"]), (ids["nothing"], -100, -100)}
    assert task.answer_places(20) is None


def test_an_answer_of_one_word_is_asked_for_at_the_end_of_the_question(facts, filler):
    task = load_babi("qa1", facts, filler)["train"]
    asked = draw(task)[0][:, -1, task.answer_places(20)]
    assert (asked == task.vocabulary.ids["?"]).all()


def test_an_answer_can_begin_with_whom_its_facts_are_about(tmp_path, filler):
    asked = story("qa2", query="Where is the milk?", answer="home") | {"supporting_lines": [1, 2]}
    # the question names the subject
    known = story("qa2") | {"supporting_lines": [0]}
    folder = write(tmp_path / "f", train=[asked], validation=[known])
    tasks = load_babi("qa2", folder, filler, with_subjects=True)
    (answer,), (known,) = ({in_words(task, row) for row in draw(task)[1]} for task in tasks.values())
    assert (answer, known) == ("john home", "garden")
    places = tasks["train"].answer_places(20)
    assert {in_words(tasks["train"], row) for row in draw(tasks["train"])[0][:, -1, places]} == {"milk ?"}


def test_words_of_a_group_change_places_in_documents_to_train_on(tmp_path, filler):
    stories = [story(answer="garden"), story(n_facts=1, answer="milk,garden")]
    folder = write(tmp_path / "f", train=stories, validation=stories)
    tasks = load_babi("qa1", folder, filler, renamed=(("mary", "john", "nobody"), ("garden", "milk")))
    for name, task in tasks.items():
        seen = set()
        for document, answer in zip(*draw(task, batch_size=64), strict=True):
            text = in_words(task, document)
            went, where = re.search(r"(mary|john) went to the (garden|milk) \.", text).groups()
            other = {"mary": "john", "john": "mary", "garden": "milk", "milk": "garden"}
            assert text.endswith(f"where is {went} ?")
            assert other[went] not in text or f"{other[went]} took the {other[where]} ." in text
            assert in_words(task, answer[answer >= 0]) in (where, f"{other[where]} , {where}")
            seen.add((went, where))
        assert seen == (
            {(a, b) for a in ("mary", "john") for b in ("garden", "milk")} if name == "train" else {("mary", "garden")}
        )


def test_what_is_missing_is_named(tmp_path, facts, filler):
    with pytest.raises(ValueError, match="no record of task 'qa7'"):
        load_babi("qa7", facts, filler)
    with pytest.raises(ValueError, match=r"train\.jsonl and train\.jsonl\.gz are missing"):
        load_babi("qa1", tmp_path, filler)
    empty = write(tmp_path / "empty", train=[{"document": " "}], validation=[{"document": ""}])
    with pytest.raises(ValueError, match="no text"):
        load_babi("qa1", facts, empty)
