"""State of the test process that one test could leave behind for the next one."""

import logging
import os
import sys
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class ProcessState:
    """Environment, levels of loggers, process group and default type of tensors, as a test finds them."""

    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    levels: dict[str, int] = field(default_factory=lambda: {name: logger.level for name, logger in loggers().items()})
    group: dist.ProcessGroup | None = field(default_factory=lambda: dist.group.WORLD)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)

    def restore(self) -> None:
        """Restore everything except the process group, which cannot be restored."""
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        os.environ.update(self.environment)
        for name, logger in loggers().items():
            if logger.level != self.levels.get(name, logger.level):
                logger.setLevel(self.levels[name])
        torch.set_default_dtype(self.dtype)

    def lost_group(self) -> str:
        """Return why the next tests could not use the process group, or an empty string."""
        groups = sys.modules.get("deepspeed.utils.groups")
        held = getattr(groups, "_WORLD_GROUP", None)
        if held is not None and held not in dist.distributed_c10d._world.pg_map:
            # otherwise DeepSpeed would give the ended group to the engines of all later tests
            groups._release_process_group_references()
            return "the test ended the process group without deepspeed.comm, and DeepSpeed still held the ended group"
        if self.group is not None and dist.group.WORLD is not self.group:
            return "the test ended the process group, which later tests of this process use"
        return ""


def loggers() -> dict[str, logging.Logger]:
    """Return all loggers by name. The root logger's name is empty."""
    found = {name: item for name, item in logging.root.manager.loggerDict.items() if isinstance(item, logging.Logger)}
    return {"": logging.root, **found}
