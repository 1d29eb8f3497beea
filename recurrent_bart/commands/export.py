"""Write the model of a checkpoint to a folder: `python launch/export.py RUN/checkpoints/step-00000100 FOLDER`."""

import argparse
from pathlib import Path

from transformers.utils import logging

from recurrent_bart.commands.exit_codes import code_of
from recurrent_bart.training.export import export_checkpoint
from recurrent_bart.training.flags import FlagParser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of this script."""
    parser = FlagParser(description="Write the model of a checkpoint to a folder for from_pretrained.")
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="folder of a checkpoint, RUN/checkpoints/step-N, or of a run, for its newest checkpoint",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new folder for the model and its tokenizer")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code from the tokenizer's folder")
    return parser.parse_flags(argv)


def export(arguments: argparse.Namespace) -> None:
    """Write the model of a checkpoint, and print what it is the model of.

    Raises:
        ValueError: The checkpoint is unusable, or the folder exists.
    """
    exported = export_checkpoint(arguments.checkpoint, arguments.folder, arguments.trust_remote_code)
    print(f"{arguments.folder}: the model of {exported}")


def main(argv: list[str]) -> int:
    """Run the command. Return the exit code."""
    arguments = parse_arguments(argv)
    logging.disable_progress_bar()
    return code_of(lambda: export(arguments))
