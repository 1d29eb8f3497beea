"""Command lines of processes that a command starts."""


def program_of(name: str) -> list[str]:
    """Return the arguments of Python, or of torchrun, that start the command `name`."""
    return ["-m", "recurrent_bart_cli", name]
