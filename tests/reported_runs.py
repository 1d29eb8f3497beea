"""Run folders with known metrics, and HTML pages as a reader sees them."""

from html.parser import HTMLParser
from types import SimpleNamespace

from recurrent_bart.run_folder import RunFolder

VOID = {"meta", "link", "br", "img"}
FLAGS = {
    "model": {"model_size": "tiny", "segment_size": 64, "model_name_or_path": None},
    "data": {"dataset": "papers", "task": "document"},
    "run": {"max_steps": 40, "learning_rate": 0.5, "output_dir": "somewhere"},
}
DEFAULTS = {"model_size": "tiny", "segment_size": None, "dataset": "stdlib", "task": "document", "max_steps": 100}


def step_record(step, **changes):
    """Return the log record of a step, of two ranks."""
    return {
        "step": step,
        "loss": 8.0 - step / 10,
        "learning_rate": 1e-3,
        "gradient_norm_backbone": 1.5,
        "gradient_norm_recurrence": 0.25,
        "tokens_per_second": 17_500.0,
        "model_flops_share": 0.37,
        "step_seconds": 2.5,
        "data_seconds": 0.25,
        "forward_seconds": 0.75,
        "backward_seconds": 1.0,
        "optimizer_seconds": 0.25,
        "rank_seconds": [1.0, 1.5],
        "slowest_rank": 1,
        "slowest_host": "node-b",
        "fastest_rank": 0,
        "fastest_host": "node-a",
        "memory_allocated_bytes": 3 * 2**30,
        "memory_reserved_bytes": 4 * 2**30,
        "memory_retries": 0,
        "n_cut_documents": 12,
        "n_bad_documents": 0,
        "seconds_left": 75.0,
        **changes,
    }


def evaluation_record(step, **changes):
    """Return the log record of an evaluation, of two layers and three segments."""
    return {
        "step": step,
        "validation_loss": 7.0 - step / 10,
        "rouge1": 31.25,
        "rouge2": 11.5,
        "rougeL": 21.0,
        "rougeLsum": 22.0,
        "evaluation_seconds": 4.0,
        "prefix_gate": [0.125, 0.5],
        "update_gate": [0.25, 0.75],
        "prefix_mass": [[0.11, 0.12, 0.13], [0.21, 0.22, 0.23]],
        "prefix_size": [[0.31, 0.32, 0.33], [0.41, 0.42, 0.43]],
        "state_norm": [[5.1, 5.2, 5.3], [6.1, 6.2, 6.3]],
        "state_change": [[0.91, 0.51, 0.52], [0.92, 0.61, 0.62]],
        "gradient_by_distance": [1.0, 0.1, 0.01],
        **changes,
    }


def write_run(path, records, samples=(), sections=None, **flags):
    """Write a run folder; `sections` adds sections of config.json, other arguments add or change flags of the run."""
    folder = RunFolder(path)
    folder.create()
    arguments = {**FLAGS, "run": {**FLAGS["run"], **flags}}
    model = {"d_model": 64, "recurrence": "layerwise"}
    folder.write_config(arguments=arguments, model=model, deepspeed={}, **(sections or {}))
    for record in records:
        folder.append_metrics(record)
    if samples:
        folder.append_samples("Step 20", samples)
    return path


def sample(name, source, target, generated):
    """Return the record of a generated text."""
    return SimpleNamespace(id=name, source=source, target=target, generated=generated)


class Page(HTMLParser):
    """Elements and text of a page; checks that every element is closed in order.

    Attributes:
        elements: Names and attributes of all elements.
        texts: Text of the page, piece by piece.
    """

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.texts.append(" ".join(data.split()))

    def tags(self):
        """Return the names of all elements."""
        return {tag for tag, _ in self.elements}

    def text(self):
        """Return the whole text."""
        return "\n".join(self.texts)
