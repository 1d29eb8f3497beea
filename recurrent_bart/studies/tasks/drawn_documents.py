"""Source of training documents, drawn for several steps at once, and of test documents.

On a GPU, drawing needs tens of kernel launches, however many documents are drawn.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

from collections.abc import Iterator

from torch import Generator, Tensor

from recurrent_bart.studies.tasks.memory_tasks import MemoryTask

# seed of test documents; no training run has a seed this large
TEST_SEED = 10**9
# maximum number of segments in a forward pass of a test
TEST_PASS = 2048
STEPS_AT_ONCE = 16


class DrawnDocuments:
    """Source of training batches and test batches, on the generator's device."""

    def __init__(
        self, task: MemoryTask, test_task: MemoryTask, generator: Generator, batch_size: int, segment_size: int
    ):
        self.task, self.test_task, self.generator = task, test_task, generator
        self.batch_size, self.segment_size = batch_size, segment_size
        # drawn batches by number of segments; the last batch of a list is used next
        self.drawn: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def batch(self, n_segments: int) -> tuple[Tensor, Tensor]:
        """Return `input_ids (B, N, L)` and `labels (B, T)` of a training batch."""
        drawn = self.drawn.setdefault(n_segments, [])
        if not drawn:
            n_documents = STEPS_AT_ONCE * self.batch_size
            both = self.task.batch(self.generator, n_documents, n_segments, self.segment_size)
            drawn += zip(*(part.split(self.batch_size) for part in both), strict=True)
        return drawn.pop()

    def tests(self, n_segments: int, n_documents: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield test batches. They are the same in every call and for every seed of a run."""
        generator = Generator(self.generator.device).manual_seed(TEST_SEED + n_segments)
        while n_documents > 0:
            size = min(n_documents, max(1, TEST_PASS // n_segments))
            yield self.test_task.batch(generator, size, n_segments, self.segment_size)
            n_documents -= size
