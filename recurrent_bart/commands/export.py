"""Write the model of a checkpoint to a folder: `python launch/export.py RUN/checkpoints/step-00000100 FOLDER`."""

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
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
    parser.add_argument(
        "--plain_bart",
        action="store_true",
        help="write the BART or MBart without the recurrence, for programs that know only these",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="NAME",
        help="also upload the folder to the repository NAME of the hub; a new one is private",
    )
    parser.add_argument(
        "--public", action="store_true", help="let --push_to_hub upload to a repository that exists and is public"
    )
    return parser.parse_flags(argv)


def export(arguments: argparse.Namespace) -> None:
    """Write the model of a checkpoint, and print what it is the model of.

    Raises:
        ValueError: The checkpoint is unusable, or the folder exists.
    """
    exported, is_reduced = export_checkpoint(
        arguments.checkpoint, arguments.folder, arguments.trust_remote_code, arguments.plain_bart
    )
    print(f"{arguments.folder}: the model of {exported}")
    if is_reduced:
        print("warning: the plain model lacks the recurrence; its texts differ", file=sys.stderr, flush=True)
    if arguments.push_to_hub:
        print(f"uploaded to {push_to_hub(arguments.folder, arguments.push_to_hub, arguments.public)}")


def push_to_hub(folder: Path, name: str, may_be_public: bool = False) -> str:
    """Upload a folder to a repository of the Hugging Face hub, which is new and private, or exists. Return its address.

    Raises:
        ValueError: The hub refuses, for example because nobody is logged in, or the repository is public. The folder
            stays.
    """
    hub = HfApi()
    try:
        address = hub.create_repo(name, private=True, exist_ok=True)
        # a repository that exists keeps its visibility
        if not may_be_public and not hub.repo_info(address.repo_id).private:
            raise ValueError("the repository is public: everybody could read the model; add --public to allow it")
        hub.upload_folder(folder_path=folder, repo_id=address.repo_id, commit_message="Add the model")
    except (OSError, HFValidationError, ValueError) as error:
        raise ValueError(f"--push_to_hub {name}: {error}; the model is in {folder}") from error
    return str(address)


def main(argv: list[str]) -> int:
    """Run the command. Return the exit code."""
    arguments = parse_arguments(argv)
    logging.disable_progress_bar()
    return code_of(lambda: export(arguments))
