"""Embedded corpus: Python's standard library, which is present on every machine with Python.

A module is a document. Its sections are the module-level code and the top-level functions and classes, without
docstrings. The target of a section is the first paragraph of its docstring; the target of the document is the first
paragraph of the module's docstring. No code is imported or executed.
"""

import ast
import importlib.util
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from recurrent_bart.data.rows import PRETRAINING_TASKS, Columns, Row, make_row, split_of

# value of --dataset that selects this corpus
EMBEDDED = "stdlib"

# Installed packages and tests are not part of the library.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def library_root() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_rows(split: str, task: str) -> Iterator[Row]:
    """Yield the modules of a split that have a target, sorted by path. A hash of the name decides the split."""
    root = library_root()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if SKIPPED_FOLDERS & set(parts) or split_of(name) != split:
            continue
        row = module_row(name, path.read_bytes(), task)
        if row:
            yield row


def module_row(name: str, source: bytes, task: str) -> Row | None:
    """Build a document from a module. Return None if it has no target for the task or is not valid Python."""
    try:
        tree = ast.parse(source)
        lines = _without_docstrings(importlib.util.decode_source(source), tree)
    except (SyntaxError, ValueError):
        return None
    sections, summaries = [], []
    for node in [node for node in tree.body if isinstance(node, Definition)]:
        first, end = min([node, *node.decorator_list], key=lambda part: part.lineno).lineno - 1, node.end_lineno or 0
        sections.append(_text(lines[first:end]))
        summaries.append(first_paragraph(node))
        lines[first:end] = [""] * (end - first)
    module_code = _text(lines)
    sections, summaries = [module_code, *sections], ["", *summaries]
    has_target = task in PRETRAINING_TASKS or (any(summaries) if task == "sections" else first_paragraph(tree))
    if not has_target or not any(sections):
        return None
    record = {"id": name, "document": "\n".join(sections), "summary": first_paragraph(tree)}
    return make_row({**record, "sections": sections, "summaries": summaries}, task, Columns(), place=name)


def first_paragraph(node: ast.Module | Definition) -> str:
    """Return the first paragraph of a docstring on one line, or an empty text if there is no docstring."""
    paragraph = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


def _without_docstrings(source: str, tree: ast.Module) -> list[str]:
    """Return the lines of the source with blank lines in place of docstrings."""
    lines = [line.encode() for line in source.split("\n")]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | Definition) or ast.get_docstring(node) is None:
            continue
        docstring = node.body[0]
        first, last = docstring.lineno - 1, (docstring.end_lineno or 0) - 1
        head, tail = lines[first][: docstring.col_offset], lines[last][docstring.end_col_offset :]
        lines[first : last + 1] = [head + tail] + [b""] * (last - first)
    return [line.decode() for line in lines]


def _text(lines: list[str]) -> str:
    return "\n".join(line.rstrip() for line in lines if line.strip())
