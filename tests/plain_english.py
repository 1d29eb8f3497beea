"""Check docstrings and comments for the words and openers that CONTRIBUTING.md forbids; `make check` runs it."""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("recurrent_bart", "launch", "tests")
OPENERS = {
    *(
        "What",
        "Of",
        "As",
        "Whether",
        "How",
        "That",
        "By",
        "With",
        "In",
        "So",
        "Where",
        "Likewise",
        "Those",
        "Such",
        "If",
    ),
    *("Else", "Which", "Who", "When", "For", "From", "To", "At", "On", "Also", "Both", "Each", "None", "Not", "Only"),
}
FORBIDDEN = (
    "what there is|of its own|all the same|likewise|the one that|so many|those of|behind it|mended|the processor"
    "|by diagonals|such|those|others|whatever|thereby|whereof|of which the|for which the"
)
# share of the package's lines
MOST_DOCSTRING_SHARE = 0.15


class Finding(NamedTuple):
    """One place that a reader has to read twice."""

    path: Path
    line: int
    reason: str


def main() -> int:
    """Print the findings and the share of docstrings; return 1 if anything is wrong."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    findings = [finding for path in files for finding in (*opener_findings(path), *word_findings(path))]
    for path, line, reason in findings:
        print(f"{path.relative_to(ROOT)}:{line}: {reason}")
    share = docstring_share([path for path in files if path.is_relative_to(ROOT / "recurrent_bart")])
    if share > MOST_DOCSTRING_SHARE:
        print(f"docstrings are {share:.1%} of the package's lines, at most {MOST_DOCSTRING_SHARE:.0%} are allowed")
    return int(bool(findings) or share > MOST_DOCSTRING_SHARE)


def documented_nodes(path: Path) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """Yield every module, class and function of a file that has a docstring."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            yield node


def opener_findings(path: Path) -> Iterator[Finding]:
    """Find docstrings that begin with a forbidden word."""
    for node in documented_nodes(path):
        opener = (ast.get_docstring(node) or "").split()[0].strip(",.:;")
        if opener in OPENERS:
            yield Finding(path, node.body[0].lineno, f"the docstring begins with {opener!r}")


def word_findings(path: Path) -> Iterator[Finding]:
    """Find forbidden words in docstrings and comments."""
    texts = [(node.body[0].lineno, ast.get_docstring(node) or "") for node in documented_nodes(path)]
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    texts += [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
    for line, text in texts:
        for word in sorted(set(re.findall(rf"\b({FORBIDDEN})\b", text, flags=re.IGNORECASE))):
            yield Finding(path, line, f"says {word!r}")


def docstring_share(files: list[Path]) -> float:
    """Return the share of lines that docstrings fill."""
    n_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    literals = [node.body[0] for path in files for node in documented_nodes(path)]
    return sum((literal.end_lineno or literal.lineno) - literal.lineno + 1 for literal in literals) / n_lines


if __name__ == "__main__":
    sys.exit(main())
