"""Write the model of a checkpoint to a folder: `python launch/export.py RUN/checkpoints/step-00000100 FOLDER`."""

import argparse
import sys
from pathlib import Path

from transformers.utils import logging

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


def main(argv: list[str]) -> int:
    """Run the script. Return the exit code."""
    arguments = parse_arguments(argv)
    logging.disable_progress_bar()
    try:
        exported = export_checkpoint(arguments.checkpoint, arguments.folder, arguments.trust_remote_code)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    print(f"{arguments.folder}: the model of {exported}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
