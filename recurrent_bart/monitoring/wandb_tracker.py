"""Weights & Biases: one run for all machines online, one for each of them offline.

RUN/wandb/run.json           the run's id, by which it is resumed
RUN/wandb/node-0.json        how much of it is written, one file a machine
RUN/wandb/offline-run-*      what `wandb sync` uploads
"""

import json
import re
import secrets
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recurrent_bart.monitoring.tracker import Record, Warn, curves_of
from recurrent_bart.run_folder import atomic_write

WANDB_MODES = ("online", "offline", "disabled")
# further modes of wandb, and what they come to here: whether machines share a run follows from their number
WANDB_MODE_ALIASES = {"dryrun": "offline", "run": "online", "shared": "online"}
# seconds that the service may take to answer, and to take what is left when a run ends
INIT_TIMEOUT = 30.0
FINISH_TIMEOUT = 120.0
# nothing of it on the terminal, and of the code no more than the commit that config.json names
QUIET = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
SECRET_NAME = re.compile(r"(^|_)(token|secret|password|api_?key|credentials?)$", re.IGNORECASE)
SECRET_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class WandbRun:
    """What a run is called there.

    Attributes:
        id: By which it is resumed.
        folder: `RUN/wandb`.
        is_online: Whether it is sent as it goes on.
        node: Number of this machine.
        n_nodes: Number of machines.
        host: Name of this machine.
        name: Shown.
        group: Shown together.
        entity: Whose; None: the user's own.
        project: Where.
        job_type: Kind of run, shown beside it.
        tags: To find it by.
        notes: Text about it; None: none.
        config: Settings of the run; see `redact_secrets`.
        given: Names of the settings that the user gave wandb, which defaults of ours leave alone.
    """

    id: str
    folder: Path
    is_online: bool
    node: int
    n_nodes: int
    host: str
    name: str
    group: str
    entity: str | None = None
    project: str | None = None
    job_type: str = "train"
    tags: Sequence[str] = ()
    notes: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()

    @property
    def is_shared(self) -> bool:
        """Whether several machines write into one run, which the service alone can join."""
        return self.is_online and self.n_nodes > 1

    def arguments(self) -> dict[str, Any]:
        """What `wandb.init` is given, its settings aside."""
        is_apart = self.n_nodes > 1 and not self.is_online
        return {
            "id": f"{self.id}-{self.node}" if is_apart else self.id,
            "name": f"{self.name}-{self.node}" if is_apart else self.name,
            "dir": str(self.folder.parent),
            "entity": self.entity,
            "project": self.project,
            "group": self.group,
            "job_type": self.job_type,
            "tags": list(self.tags),
            "notes": self.notes,
            "config": redact_secrets(self.config),
            # shared is a mode of the settings alone
            "mode": None if self.is_shared else "online" if self.is_online else "offline",
            "resume": "allow" if self.is_online and not self.is_shared else None,
        }

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `wandb.Settings`."""
        defaults = {**QUIET, "init_timeout": INIT_TIMEOUT, "finish_timeout": FINISH_TIMEOUT}
        settings = {name: value for name, value in defaults.items() if name not in self.given}
        if self.n_nodes > 1:
            settings["x_label"] = f"node-{self.node}-{self.host}"
        if self.is_shared:
            is_primary = self.node == 0
            settings |= {"mode": "shared", "x_primary": is_primary, "x_update_finish_state": is_primary}
        return settings


class WandbTracker:
    """Logs into a run, row by row as `metrics.jsonl`, whose number of lines is wandb's own step.

    So a run that is resumed knows what is there already: the service says how many rows it has; offline, a file that
    was closed holds what was logged until then. One that was cut off lacks its end, is thrown away and written again.

    Args:
        run: What to log into.
        history: All lines of `metrics.jsonl`.
    """

    def __init__(self, run: WandbRun, history: Sequence[Record]):
        # not before the environment says where it may write
        import wandb

        self.run = run
        self.state_file = run.folder / f"node-{run.node}.json"
        self.n_rows, self.n_written = 0, self._forget_cut_off()
        self.wandb_run = wandb.init(**run.arguments(), settings=wandb.Settings(**run.settings()))
        self.directory = Path(self.wandb_run.dir).parent
        if run.is_online and not run.is_shared:
            self.n_written = self.wandb_run.step
        self.logs = run.node == 0 or not run.is_shared
        self._write_state(cut_off=None if run.is_online else self.directory.name)
        self.wandb_run.define_metric("step", hidden=True)
        self.wandb_run.define_metric("*", step_metric="step")
        for record in history:
            self.log(record)

    def log(self, record: Record) -> None:
        """Add a row, unless it is there."""
        if self.logs and self.n_rows >= self.n_written:
            self.wandb_run.log(curves_of(record), step=None if self.run.is_shared else self.n_rows)
            if self.run.is_shared:
                self.n_written = self.n_rows + 1
                self._write_state()
        self.n_rows += 1

    def alert(self, title: str, text: str) -> None:
        """Send a message, by mail or as the user has it; once for all machines."""
        if self.run.node == 0:
            self.wandb_run.alert(title, text)

    def finish(self, is_success: bool) -> str | None:
        """Close the run; what then is not uploaded yet stays on disk."""
        self.wandb_run.finish(exit_code=0 if is_success else 1)
        self.n_written = max(self.n_written, self.n_rows)
        if is_success:
            self._write_state()
        return None if self.run.is_online else f"wandb sync {shlex.quote(str(self.run.folder))}/offline-run-*"

    def _forget_cut_off(self) -> int:
        """Remove the offline run that was not closed; number of rows in those that were."""
        state = json.loads(self.state_file.read_text()) if self.state_file.exists() else {}
        if state.get("cut_off"):
            shutil.rmtree(self.run.folder / state["cut_off"], ignore_errors=True)
        return state.get("n_written", 0)

    def _write_state(self, cut_off: str | None = None) -> None:
        atomic_write(self.state_file, json.dumps({"n_written": self.n_written, "cut_off": cut_off}))


def start_wandb(run: WandbRun, history: Sequence[Record], warn: Warn) -> WandbTracker:
    """A tracker; offline if the service cannot be had.

    Raises:
        Exception: It cannot be had offline either.
    """
    if run.is_online:
        try:
            return WandbTracker(run, history)
        except Exception as error:
            warn(f"wandb: {' '.join(str(error).split())}; it goes on offline")
            _stop_service()
    return WandbTracker(WandbRun(**{**vars(run), "is_online": False}), history)


def _stop_service() -> None:
    """End wandb's own process, which holds on to the id of a run that it could not begin."""
    import wandb

    wandb.teardown()


def parse_wandb_mode(text: str) -> str:
    """Return online, offline or disabled for a mode that wandb was told, in capitals or not.

    Raises:
        ValueError: There is no such mode.
    """
    mode = text.strip().lower()
    mode = WANDB_MODE_ALIASES.get(mode, mode)
    if mode not in WANDB_MODES:
        allowed = ", ".join((*WANDB_MODES, *WANDB_MODE_ALIASES))
        raise ValueError(f"WANDB_MODE {text} (or mode in a settings file of wandb): allowed are {allowed}")
    return mode


def run_id(folder: Path, wanted: str | None = None) -> str:
    """Return the id in `RUN/wandb`; a run without one gets `wanted`, or a new id, written there."""
    file = folder / "run.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps({"id": wanted or secrets.token_hex(4)}))
    return json.loads(file.read_text())["id"]


def redact_secrets(settings: Any) -> Any:
    """The same with what gives access masked: values by their names, and names and passwords in addresses."""
    if isinstance(settings, dict):
        return {
            name: "***" if SECRET_NAME.search(str(name)) and isinstance(value, str) else redact_secrets(value)
            for name, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [redact_secrets(value) for value in settings]
    return SECRET_IN_ADDRESS.sub("***@", settings) if isinstance(settings, str) else settings
