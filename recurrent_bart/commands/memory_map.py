"""Show which parts of a document a model reads from the state: `python launch/memory_map.py --model RUN/model FILE`."""

import argparse
from pathlib import Path

import torch
from transformers.utils import logging

from recurrent_bart.commands.exit_codes import code_of
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
    leading, trailing = special_tokens_around(tokenizer)
    ids = torch.tensor([[*leading, *TextEncoder(tokenizer)([text])[0], *trailing]], device=device)
    found, summary = map_memory(model, ids, max_new_tokens=length)
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
