"""Selection of validation documents from the training documents, for data sets without a validation split."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from recurrent_bart.data.rows import Row, split_of

SPLIT_RULES = ("content", "line")
# Node of the union-find: ("group", name), ("id", name) or ("text", digest).
Node = tuple[str, str]


@dataclass(frozen=True)
class HeldOut:
    """Rule that selects the validation documents.

    Attributes:
        share: Approximate share of the documents, between 0 and 1.
        rule: `"content"` selects by id or text; `"line"` selects by id or line number, as older runs did.
    """

    share: float = 0.1
    rule: str = SPLIT_RULES[0]


def split_by_line(row: Row) -> str:
    """Return the split of a document by its record's id, or by its file and line if it has no id."""
    return "validation" if split_of(row.record_name()) == "validation" else "train"


def held_out_texts(rows: Iterable[Row], share: float, place: str) -> frozenset[str]:
    """Return the hashes of the texts of the validation documents.

    About `share` (0 to 1) of all groups is selected: at least one group, and never all. Documents with the same text,
    id or group go to the same split. The split of a document does not depend on other documents, unless there are very
    few. Raises ValueError if all documents belong to one group.
    """
    groups = RelatedRows()
    for row in rows:
        groups.add(row.digest(), row.record_id, row.group)
    positions = {root: _position(root[1]) for root in groups.roots()}
    if len(positions) == 1:
        raise ValueError(
            f"{place}: all documents have the same text, id or group, so none can be held out for validation; give "
            "--validation_file, more documents or a different --group_column"
        )
    by_position = sorted(positions, key=positions.__getitem__)
    n_held_out = sum(position < share for position in positions.values())
    chosen = set(by_position[: min(max(n_held_out, 1), len(by_position) - 1)])
    return frozenset(text for text in groups.texts() if groups.root(("text", text)) in chosen)


class RelatedRows:
    """Groups of rows with the same text, record id or group: a union-find structure (Tarjan 1975)."""

    def __init__(self) -> None:
        self.parent: dict[Node, Node] = {}

    def add(self, digest: str, record_id: str | None, group: str | None = None) -> None:
        """Add a row by the hash of its text, its record's id and its group."""
        text = ("text", digest)
        for kind, name in (("group", group), ("id", record_id)):
            first, second = self.root(text), self.root(text if name is None else (kind, name))
            # The smaller name becomes the root, so the order of documents has no effect. A group sorts before an id,
            # and an id before a text.
            self.parent[max(first, second)] = min(first, second)

    def root(self, node: Node) -> Node:
        """Return the node that stands for all nodes of a group."""
        while self.parent.setdefault(node, node) != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def roots(self) -> set[Node]:
        """Return one node for each group."""
        return {self.root(node) for node in list(self.parent)}

    def texts(self) -> list[str]:
        """Return the hashes of all texts."""
        return [name for kind, name in self.parent if kind == "text"]


def _position(name: str) -> float:
    """Hash a name to a number from 0 to below 1. `split_of` puts exactly the names below 0.1 into "validation"."""
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return (number % 10 + number // 10 % 10**6 / 10**6) / 10
