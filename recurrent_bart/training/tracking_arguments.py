"""Flags of wandb and TensorBoard."""

from dataclasses import dataclass
from typing import ClassVar

from recurrent_bart.monitoring.wandb_tracker import WANDB_MODES
from recurrent_bart.training.argument_fields import check_choice, check_given, flag


@dataclass
class TrackingArguments:
    """Flags of wandb and TensorBoard."""

    _argument_group_name: ClassVar[str] = "tracking"

    wandb_mode: str = flag(
        "auto",
        "online, offline, disabled or auto; auto: the mode in WANDB_MODE, else online if there is an API key, else "
        "offline",
    )
    wandb_entity: str | None = flag(
        None, "wandb user or team; if not given: WANDB_ENTITY, else the owner of the API key"
    )
    wandb_project: str | None = flag(None, "wandb project; if not given: WANDB_PROJECT, else recurrent-bart")
    wandb_group: str | None = flag(
        None,
        "wandb group, under which runs are shown together; if not given: WANDB_RUN_GROUP, else the name of the run "
        "folder",
    )
    wandb_tags: str = flag("", "wandb tags, separated by commas; if not given: WANDB_TAGS")
    tensorboard: bool = flag(False, "write metrics for TensorBoard to RUN/tensorboard; needs the package tensorboardX")

    def __post_init__(self) -> None:
        check_given(self, may_be_empty=("wandb_tags",))
        check_choice(self, "wandb_mode", ("auto", *WANDB_MODES))

    def tags(self) -> list[str]:
        """Return the list of tags in `wandb_tags`."""
        return split_tags(self.wandb_tags)


def split_tags(text: str) -> list[str]:
    """Split a comma-separated text into a list of tags."""
    return [tag.strip() for tag in text.split(",") if tag.strip()]
