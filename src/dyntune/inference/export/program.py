"""One graph of a folded model, in which tokens are really skipped: what every other runtime's file is made from."""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dyntune.core.errors import ExportError, in_one_line
from dyntune.inference.optimized import OptimizedModel

INPUT = "images"
LOGITS = "logits"
ACTIVE = "active"
_TRACED = 2
"""Images in the batch that is traced; a graph traced with one would be for batches of one."""


def export_program(model: OptimizedModel, masks: bool) -> ExportedProgram:
    """Traces a folded model into one graph, for any batch size, that computes the active tokens alone.

    Args:
        model: from ``folded_copy``, with weights as they are (``optimize`` packs them for this process), on the CPU
            and in fp32: elsewhere it computes with operators that no other runtime has. For ``masks`` it has been
            folded with masks.
        masks: whether the graph also gives which patches were computed.

    Returns:
        A program from ``images``, ``(B, 3, height, width)``, to ``logits``, ``(B, classes)``, and with masks to
        ``active``, bool, ``(B, gates, patches)``: the gates in the order of ``model.run(images).gates``.

    Raises:
        ExportError: masks are wanted of a model without gates, or the model computes something that no graph holds.
    """
    images = torch.zeros(_TRACED, *model.backbone.input_shape)
    if masks and not model.run(images).gates:
        raise ExportError(f"{model.spec} has no gates, so there are no masks to export; export it without.")
    shapes = {INPUT: {0: Dim("batch", min=1)}}
    try:
        # Where tracing fails, PyTorch prints the graph up to there on standard error.
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            program = torch.export.export(_Outputs(model, masks), (images,), dynamic_shapes=shapes)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        raise ExportError(
            f"{model.spec} cannot be exported, because PyTorch cannot trace it into one graph: {in_one_line(error)}. "
            "Run it in this process instead (dyntune.optimize)."
        ) from error
    _tidy(program.graph)
    return program


def _tidy(graph: torch.fx.Graph) -> None:
    """Takes out what no file should carry: paths of this machine, and slices of everything.

    PyTorch 2.8 keeps the first step of ``x[:, 1:]``, which takes all rows, and OpenVINO does not translate it.
    """
    for node in list(graph.nodes):
        node.meta.pop("stack_trace", None)
        if node.target is torch.ops.aten.slice.Tensor and len(node.args) == 1 and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def own_copy(program: ExportedProgram) -> ExportedProgram:
    """A copy of a program for a converter: it leaves one with data-dependent sizes so that no other takes it."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


class _Outputs(nn.Module):
    """The forward pass with tensors alone as its result."""

    def __init__(self, model: OptimizedModel, masks: bool) -> None:
        super().__init__()
        self.model = model
        self.masks = masks

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.model.run(images)
        if not self.masks:
            return (output.logits,)
        return output.logits, torch.stack([gate.on_patches > 0.5 for gate in output.gates], dim=1)
