"""Tracker for Weights & Biases (wandb). Online, all nodes share one run. Offline, each node has a separate run.

RUN/wandb/run.json           id of the run, needed to resume it
RUN/wandb/node-0.json        number of rows written, one file per node
RUN/wandb/offline-run-*      data for `wandb sync`
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

from recurrent_bart.files import atomic_write
from recurrent_bart.monitoring.tracker import Record, Warn, curves_of

WANDB_MODES = ("online", "offline", "disabled")
# Other values of WANDB_MODE and their meaning here. "shared" means online, because the number of nodes decides sharing.
WANDB_MODE_ALIASES = {"dryrun": "offline", "run": "online", "shared": "online"}
# Timeouts in seconds for the service's first answer and for the upload at the end of a run.
INIT_TIMEOUT = 30.0
FINISH_TIMEOUT = 120.0
# Print nothing on the terminal, and save no code: config.json already has the git commit.
QUIET = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
SECRET_NAME = re.compile(r"(^|_)(token|secret|password|api_?key|credentials?)$", re.IGNORECASE)
SECRET_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class WandbRun:
    """Settings of a wandb run. Some of the fields are arguments of `wandb.init`.

    `id` is needed to resume the run. `folder` is `RUN/wandb`. `node` is the index of this node. With `is_online`, wandb
    uploads metrics during the run. `redact_secrets` masks secrets in `config`. `given` names the settings that the user
    chose, which the defaults of this module do not override.
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
        """True if several nodes write into one run, which only works online."""
        return self.is_online and self.n_nodes > 1

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `wandb.init`, without `settings`."""
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
            # "shared" is a mode of wandb.Settings only.
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
    """Tracker that logs each line of `metrics.jsonl` as one wandb row. The line number is wandb's step.

    A resumed run needs the number of rows already logged. Online, the wandb service knows this number. Offline, a file
    that was closed is complete. A file that was not closed lacks its end, so the tracker deletes the file and writes
    its rows again from `history`.
    """

    def __init__(self, run: WandbRun, history: Sequence[Record]):
        # Import late: the environment must first define wandb's folders.
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
        """Log a row, unless it is already logged."""
        if self.logs and self.n_rows >= self.n_written:
            self.wandb_run.log(curves_of(record), step=None if self.run.is_shared else self.n_rows)
            if self.run.is_shared:
                self.n_written = self.n_rows + 1
                self._write_state()
        self.n_rows += 1

    def alert(self, title: str, text: str) -> None:
        """Send an alert by wandb (mail or Slack, as the user configured), from node 0 only."""
        if self.run.node == 0:
            self.wandb_run.alert(title, text)

    def finish(self, is_success: bool) -> str | None:
        """Close the run. Return the upload command if the run is offline, because its data is only on disk."""
        self.wandb_run.finish(exit_code=0 if is_success else 1)
        self.n_written = max(self.n_written, self.n_rows)
        if is_success:
            self._write_state()
        return None if self.run.is_online else f"wandb sync {shlex.quote(str(self.run.folder))}/offline-run-*"

    def _forget_cut_off(self) -> int:
        """Delete an unfinished offline run. Return the number of rows in finished offline runs."""
        state = json.loads(self.state_file.read_text()) if self.state_file.exists() else {}
        if state.get("cut_off"):
            shutil.rmtree(self.run.folder / state["cut_off"], ignore_errors=True)
        return state.get("n_written", 0)

    def _write_state(self, cut_off: str | None = None) -> None:
        atomic_write(self.state_file, json.dumps({"n_written": self.n_written, "cut_off": cut_off}))


def start_wandb(run: WandbRun, history: Sequence[Record], warn: Warn) -> WandbTracker:
    """Return a wandb tracker. The tracker is offline if the wandb service cannot be reached."""
    if run.is_online:
        try:
            return WandbTracker(run, history)
        except Exception as error:
            warn(f"wandb: {' '.join(str(error).split())}; wandb continues offline")
            _stop_service()
    return WandbTracker(WandbRun(**{**vars(run), "is_online": False}), history)


def _stop_service() -> None:
    """Stop wandb's service process, which blocks the id of a run that could not start."""
    import wandb

    wandb.teardown()


def parse_wandb_mode(text: str) -> str:
    """Return the mode in `WANDB_MODES` that `text`, a value of the variable WANDB_MODE, means. Case is ignored.

    Raises:
        ValueError: The value is unknown.
    """
    mode = text.strip().lower()
    mode = WANDB_MODE_ALIASES.get(mode, mode)
    if mode not in WANDB_MODES:
        allowed = ", ".join((*WANDB_MODES, *WANDB_MODE_ALIASES))
        raise ValueError(f"WANDB_MODE {text} (or mode in a settings file of wandb): allowed are {allowed}")
    return mode


def run_id(folder: Path, wanted: str | None = None) -> str:
    """Return the wandb id stored in `folder`. Without a stored id, first store `wanted` or a new random id."""
    file = folder / "run.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps({"id": wanted or secrets.token_hex(4)}))
    return json.loads(file.read_text())["id"]


def redact_secrets(settings: Any) -> Any:
    """Return the settings with secrets masked: values of settings with a secret name, and credentials in URLs."""
    if isinstance(settings, dict):
        return {
            name: "***" if SECRET_NAME.search(str(name)) and isinstance(value, str) else redact_secrets(value)
            for name, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [redact_secrets(value) for value in settings]
    return SECRET_IN_ADDRESS.sub("***@", settings) if isinstance(settings, str) else settings
