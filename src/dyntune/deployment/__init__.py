"""From a tuned model to one that runs fast: exact optimisations in this process, and files for other runtimes."""

from dyntune.deployment.bundle import write
from dyntune.deployment.folder import OpenedModel, open_runtime
from dyntune.deployment.prepared import DeployedModel, deploy, prepare

__all__ = ["DeployedModel", "OpenedModel", "deploy", "open_runtime", "prepare", "write"]
