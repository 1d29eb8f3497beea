"""Files of a run: they hold no secret, and none lies outside the run folder."""

import json

import pytest

from runs import flags, write_documents

SECRETS = {
    "WANDB_API_KEY": "5ec1e7" * 6 + "0123",
    "HF_TOKEN": "hf_secret_of_the_hub",
    "AWS_SECRET_ACCESS_KEY": "secret-of-a-cloud",
    "ANY_OTHER_VARIABLE": "value-of-the-environment",
}


def files_below(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(train_main, tmp_path, monkeypatch):
    """Train with secrets in the environment and with document names that point outside the run folder."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    documents = tmp_path / "documents"
    documents.mkdir()
    write_documents(documents)
    for file in documents.glob("*.jsonl"):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for number, record in enumerate(records):
            record["id"] = f"../../outside-{number}"
            record["../text"] = record.pop("sections")
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "place" / "run"
    changes = {"max_steps": 2, "wandb_mode": "offline", "task": "sections", "sections_column": "../text"}
    assert train_main(flags(documents, output, **changes)) == 0
    return output


@pytest.mark.slow
def test_a_run_writes_no_secret_and_nothing_outside_of_its_folder(run, tmp_path):
    written = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl", "trainer.json", "manifest.json"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written)
    for path in written:
        content = path.read_bytes()
        found = [name for name, value in SECRETS.items() if value.encode() in content]
        assert not found, f"{path} holds {found}"
    assert "outside-0" in (run / "samples.md").read_text()
    # the documents and their cache are beside the run folder, as given by flags
    assert {path.parts[0] for path in files_below(tmp_path)} == {"documents", "place"}
    assert {path.parts[0] for path in files_below(tmp_path / "place")} == {"run"}
    assert {path.parts[0] for path in files_below(tmp_path / "documents")} == {
        "cache",
        "train.jsonl",
        "validation.jsonl",
    }


@pytest.mark.slow
def test_models_are_saved_as_safetensors_alone(run):
    names = {path.name for path in files_below(run / "model")}
    assert "model.safetensors" in names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
