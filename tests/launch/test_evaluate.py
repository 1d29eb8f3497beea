"""`launch/evaluate.py` returns the evaluator's metrics on the documents of the model's run."""

import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from transformers import MBartTokenizer

import scoring_models
from forked import launched, run_script
from launching import load_script
from recurrent_bart.data.sources import find_sources
from recurrent_bart.evaluation.evaluator import Evaluator, Generation
from recurrent_bart.evaluation.model_scores import load_scorers
from recurrent_bart.evaluation.predictions import read_predictions
from recurrent_bart.evaluation.results import summarize_predictions
from recurrent_bart.evaluation.scoring import score_samples
from recurrent_bart.inference.stream_reader import load_model
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.data_arguments import DataArguments
from recurrent_bart.training.preparation import open_documents
from runs import flags, write_documents, write_run_with_model
from tiny import multilingual_tokenizer

SCRIPT = "launch/evaluate.py"


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate")


@pytest.fixture
def evaluate(script, capsys):
    """Return a function that runs the script in this process and returns its exit code and its output."""
    return lambda *flags: (script.main(list(map(str, flags))), "".join(capsys.readouterr()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train a run on the sections of short documents."""
    documents = write_documents(tmp_path_factory.mktemp("documents"))
    texts = documents.joinpath("train.jsonl").read_text().splitlines()
    arguments = asdict(parse_arguments(flags(documents, documents / "run", task="sections")))
    return write_run_with_model(documents / "run", texts, arguments, max_n_segments=3)


def evaluated(folder, n_documents, max_n_segments, num_beams):
    """Return the metrics of a direct call of the evaluator."""
    device = torch.device("cpu")
    model, tokenizer = load_model(str(folder.model), device, torch.float32)
    data = parse_arguments(["--resume", str(folder.path)]).data
    source = find_sources(data.dataset, data.train_file, data.validation_file)["validation"]
    documents = open_documents(source, data, model.config, tokenizer, max_n_segments)
    plan = documents.plan
    plan.indices, plan.n_segments = plan.indices[:n_documents], plan.n_segments[:n_documents]
    evaluator = Evaluator(documents.corpus, plan, documents.collator, tokenizer, 2, device)
    samples = evaluator.summarise(model, Generation(data.max_target_length, num_beams))
    predictions = score_samples(evaluator, samples)
    expected = asdict(summarize_predictions(evaluator.n_documents, evaluator.loss(model), predictions))
    return expected | {"loss": pytest.approx(expected["loss"], rel=1e-5)}


@pytest.mark.slow
def test_figures_are_the_evaluators_on_the_documents_of_the_run(folder, tmp_path, evaluate):
    # Whole documents are read, although training used 3 segments per document.
    flags = ["--limit", 3, "--num_beams", 2]
    code, printed = evaluate("--model", folder.model, "--json", tmp_path / "figures.json", *flags)
    assert code == 0, printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == evaluated(folder, n_documents=3, max_n_segments=-1, num_beams=2)
    assert figures["n_texts"] > figures["n_documents"] == 3
    shown = dict(re.findall(r"^(\w+) +([\d.]+)", printed, flags=re.MULTILINE))
    assert shown["documents"] == "3"
    assert shown["loss"] == f"{figures['loss']:.4f}"
    assert {"rouge1", "rouge2", "rougeL", "rougeLsum"} < set(shown)
    assert re.search(r"^rougeL +[\d.]+ \[[\d.]+, [\d.]+\] +ROUGE-L: F-measure of ", printed, flags=re.MULTILINE)
    assert re.search(r"^quarter 1 of the sections: \d+ texts of 3 documents, rouge1 ", printed, flags=re.MULTILINE)
    assert len(figures["shares_by_tenth"]["target"]) == 10


@pytest.mark.slow
def test_predictions_stand_beside_the_results(folder, tmp_path, evaluate):
    flags = ["--model", folder.model, "--json", tmp_path / "ours.json", "--limit", 2]
    code, printed = evaluate(*flags)
    assert code == 0, printed
    results = json.loads((tmp_path / "ours.json").read_text())
    predictions = read_predictions(tmp_path / "ours.predictions.jsonl")
    assert len(predictions) == results["n_texts"]
    rouge1 = sum(prediction.scores["rouge1"] for prediction in predictions) / len(predictions)
    assert rouge1 == pytest.approx(results["scores"]["rouge1"]["mean"])
    assert {prediction.source for prediction in predictions} == {None}
    # a name with a dot keeps its dot
    code, printed = evaluate(*flags, "--with_source", "--json", tmp_path / "ours.beams")
    assert code == 0, printed
    assert read_predictions(tmp_path / "ours.predictions.jsonl") == predictions
    sources = {
        prediction.id: prediction.source for prediction in read_predictions(tmp_path / "ours.beams.predictions.jsonl")
    }
    documents = folder.path.parent.joinpath("validation.jsonl").read_text().splitlines()
    for record in map(json.loads, documents[:2]):
        for number, section in enumerate(record["sections"]):
            assert sources[f"{record['id']}[{number}]"] == section


def test_models_that_are_given_score_the_texts(folder, tmp_path, evaluate):
    encoder = scoring_models.encoder(tmp_path / "encoder")
    flags = ["--bertscore_model", encoder, "--bertscore_layer", 1, "--limit", 2, "--json", tmp_path / "ours.json"]
    classifier = scoring_models.classifier(tmp_path / "classifier")
    code, printed = evaluate("--model", folder.model, *flags, "--factuality_model", classifier, "--with_source")
    assert code == 0, printed
    scorers = load_scorers(encoder, 1, classifier, torch.device("cpu"))
    for prediction in read_predictions(tmp_path / "ours.predictions.jsonl"):
        for scorer in scorers:
            expected = scorer(prediction.text, prediction.targets, prediction.source)
            assert {name: prediction.scores[name] for name in expected} == pytest.approx(expected)
    assert re.search(r"^bertscore +[\d.]+ \[.*BERTScore: F1 of contextual embeddings", printed, flags=re.MULTILINE)
    assert re.search(r"^factuality +[\d.]+ \[", printed, flags=re.MULTILINE)


def test_an_unusable_scorer_is_named_before_texts_are_generated(folder, tmp_path, evaluate):
    code, printed = evaluate("--model", folder.model, "--factuality_model", tmp_path)
    assert code == 2
    assert f"error: --factuality_model {tmp_path}: the model cannot be loaded (" in printed
    assert "generation" not in printed


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_documents_and_print_once(folder, tmp_path):
    flags = ["--model", folder.model, "--json", tmp_path / "figures.json"]
    ended = run_script(SCRIPT, *flags, environments=launched(2))
    assert ended.codes == [0, 0], ended.text()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == evaluated(folder, n_documents=5, max_n_segments=-1, num_beams=1)
    assert ended.text().count("rougeLsum") == 1


def test_every_cut_is_said(folder, tmp_path, evaluate):
    flags = ["--model", folder.model, "--json", tmp_path / "figures.json", "--max_n_segments", 2]
    code, printed = evaluate(*flags, "--max_target_length", 5)
    assert code == 0, printed
    lines = re.findall(r"^cut +(\d+) of (\d+) \([\d.]+ %\) validation (\w+) .*\((--\w+)\)", printed, flags=re.MULTILINE)
    assert [line[2:] for line in lines] == [
        ("documents", "--max_n_segments"),
        ("targets", "--max_n_segments"),
        ("targets", "--max_target_length"),
    ]
    # Only targets before the cut are scored.
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["n_texts"] == int(lines[1][1]) - int(lines[1][0]) == int(lines[2][1])


def test_an_older_run_is_evaluated_on_the_documents_that_it_held_out(script, tmp_path):
    run = RunFolder(tmp_path)
    run.write_config(arguments={"data": {"dataset": "x.jsonl"}})
    assert script.parse_arguments(["--model", str(run.model)])[1].held_out_by == "line"
    run.write_config(arguments={"data": {"dataset": "x.jsonl", "held_out_by": "content"}})
    assert script.parse_arguments(["--model", str(run.model)])[1].held_out_by == "content"


def test_data_flags_are_those_of_the_run_unless_given(script, folder):
    arguments, data = script.parse_arguments(["--model", str(folder.model), "--max_target_length", "10"])
    assert arguments.split == "validation"
    assert (data.task, data.max_target_length) == ("sections", 10)
    assert data.train_file.endswith("train.jsonl")


def test_a_data_set_that_is_given_takes_the_place_of_the_runs_files(script, folder):
    _, data = script.parse_arguments(["--model", str(folder.model), "--dataset", "stdlib"])
    assert (data.dataset, data.train_file, data.validation_file) == ("stdlib", None, None)
    assert data.task == "sections"
    _, data = script.parse_arguments(["--model", str(folder.model), "--test_file", "other.jsonl"])
    assert (data.train_file, data.validation_file, data.test_file) == (None, None, "other.jsonl")


def test_a_data_set_that_is_given_does_not_get_the_configuration_of_the_runs(script, tmp_path):
    run = RunFolder(tmp_path)
    run.write_config(arguments={"data": {"dataset": "owner/name", "dataset_config_name": "long"}})
    places = []
    for given in ([], ["--dataset", "other/name"], ["--dataset_config_name", "short"]):
        _, data = script.parse_arguments(["--model", str(run.model), *given])
        places.append((data.dataset, data.dataset_config_name))
    assert places == [("owner/name", "long"), ("other/name", None), ("owner/name", "short")]


@pytest.mark.parametrize("name", ["dataset", "train_file", "validation_file", "test_file"])
@pytest.mark.parametrize("spell", [lambda flag: flag, lambda flag: flag.replace("_", "-")], ids=["_", "-"])
@pytest.mark.parametrize("separator", [" ", "="])
def test_so_it_does_in_each_spelling_of_each_flag(script, folder, name, spell, separator):
    given = f"{spell(f'--{name}')}{separator}other.jsonl".split(" ")
    _, data = script.parse_arguments(["--model", str(folder.model), *given])
    found = {place: getattr(data, place) for place in ("dataset", "train_file", "validation_file", "test_file")}
    nothing = {"dataset": "stdlib", "train_file": None, "validation_file": None, "test_file": None}
    assert found == nothing | {name: "other.jsonl"}
    assert data.task == "sections"


def test_a_model_of_no_run_has_the_flags_of_the_default_corpus(script, tmp_path):
    _, data = script.parse_arguments(["--model", str(tmp_path)])
    assert (data.dataset, data.task) == ("stdlib", "document")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "dev"], "--split dev: allowed are train, validation, test"),
        (["--limit", "0"], "--limit 0: must be at least 1, or -1 for all"),
        (["--num_beams", "0"], "--num_beams 0: must be at least 1"),
        (["--with_source"], "--with_source: give --json FILE too, beside which the predictions are written"),
        (["--json", "."], "--json .: is a folder; give the name of a file"),
        (["--bertscore_layer", "2"], "--bertscore_layer 2: give --bertscore_model too"),
        (["--json", "missing/figures.json"], "--json missing/figures.json: the folder missing does not exist"),
    ],
)
def test_a_flag_out_of_range_is_named_in_one_line(flags, message, script, folder, capsys):
    assert script.main(["--model", str(folder.model), *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_another_language_than_the_models_is_refused(script):
    tokenizer = multilingual_tokenizer(MBartTokenizer, src_lang="en_XX", tgt_lang="de_DE")
    script.check_languages(DataArguments(source_lang="en_XX", target_lang="de_DE"), tokenizer)
    with pytest.raises(ValueError, match="--target_lang ja_XX: must be de_DE, the language that the model was trained"):
        script.check_languages(DataArguments(target_lang="ja_XX"), tokenizer)


def test_a_split_that_is_not_there_is_named_in_one_line(folder, evaluate):
    code, printed = evaluate("--model", folder.model, "--split", "test")
    assert code == 2
    assert "error: --split test: the data set has the splits train, validation\n" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_settings_of_generation_are_told_and_can_be_changed(folder, tmp_path, evaluate):
    model = shutil.copytree(folder.model, tmp_path / "run" / "model")
    shutil.copy(folder.config_file, tmp_path / "run")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"min_length": 60}))
    flags = ["--model", model, "--limit", 2, "--max_target_length", 1200]
    code, printed = evaluate(*flags)
    assert code == 0, printed
    assert "warning: --max_target_length 1200: targets and generated texts end after 64 tokens" in printed
    assert "generation up to 64 tokens; greedy; min_length 60" in printed
    assert "of the targets cannot be generated with the model's setting min_length 60" in printed
    code, printed = evaluate(*flags, "--min_new_tokens", 0)
    assert code == 0, printed
    assert "cannot be generated" not in printed
    assert "min_length" not in printed


def test_the_folder_of_a_run_is_no_model(script, folder, capsys):
    assert script.main(["--model", str(folder.path)]) == 2
    assert "this is the folder of a run; give the model of the run, " in capsys.readouterr().err


def test_the_seed_is_set_before_texts_are_drawn(folder, script, evaluate, monkeypatch):
    seeds, summarise = [], Evaluator.summarise
    watched = lambda *inputs: seeds.append(torch.initial_seed()) or summarise(*inputs)  # noqa: E731
    monkeypatch.setattr(Evaluator, "summarise", watched)
    code, printed = evaluate("--model", folder.model, "--do_sample", "--seed", 7, "--limit", 1)
    assert code == 0, printed
    assert seeds == [7]
    assert "; sampling" in printed
