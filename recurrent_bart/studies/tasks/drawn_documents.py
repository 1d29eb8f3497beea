"""Documents to train on, drawn for several steps at once, and those to test on.

On a GPU drawing is some tens of launches, however many documents are drawn.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

from collections.abc import Iterator

from torch import Generator, Tensor

from recurrent_bart.studies.tasks.memory_tasks import MemoryTask

# far from any seed to train with
TEST_SEED = 10**9
# segments of a forward pass in a test
TEST_PASS = 2048
STEPS_AT_ONCE = 16


class DrawnDocuments:
    """Batches of a task, one after the other.

    Args:
        task: What is drawn.
        test_task: What is drawn to test on.
        generator: From which, on the device that documents are wanted on.
        batch_size: Documents of a batch.
        segment_size: Tokens of a segment.
    """

    def __init__(
        self, task: MemoryTask, test_task: MemoryTask, generator: Generator, batch_size: int, segment_size: int
    ):
        self.task, self.test_task, self.generator = task, test_task, generator
        self.batch_size, self.segment_size = batch_size, segment_size
        # by number of segments, the next one last
        self.drawn: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def batch(self, n_segments: int) -> tuple[Tensor, Tensor]:
        """`input_ids (B, N, L)` and `labels (B, T)`, as MemoryTask gives them."""
        drawn = self.drawn.setdefault(n_segments, [])
        if not drawn:
            n_documents = STEPS_AT_ONCE * self.batch_size
            both = self.task.batch(self.generator, n_documents, n_segments, self.segment_size)
            drawn += zip(*(part.split(self.batch_size) for part in both), strict=True)
        return drawn.pop()

    def tests(self, n_segments: int, n_documents: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches to test on, the same whenever they are asked for and whatever the run's seed."""
        generator = Generator(self.generator.device).manual_seed(TEST_SEED + n_segments)
        while n_documents > 0:
            size = min(n_documents, max(1, TEST_PASS // n_segments))
            yield self.test_task.batch(generator, size, n_segments, self.segment_size)
            n_documents -= size
