"""Tests that a saved model loads where nobody has imported the package, and says what to install without it."""

import json
import os
import runpy
import sys

import pytest

from launching import run
from recurrent_bart.configuration_recurrent_bart import AUTO_MAP, PACKAGE_MODULE, RecurrentBartConfig
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration


@pytest.mark.slow
def test_a_folder_is_enough_for_the_auto_classes(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    program = f"""
import sys
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
assert "recurrent_bart" not in sys.modules
folder = {str(tmp_path / "model")!r}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.segment_size == 8
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__ == "recurrent_bart.model.modeling_recurrent_bart"
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "RecurrentBartModel"
model.save_pretrained(folder + "-again")
again = AutoModelForSeq2SeqLM.from_pretrained(folder + "-again", trust_remote_code=True)
assert all((a == b).all() for a, b in zip(model.parameters(), again.parameters(), strict=True))
"""
    code, output = run([sys.executable, "-c", program], timeout=120, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert code == 0, output
    names = [sorted(os.listdir(tmp_path / name)) for name in ("model", "model-again")]
    assert names[0] == names[1]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_the_module_of_a_folder_has_the_classes_that_the_map_names():
    found = runpy.run_path(str(PACKAGE_MODULE))
    assert {name.split(".")[1] for name in AUTO_MAP.values()} == set(found["__all__"])
    assert found["RecurrentBartConfig"] is RecurrentBartConfig
    assert found["RecurrentBartForConditionalGeneration"] is RecurrentBartForConditionalGeneration


def test_without_the_package_the_module_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "recurrent_bart.configuration_recurrent_bart", None)
    with pytest.raises(ImportError, match="needs the package recurrent-bart: install its wheel"):
        runpy.run_path(str(PACKAGE_MODULE))
