"""Cases of the generation benchmark: a loop over tokens, a kind of search, and the sizes of a batch."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# loops over tokens, and their names in tables. The second and third run Hugging Face's own BART
LOOPS = {"ours": "ours", "eager": "Hugging Face, eager", "static": "Hugging Face, static cache, compiled"}
# options of every beam search
BEAM_OPTIONS = {"no_repeat_ngram_size": 3}


@dataclass(frozen=True)
class GenerationCase:
    """Settings of one measurement.

    Attributes:
        loop: One of `LOOPS`.
        num_beams: Beams; 1 means greedy search.
        batch_size: Number of documents.
        n_context: Positions of each document that the decoder attends to.
        new_tokens: Length of each text.
    """

    loop: str
    num_beams: int
    batch_size: int
    n_context: int
    new_tokens: int

    def options(self) -> dict[str, Any]:
        """Return the options of `generate`; no text ends early."""
        options = {"min_new_tokens": self.new_tokens, "max_new_tokens": self.new_tokens, "do_sample": False}
        options |= {"num_beams": self.num_beams} | (BEAM_OPTIONS if self.num_beams > 1 else {})
        return options | ({"cache_implementation": "static"} if self.loop == "static" else {})

    def group(self) -> tuple[int, int, int]:
        """Return what the cases of one table row group have in common."""
        return self.num_beams, self.n_context, self.batch_size


def build_cases(
    num_beams: Iterable[int], batch_sizes: Iterable[int], contexts: Iterable[int], new_tokens: int, is_gpu: bool
) -> list[GenerationCase]:
    """Build all cases, with cases of equal sizes next to each other.

    Hugging Face compiles greedy search on a GPU only, so there is a static cache only there.
    """
    cases = []
    for beams, n_context, batch_size in itertools.product(num_beams, contexts, batch_sizes):
        for loop in LOOPS:
            if loop != "static" or (is_gpu and beams == 1):
                cases.append(GenerationCase(loop, beams, batch_size, n_context, new_tokens))
    return cases
