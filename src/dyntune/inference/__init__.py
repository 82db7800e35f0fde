"""From a tuned model to one that runs fast: exact optimisations in this process, and files for other runtimes."""

from dyntune.inference.export.bundle import write
from dyntune.inference.export.folder import OpenedModel, open_runtime
from dyntune.inference.optimized import DeployedModel, deploy, prepare

__all__ = ["DeployedModel", "OpenedModel", "deploy", "open_runtime", "prepare", "write"]
