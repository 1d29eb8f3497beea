"""Command line of the package, `recurrent-bart COMMAND`; PyTorch is imported once the command is known."""

import importlib
import os
import sys
from typing import NoReturn

COMMANDS = {
    "train": "train a model, on one process, or with --num_gpus N on N GPUs",
    "evaluate": "compute loss, ROUGE and more scores of a model",
    "summarize": "summarise texts of any length",
    "serve": "serve summaries and sessions over HTTP",
    "memory-map": "show which parts of a document a model reads from its state",
    "report": "write one HTML page about runs",
    "compare": "compare systems by the texts that they generated",
    "export": "write the model of a checkpoint to a folder",
    "benchmark": "measure speed and memory beside other models",
    "training-speed": "measure the cost of processes, sharding and the training loop",
    "study": "compare models on memory tasks and on documents",
    "preflight": "test every node before a long run",
}
# commands that several processes can share
LAUNCHED = ("train", "evaluate")
NUM_GPUS = "--num_gpus"
# extra that installs a package which only some commands need
EXTRAS = {"deepspeed": "train", "wandb": "train"}


def main() -> int:
    """Run the command that the command line names. Return the exit code."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if name not in COMMANDS:
        print(f"error: unknown command {name}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if name in LAUNCHED and any(item.split("=")[0].replace("-", "_") == "__num_gpus" for item in argv):
        number, argv = take_number(argv)
        if not number.isdecimal() or int(number) < 1:
            print(f"error: {NUM_GPUS} {number}: must be a whole number, at least 1", file=sys.stderr)
            return 2
        launch(int(number), [name, *argv])
    # argparse's messages name the program
    sys.argv[0] = f"recurrent-bart {name}"
    return run_command(name.replace("-", "_"), argv)


def run_command(module_name: str, argv: list[str]) -> int:
    """Run the command of a module in `recurrent_bart/commands`. Return the exit code."""
    try:
        module = importlib.import_module(f"recurrent_bart.commands.{module_name}")
        return getattr(module, "run", module.main)(argv)
    except ModuleNotFoundError as error:
        # a submodule may be the first one that is missed
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        extra = f"pip install 'recurrent-bart[{EXTRAS[package]}]'"
        print(f"error: this command needs the package {package}: {extra}", file=sys.stderr)
        return 2


def help_text() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<16}{text}" for name, text in COMMANDS.items()]
    usage, end = "usage: recurrent-bart COMMAND [--flag value ...]", "recurrent-bart COMMAND --help lists flags."
    return "\n".join([usage, "", *lines, "", end])


def launch(n_processes: int, command: list[str]) -> NoReturn:
    """Replace this process by torchrun, which starts the command in several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    os.execv(sys.executable, [sys.executable, *torchrun, os.path.abspath(__file__), *command])


def take_number(argv: list[str]) -> tuple[str, list[str]]:
    """Return the value of --num_gpus, and the command line without it."""
    rest, number = [], ""
    items = iter(argv)
    for item in items:
        flag, _, value = item.partition("=")
        if flag.replace("-", "_") == "__num_gpus":
            number = value or next(items, "")
        else:
            rest.append(item)
    return number, rest


if __name__ == "__main__":
    sys.exit(main())
