"""Evaluators of documents whose tokens are numbers."""

import torch
from datasets import Dataset

from recurrent_bart.data.batches import Collator, SegmentSizes, plan_documents
from recurrent_bart.evaluation.evaluator import Evaluator

CPU = torch.device("cpu")


class Words:
    """Tokenizer that decodes ids to numbers without special tokens."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(i)) for i in ids if int(i) > 3)


def make_row(name, section_lengths, summary_lengths):
    sections = [torch.randint(4, 60, (length,)).tolist() for length in section_lengths]
    summaries = [torch.randint(4, 60, (length,)).tolist() for length in summary_lengths]
    return {
        "id": name,
        "record_id": name,
        "digest": str(sections),
        "sections": sections,
        "summaries": summaries,
        "summary_texts": [" ".join(map(str, summary)) for summary in summaries],
        "reference_texts": [[] for _ in summaries],
        "section_lengths": section_lengths,
        "summary_lengths": summary_lengths,
        "section_indices": list(range(len(sections))),
        "n_sections": len(sections),
    }


def make_evaluator(rows, task="document", batch_size=2, max_n_segments=-1):
    sizes = SegmentSizes(8, 8, max_n_segments)
    plan = plan_documents([r["section_lengths"] for r in rows], [r["summary_lengths"] for r in rows], sizes, 2)
    collator = Collator(task, sizes, [0], [2], 1, 12)
    return Evaluator(Dataset.from_list(rows), plan, collator, Words(), batch_size, CPU)


def document_rows():
    lengths = [(20, 3), (4, 9), (13, 1), (6, 5), (30, 2)]
    return [make_row(f"d{i}", [text], [target]) for i, (text, target) in enumerate(lengths)]


def section_rows():
    return [
        make_row("a", [9, 3, 5], [2, 0, 3]),
        make_row("b", [2], [4]),
        make_row("c", [0, 4, 14], [2, 1, 1]),
    ]
