"""Tasks: what a model's outputs mean, and how they are learned, measured and read."""

from dyntune.core.errors import CheckpointError
from dyntune.model.tasks.base import Metric, TargetSettings, Task
from dyntune.model.tasks.classification import Classification

__all__ = ["Classification", "Metric", "TargetSettings", "Task", "saved_task"]


def saved_task(name: str | None, given: Task | None = None) -> Task:
    """The task that a saved adapter was trained for.

    Args:
        name: as it was saved; None in an adapter that does not say, which is a classifier.
        given: the task, where it is not classification.

    Raises:
        CheckpointError: ``given`` is another task, or is missing.
    """
    task = given or Classification()
    trained_for = Classification.name if name is None else name
    if task.name != trained_for:
        raise CheckpointError(
            f"the adapter was trained for the task {trained_for!r}, but is to be loaded for {task.name!r}. Give its "
            "task: load(folder, task=...)."
        )
    return task
