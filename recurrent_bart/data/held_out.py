"""Which documents are held out for validation, where a data set has none of its own."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from recurrent_bart.data.rows import Row, split_of

SPLIT_RULES = ("content", "line")
# a group of documents: the name that keeps them together, or the digest of their text
Node = tuple[str, str]


@dataclass(frozen=True)
class HeldOut:
    """How documents are held out.

    Attributes:
        share: Of the documents, about.
        rule: `"content"`: by the id or the text. `"line"`: by the id or the line in the file, as older runs did.
    """

    share: float = 0.1
    rule: str = SPLIT_RULES[0]


def split_by_line(row: Row) -> str:
    """Return the split of a document by its id, or by its file and line."""
    return "validation" if split_of(row.id) == "validation" else "train"


def held_out_texts(rows: Iterable[Row], share: float, place: str) -> frozenset[str]:
    """Return the digests of the texts that are held out: at least one, and never all.

    Documents with one text, one id or one group are on the same side. A document's side depends on no other document,
    unless there are very few.

    Args:
        rows: All documents.
        share: Part of the groups that is held out, about.
        place: Of the documents, for messages.

    Raises:
        ValueError: All documents belong together.
    """
    groups = _Groups()
    for row in rows:
        groups.add(row)
    positions = {root: _position(root[1]) for root in groups.roots()}
    if len(positions) == 1:
        raise ValueError(
            f"{place}: all documents have one text, id or group, so none can be held out; give --validation_file, more "
            "documents or another --group_column"
        )
    by_position = sorted(positions, key=positions.__getitem__)
    n_held_out = sum(position < share for position in positions.values())
    chosen = set(by_position[: min(max(n_held_out, 1), len(by_position) - 1)])
    return frozenset(text for text in groups.texts() if groups.root(("text", text)) in chosen)


class _Groups:
    """Documents that belong together, by union-find (Tarjan 1975)."""

    def __init__(self) -> None:
        self.parent: dict[Node, Node] = {}

    def add(self, row: Row) -> None:
        text = ("text", row.digest())
        first, second = self.root(text), self.root(text if row.group is None else ("group", row.group))
        # the lesser name, so that the order of documents changes nothing; an id comes before a text
        self.parent[max(first, second)] = min(first, second)

    def root(self, node: Node) -> Node:
        while self.parent.setdefault(node, node) != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def roots(self) -> set[Node]:
        return {self.root(node) for node in list(self.parent)}

    def texts(self) -> list[str]:
        return [name for kind, name in self.parent if kind == "text"]


def _position(name: str) -> float:
    """Return a number from 0 to 1; below 0.1 it is that of a name for which `split_of` gives "validation"."""
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return (number % 10 + number // 10 % 10**6 / 10**6) / 10
