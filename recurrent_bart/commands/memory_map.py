"""Show which parts of a document a model reads from the state: `python launch/memory_map.py --model RUN/model FILE`."""

import argparse
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from recurrent_bart.commands.exit_codes import code_of
from recurrent_bart.commands.summarize import missing_query
from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch, Collator, SegmentSizes, check_query
from recurrent_bart.data.text_encoder import TextEncoder, decode_text
from recurrent_bart.data.text_files import ENCODING
from recurrent_bart.data.tokenizer import special_tokens_around
from recurrent_bart.inference.stream_reader import load_model
from recurrent_bart.inference.summarizer import target_length
from recurrent_bart.model.generation_settings import change_settings, text_length
from recurrent_bart.probes.memory_map import as_text, draw_memory_map, map_memory
from recurrent_bart.training.flags import FlagParser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of this script."""
    parser = FlagParser(description="Show how much each layer reads from the state in each segment of a document.")
    parser.add_argument("file", type=Path, metavar="FILE", help="UTF-8 text file with one document")
    parser.add_argument("--model", required=True, help="folder of the model: RUN/model")
    parser.add_argument(
        "--query",
        default="",
        help="question about the text, for a model that was trained with --query_column; default: none",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code from the tokenizer's folder")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PNG",
        help="file for the plot; default: FILE.memory.png, without the folder and suffix of FILE",
    )
    return parser.parse_flags(argv)


def read_text(file: Path) -> str:
    """Return the text of a file.

    Raises:
        ValueError: The file is unreadable or empty.
    """
    try:
        text = file.read_text(encoding=ENCODING)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if not text.strip():
        raise ValueError(f"{file}: the text is empty")
    return text


def read_segments(config: RecurrentBartConfig, tokenizer: PreTrainedTokenizerBase, text: str, query: str) -> Batch:
    """Return the segments of a text, each with the question before it.

    Raises:
        ValueError: The text has no tokens, or the question leaves no room for text.
    """
    # the configuration fills in both sizes
    assert config.segment_size is not None
    assert config.input_size is not None
    encoder, special = TextEncoder(tokenizer), special_tokens_around(tokenizer)
    (question,), (ids,) = encoder.queries([query]), encoder([text])
    if not ids:
        raise ValueError("the text has no tokens")
    check_query(len(question), config.segment_size - sum(map(len, special)), config.segment_size, "--query")
    sizes = SegmentSizes(config.segment_size, config.input_size, max_n_segments=-1)
    cut = Collator("document", sizes, *special, config.pad_token_id, max_target_length=0)
    return cut([{"index": 0, "query": question, "sections": [ids], "summaries": [[]]}])


def show(arguments: argparse.Namespace) -> None:
    """Print the tables and the summary, and write the plot.

    Raises:
        ValueError: The model or the text is unusable, or the plot cannot be written.
    """
    text = read_text(arguments.file)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(arguments.model, device, torch.float32, arguments.trust_remote_code)
    length = text_length(model.config, model.generation_config, {}, target_length(arguments.model))
    change_settings(model.generation_config, {}, length)
    if note := missing_query(arguments.model, arguments.query):
        print(f"warning: {note}", file=sys.stderr, flush=True)
    batch = read_segments(model.config, tokenizer, text, arguments.query)
    ids, mask = batch.input_ids.to(device), batch.attention_mask
    found, summary = map_memory(model, ids, attention_mask=mask, max_new_tokens=length)
    picture = arguments.output or Path(f"{arguments.file.stem}.memory.png")
    try:
        draw_memory_map(found, picture)
    except OSError as error:
        raise ValueError(f"{picture}: cannot be written ({error.strerror})") from error
    print(as_text(found))
    print(f"summary: {decode_text(tokenizer, summary).strip()}")
    print(f"picture: {picture}")


def main(argv: list[str]) -> int:
    """Run the script. Return the exit code."""
    arguments = parse_arguments(argv)
    logging.disable_progress_bar()
    return code_of(lambda: show(arguments))
