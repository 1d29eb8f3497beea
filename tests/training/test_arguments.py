"""Command-line arguments: a run gets the given values, and errors name the wrong flag."""

from dataclasses import asdict, fields

import pytest

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.arguments import build_parser, parse_arguments
from recurrent_bart.training.data_arguments import DataArguments
from recurrent_bart.training.model_arguments import ModelArguments
from recurrent_bart.training.resumed_flags import changed_flags, describe_changes, remeasured
from recurrent_bart.training.run_arguments import RunArguments
from recurrent_bart.training.tracking_arguments import TrackingArguments

GROUPS = (ModelArguments, DataArguments, RunArguments)


def save_run(path, argv):
    """Write the folder of a run that was started with the given flags."""
    folder = RunFolder(path)
    folder.create()
    folder.write_config(arguments=asdict(parse_arguments(argv)))
    return str(path)


def test_every_flag_has_a_line_of_help():
    for group in GROUPS:
        for item in fields(group):
            assert item.metadata.get("help"), item.name


def test_help_names_every_flag():
    text = build_parser().format_help()
    for group in GROUPS:
        for item in fields(group):
            assert f"--{item.name}" in text


def test_help_ends_without_an_error(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    assert "--segment_size" in capsys.readouterr().out


def test_flags_reach_their_group():
    arguments = parse_arguments(
        ["--segment_size", "64", "--prefix_projection", "false", "--task", "sections", "--max_steps=7"]
    )
    assert arguments.model.config_fields() == {"segment_size": 64, "prefix_projection": False, "max_n_segments": 8}
    assert (arguments.data.task, arguments.run.max_steps) == ("sections", 7)


def test_architecture_flags_are_fields_of_the_configuration():
    own = {"model_name_or_path", "model_size", "tokenizer_name", "trust_remote_code", "vocab_size"}
    own |= {"train", "lora_r", "lora_alpha"}
    names = {item.name for item in fields(ModelArguments)} - own
    assert names <= set(RecurrentBartConfig.__dataclass_fields__)
    assert {"pre_seq_len", "segment_size", "input_size", "max_n_segments", "bptt_depth"} <= names
    assert {"prefix_projection", "prefix_hidden_size", "hidden_dropout_prob"} <= names


def test_the_schedule_is_the_architectures_and_not_the_learning_rates():
    arguments = parse_arguments(["--schedule", "sequential", "--lr_scheduler", "cosine"])
    assert arguments.model.config_fields()["schedule"] == "sequential"
    assert arguments.run.lr_scheduler == "cosine"


def test_the_learning_rate_schedule_may_be_named_as_by_hugging_face():
    assert parse_arguments(["--lr_scheduler_type", "inverse_sqrt"]).run.lr_scheduler == "inverse_sqrt"


def test_columns_have_the_names_that_were_given():
    data = parse_arguments(["--text_column", "article", "--summaries_column", "heads"]).data
    assert vars(data.columns()) == {
        "text": "article",
        "summary": "summary",
        "sections": "sections",
        "summaries": "heads",
        "group": None,
        "references": None,
        "query": None,
    }
    assert parse_arguments(["--references_column", "more"]).data.columns().references == "more"


def test_the_launchers_own_flag_is_taken():
    assert parse_arguments(["--local_rank=1", "--deepspeed", "ds.json"]).run.deepspeed == "ds.json"


@pytest.mark.parametrize(
    ("argv", "max_steps", "steps"),
    [
        ([], 59, 5),
        ([], 5, 0),
        (["--warmup_steps", "9"], 50, 9),
        (["--warmup_ratio", "0.25"], 50, 13),
        (["--warmup_ratio", "0"], 50, 0),
        (["--warmup_ratio", "1"], 50, 50),
    ],
)
def test_warm_up_is_a_tenth_of_the_run_unless_given(argv, max_steps, steps):
    assert parse_arguments(argv).run.of_length(max_steps).warmup_steps == steps


@pytest.mark.parametrize(
    ("argv", "max_steps", "steps"), [([], 50, 25), ([], 9000, 900), (["--eval_every", "7"], 9000, 7)]
)
def test_evaluations_are_a_tenth_of_the_run_apart_unless_told(argv, max_steps, steps):
    assert parse_arguments(argv).run.of_length(max_steps).eval_every == steps


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--max_steps 0", "--max_steps 0: must be at least 1"),
        ("--max_steps -2", "--max_steps -2: must be at least 1"),
        ("--num_train_epochs 0", "--num_train_epochs 0.0: must be above 0"),
        ("--num_train_epochs nan", "--num_train_epochs nan: must be a finite number"),
        ("--num_train_epochs inf", "--num_train_epochs inf: must be a finite number"),
        ("--max_steps 9 --num_train_epochs 2", "--max_steps 9 and --num_train_epochs 2.0: give only one"),
        ("--warmup_steps 9 --warmup_ratio 0.5", "--warmup_steps 9 and --warmup_ratio 0.5: give only one"),
        ("--warmup_ratio 1.5", "--warmup_ratio 1.5: must be at most 1"),
        ("--warmup_ratio nan", "--warmup_ratio nan: must be a finite number"),
        ("--log_every -1", "--log_every -1: must be at least 1"),
        ("--tokens_per_batch 0", "--tokens_per_batch 0: must be at least 1"),
        ("--max_train_documents 0", "--max_train_documents 0: must be at least 1"),
        ("--max_eval_samples -1", "--max_eval_documents -1: must be at least 1"),
        ("--keep_last 1", "--keep_last 1: must be at least 2"),
        ("--learning_rate -1", "--learning_rate -1.0: must be at least 0"),
        ("--learning_rate nan", "--learning_rate nan: must be a finite number"),
        ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0: must be at least 1"),
        ("--warmup_steps 11 --max_steps 10", "--warmup_steps 11: must be at most --max_steps 10"),
        ("--dropout 1", "--dropout 1.0: must be below 1"),
        ("--adam_beta2 1", "--adam_beta2 1.0: must be below 1"),
        ("--label_smoothing_factor 1", "--label_smoothing_factor 1.0: must be below 1"),
        (
            "--label_smoothing_factor 0.1 --curriculum 1,2 --curriculum_loss 0.5",
            "--curriculum_loss: is compared with the smoothed loss, which has a high floor; use --curriculum_steps",
        ),
        (
            "--gap_sentences 1 --max_train_documents 5",
            "--max_train_documents and --gap_sentences: give only one of the two flags",
        ),
        ("--adam_beta2 -1", "--adam_beta2 -1.0: must be at least 0"),
        ("--max_target_length 3", "--max_target_length 3: must be at least 4"),
        ("--task chapters", "--task chapters: allowed are document, sections"),
        ("--precision fp16", "--precision fp16: allowed are auto, bf16, fp32"),
        ("--lr_scheduler step", "--lr_scheduler step: allowed are linear, cosine, constant"),
        ("--max_steps ten", "argument --max_steps/--max-steps: invalid int value: 'ten'"),
        ("--max_steps", "argument --max_steps/--max-steps: expected one argument"),
        ("--segmentsize 3", "unknown argument --segmentsize; did you mean --segment_size?"),
        ("--segmentsize=3", "unknown argument --segmentsize=3; did you mean --segment_size?"),
        ("--zzz", "unknown argument --zzz$"),
        ("stray", "unknown argument stray$"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(argv, message, capsys):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
        parse_arguments(argv.split())
    assert "\n" not in str(caught.value)
    # nothing is printed here: the launch script prints the error once
    assert capsys.readouterr() == ("", "")


FLAGS = {item.name: item for group in (*GROUPS, TrackingArguments) for item in fields(group)}
NUMBERS = [name for name, item in FLAGS.items() if "float" in str(item.type)]
NAMES = [name for name, item in FLAGS.items() if "str" in str(item.type) and name not in ("wandb_tags", "resume")]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_refused(name, value):
    assert {"learning_rate", "matrix_gate_init", "hidden_dropout_prob", "curriculum_loss", "top_p"} <= set(NUMBERS)
    with pytest.raises(ValueError, match=f"^--{name} {value}: must be a finite number$"):
        parse_arguments([f"--{name}={value}"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_name_is_refused(name, value):
    assert {"train_file", "dataset", "group_column", "text_column", "output_dir", "wandb_group"} <= set(NAMES)
    with pytest.raises(ValueError, match=f"^--{name} '{value}': must not be empty$"):
        parse_arguments([f"--{name}={value}"])


@pytest.mark.parametrize("flag", ["--validation_share 0.2", "--group_column day"])
def test_flags_without_use_beside_held_out_by_line_are_refused(flag):
    with pytest.raises(ValueError, match=f"^{flag.split()[0]}: has no use with --held_out_by line"):
        parse_arguments([*flag.split(), "--held_out_by", "line"])
    assert parse_arguments(["--held_out_by", "line", "--validation_share", "0.1"]).data.held_out_by == "line"


@pytest.mark.parametrize(
    "flag", ["--validation_share 0.2", "--group_column day", "--held_out_by line", "--skip_bad_samples true"]
)
def test_a_resumed_run_keeps_the_flags_that_choose_its_documents(tmp_path, flag):
    run = save_run(tmp_path / "run", [])
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=f"^{flag.replace(' true', ' True')}: the run was started with"):
        parse_arguments(["--resume", run, *flag.split()])
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_resumed_run_has_the_flags_that_it_had(tmp_path):
    given = ["--segment_size", "64", "--task", "sections", "--learning_rate", "0.5", "--prefix_projection", "false"]
    first = parse_arguments(given)
    path = save_run(tmp_path / "run", given)
    resumed = parse_arguments(["--resume", path])
    assert resumed.run.output_dir == resumed.run.resume == path
    resumed.run.output_dir = resumed.run.resume = None
    assert resumed == first


def test_flags_given_on_resuming_take_precedence(tmp_path):
    path = save_run(tmp_path / "run", ["--max_steps", "10", "--seed", "3"])
    resumed = parse_arguments([f"--resume={path}", "--max_steps", "20"])
    assert (resumed.run.max_steps, resumed.run.seed) == (20, 3)


@pytest.fixture
def run(tmp_path):
    """Write the folder of a run on two files, with its resolved configuration."""
    for name in ("train.jsonl", "other.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text("")
    given = ["--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "validation.jsonl"]
    arguments = parse_arguments([*map(str, given), "--max_steps", "50", "--pre_seq_len", "3"])
    folder = RunFolder(tmp_path / "run")
    folder.create()
    model = RecurrentBartConfig(**arguments.model.config_fields())
    resolved = {"max_steps": 50, "num_train_epochs": 2.5, "warmup_steps": 5, "eval_every": 25}
    folder.write_config(arguments=asdict(arguments), model=model.to_dict(), resolved=resolved)
    return folder


@pytest.mark.parametrize(
    ("flag", "value", "was"),
    [
        ("recurrence", "top", "with layerwise"),
        ("pre_seq_len", "4", "with 3"),
        ("prefix_attention", "gated", "with concat"),
        ("model_size", "small", "with tiny"),
        ("model_name_or_path", "facebook/bart-base", "without this flag"),
        ("tokenizer_name", "facebook/bart-base", "without this flag"),
        ("vocab_size", "99", "with 4096"),
        ("train", "prefix", "with all"),
        ("lora_r", "8", "with 0"),
        ("matrix_gate_init", "1", "with 0"),
        ("task", "sections", "with document"),
        ("text_column", "body", "with document"),
        ("gap_sentences", "2", "with 0"),
        ("max_train_documents", "7", "without this flag"),
        ("max_eval_documents", "7", "without this flag"),
        ("dataset", "qmsum", "with stdlib"),
        ("train_file", "{folder}/other.jsonl", "with {folder}/train.jsonl"),
        ("validation_file", "{folder}/other.jsonl", "with {folder}/validation.jsonl"),
    ],
)
def test_a_flag_that_a_resumed_run_cannot_take_over_is_refused_by_name(run, tmp_path, flag, value, was):
    value, was = (text.format(folder=tmp_path) for text in (value, was))
    before = run.config_file.read_bytes()
    with pytest.raises(
        ValueError, match=f"--{flag} {value}.*: the run was started {was}.*, and a resumed run cannot change this flag"
    ):
        parse_arguments(["--resume", str(run.path), f"--{flag}", value])
    assert [path.name for path in run.path.iterdir()] == ["config.json"]
    assert run.config_file.read_bytes() == before


def test_a_flag_that_is_given_again_as_it_was_changes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to("train.jsonl")
    # the first three equal the resolved defaults; the last is another path of the same file
    given = ["--recurrence", "layerwise", "--prefix_attention", "concat", "--warmup_steps", "5", "--eval_every", "25"]
    resumed = parse_arguments(["--resume", str(run.path), *given, "--train_file", "link.jsonl"])
    assert changed_flags(asdict(resumed), run.read_config()) == {}


def test_flags_that_hold_are_told_and_those_that_change_what_is_validated_too(run):
    given = ["--max_steps", "80", "--weight_decay", "0", "--max_target_length", "64"]
    resumed = parse_arguments(["--resume", str(run.path), *given])
    changes = changed_flags(asdict(resumed), run.read_config())
    assert changes == {"max_steps": (50, 80), "weight_decay": (0.01, 0.0), "max_target_length": (128, 64)}
    told, warning = describe_changes(changes)
    assert "--max_steps 80 (before: 50)" in told
    assert warning.startswith("warning: --max_target_length changes what the validation loss measures")
    assert describe_changes({"max_steps": (50, 80)}) == ["changed    --max_steps 80 (before: 50)"]
    assert describe_changes({}) == []


def test_flags_that_change_what_the_metric_of_the_best_model_measures_are_told():
    changes = {"num_beams": (4, 1), "eval_documents": (32, 200)}
    assert len(describe_changes(changes)) == 1
    warning = describe_changes(changes, "rouge2")[1]
    assert warning.startswith("warning: --num_beams, --eval_documents changes what rouge2 measures, so earlier values")
    assert remeasured(changes, "loss") == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("output_dir", "elsewhere"), ("resume", "elsewhere"), ("local_rank", 3), ("trust_checkpoint", True)],
)
def test_flags_of_the_current_start_are_not_told_as_changes(run, name, value):
    given = asdict(parse_arguments(["--resume", str(run.path)]))
    assert given["run"][name] != value
    given["run"] |= {name: value, "log_every": 7}
    assert changed_flags(given, run.read_config()) == {"log_every": (10, 7)}


def test_documents_that_have_moved_may_be_named_by_their_new_place(run, tmp_path):
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    resumed = parse_arguments(["--resume", str(run.path), "--train_file", str(tmp_path / "moved.jsonl")])
    assert resumed.data.train_file == str(tmp_path / "moved.jsonl")


def test_a_run_that_is_made_shorter_warms_up_in_the_steps_that_it_has(tmp_path):
    path = save_run(tmp_path / "run", ["--max_steps", "50", "--warmup_steps", "5"])
    resumed = parse_arguments(["--resume", path, "--max_steps", "3"])
    assert (resumed.run.max_steps, resumed.run.warmup_steps) == (3, 3)
    assert parse_arguments(["--resume", path, "--max_steps", "80"]).run.warmup_steps == 5
    with pytest.raises(ValueError, match="--warmup_steps 4: must be at most --max_steps 3"):
        parse_arguments(["--resume", path, "--max_steps", "3", "--warmup_steps", "4"])


def test_a_resumed_run_derives_again_what_follows_from_its_length(run):
    longer = parse_arguments(["--resume", str(run.path), "--max_steps", "9000"]).run.of_length(9000)
    assert (longer.warmup_steps, longer.eval_every) == (900, 900)


@pytest.mark.parametrize(
    ("had", "given", "told"),
    [
        (["--max_steps", "50"], ["--num_train_epochs", "3"], "--num_train_epochs 3.0 (before: 2.5)"),
        (["--num_train_epochs", "2.5"], ["--max_steps", "60"], "--max_steps 60 (before: 50)"),
        ([], ["--max_steps", "60"], "--max_steps 60 (before: 50)"),
        (["--warmup_steps", "9"], ["--warmup_ratio", "0.5"], "--warmup_ratio 0.5 (before: None)"),
    ],
)
def test_a_flag_that_is_given_on_resuming_replaces_its_alternative(run, had, given, told):
    config = run.read_config() | {"arguments": asdict(parse_arguments(had))}
    run.write_config(**config)
    resumed = parse_arguments(["--resume", str(run.path), *given])
    assert describe_changes(changed_flags(asdict(resumed), config)) == [f"changed    {told}"]


def test_paths_hold_from_every_folder_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("papers", "bart", "home/texts"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "zero.json").write_text("{}")
    path = save_run(
        tmp_path / "run",
        [
            *("--dataset", "papers", "--model_name_or_path", "./bart", "--tokenizer_name", "facebook/bart-base"),
            *("--validation_file", "~/texts", "--deepspeed", "zero.json", "--cache_dir", "cache"),
        ],
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = parse_arguments(["--resume", path])
    assert resumed.data.dataset == str(tmp_path / "papers")
    assert resumed.data.validation_file == str(tmp_path / "home" / "texts")
    assert resumed.data.cache_dir == str(tmp_path / "cache")
    assert resumed.model.model_name_or_path == str(tmp_path / "bart")
    assert resumed.model.tokenizer_name == "facebook/bart-base"
    assert resumed.run.deepspeed == str(tmp_path / "zero.json")
    assert parse_arguments([]).data.dataset == "stdlib"


@pytest.mark.parametrize("argv", [["--lr_scheduler", "cosine\r"], ["--output_dir=runs/third\r"], ["\r"]])
def test_a_carriage_return_that_no_terminal_shows_is_named(argv):
    with pytest.raises(ValueError, match=r"argument '.*\\r': remove the carriage return"):
        parse_arguments(argv)


def test_trust_in_a_checkpoint_is_given_anew_each_time(tmp_path):
    path = save_run(tmp_path / "run", ["--trust_checkpoint"])
    assert not parse_arguments(["--resume", path]).run.trust_checkpoint
    assert parse_arguments(["--resume", path, "--trust_checkpoint"]).run.trust_checkpoint


def test_a_run_of_an_older_version_may_be_resumed(tmp_path):
    path = save_run(tmp_path / "run", ["--seed", "3"])
    folder = RunFolder(tmp_path / "run")
    config = folder.read_config()
    config["arguments"]["run"]["a_flag_that_is_gone"] = 1
    del config["arguments"]["run"]["patience"]
    folder.write_config(arguments=config["arguments"])
    resumed = parse_arguments(["--resume", path])
    assert (resumed.run.seed, resumed.run.patience) == (3, 0)


def test_a_resumed_run_stays_in_its_folder(tmp_path, monkeypatch):
    path = save_run(tmp_path / "run", [])
    with pytest.raises(ValueError, match="a resumed run keeps its folder"):
        parse_arguments(["--resume", path, "--output_dir", str(tmp_path / "other")])
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(["--resume", path, "--output_dir", "run"]).run.resume == path
    assert parse_arguments(["--resume", path, "--output_dir", path + "/"]).run.resume == path


def test_where_there_is_no_run_none_is_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"--resume .*none: .*none/config.json is missing or unreadable"):
        parse_arguments(["--resume", str(tmp_path / "none")])


def test_a_resumed_run_can_leave_beam_search_and_sampling(tmp_path):
    saved = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "true", "do_sample": True, "top_p": 0.9}
    RunFolder(tmp_path).write_config(arguments={"run": {"output_dir": str(tmp_path)} | saved})
    run = parse_arguments(["--resume", str(tmp_path)]).run
    assert (run.num_beams, run.length_penalty, run.top_p) == (4, 2.0, 0.9)
    run = parse_arguments(["--resume", str(tmp_path), "--num_beams", "1", "--do_sample", "false"]).run
    assert (run.num_beams, run.length_penalty, run.early_stopping, run.top_p) == (1, None, None, None)
