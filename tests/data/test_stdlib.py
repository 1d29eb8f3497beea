"""Embedded corpus: Python's standard library as documents."""

import ast
import inspect
import textwrap

import pytest

from recurrent_bart.data import stdlib
from recurrent_bart.data.rows import SPLITS, split_of
from recurrent_bart.data.stdlib import module_row, stdlib_rows

MODULE = b'''# head comment
"""Tools for things.

More about things.
"""
import os

CONSTANT = "kept"


@decorated(1)
def first(x):
    """Do the first
    thing."""
    y = "not a docstring"
    return y  # why


class Second:
    """A second."""

    def method(self):
        """Gone too."""
        return 2


def third(): "One line."; return 3


async def fourth():
    return os
'''


def test_sections_are_code_without_docstrings_and_targets_are_first_paragraphs():
    row = module_row("tools", MODULE, "sections")
    assert row.summaries == ["", "Do the first thing.", "A second.", "One line."]
    code, first, second, third = row.sections
    assert code == '# head comment\nimport os\nCONSTANT = "kept"'
    assert first == '@decorated(1)\ndef first(x):\n    y = "not a docstring"\n    return y  # why'
    assert second == "class Second:\n    def method(self):\n        return 2"
    assert third == "def third(): ; return 3"


def test_a_document_has_all_sections_and_the_docstring_of_the_module():
    row = module_row("tools", MODULE, "document")
    assert row.summaries == ["Tools for things."]
    assert row.sections[0].startswith("# head comment\nimport os")
    assert row.sections[0].endswith("async def fourth():\n    return os")
    assert "Gone too" not in row.sections[0]


def test_modules_are_not_executed():
    assert module_row("m", b'"""Doc."""\nraise SystemExit\n', "document").summaries == ["Doc."]


@pytest.mark.parametrize("source", [b"def broken(:\n", b"x = 1\n", b'"""Only a docstring."""\n', b"\x00"])
def test_modules_without_code_or_target_are_no_documents(source):
    assert module_row("m", source, "document") is None


def test_modules_in_other_encodings_are_read():
    source = "# -*- coding: latin-1 -*-\n'''Café.'''\ndef ü(): 'Größe.'; return 'é'\n".encode("latin-1")
    assert module_row("m", source, "document").summaries == ["Café."]
    assert module_row("m", source, "sections").sections[-1] == "def ü(): ; return 'é'"


@pytest.fixture(scope="module")
def rows():
    return {(split, task): list(stdlib_rows(split, task)) for split in SPLITS for task in ("document", "sections")}


@pytest.mark.slow
def test_the_library_gives_hundreds_of_documents_in_separate_splits(rows):
    documents = {split: {row.id for row in rows[split, "document"]} for split in SPLITS}
    assert sum(map(len, documents.values())) > 400
    assert all(split_of(name) == split for split in SPLITS for name in documents[split])
    n_sections = sum(bool(text) for split in SPLITS for row in rows[split, "sections"] for text in row.summaries)
    assert n_sections > 2000
    assert "json" in set().union(*documents.values())


@pytest.mark.slow
def test_no_document_contains_its_target(rows):
    """A model would copy a docstring that is left in the code."""
    leaked = [
        row.id
        for split in SPLITS
        for row in rows[split, "document"]
        if len(row.summaries[0]) > 40 and row.summaries[0] in " ".join(row.sections[0].split())
    ]
    assert not leaked


def test_all_definitions_of_a_module_are_kept(monkeypatch, tmp_path):
    """The removal of docstrings keeps all other code: all definitions of a module are still present."""
    source = inspect.getsource(textwrap)
    # the whole library takes half a minute
    monkeypatch.setattr(stdlib, "library_root", lambda: tmp_path)
    for path in ("textwrap.py", "test/test_textwrap.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    (row,) = [row for split in SPLITS for row in stdlib_rows(split, "document")]
    assert row.id == "textwrap"
    tree = ast.parse(source)
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert len(names) > 10
    assert all(f"def {name}(" in row.sections[0] for name in names)
