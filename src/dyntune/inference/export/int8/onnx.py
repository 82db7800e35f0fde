"""int8 for ONNX Runtime: the backbone's linear layers in integers, with activations quantised as they come.

Gates, adapters and the head stay in fp32. What ONNX Runtime's quantiser passes over it passes over silently, so the
result is audited: a large product that is left in floating point is an error.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dyntune.core.errors import ExportError, how_to_install, in_one_line
from dyntune.core.files import write_atomically
from dyntune.core.texts import listed
from dyntune.inference.export.linears import BackboneLinears

if TYPE_CHECKING:
    import onnx

_INSTEAD = "Take --precision fp32"
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")


def quantize_onnx(source: Path, target: Path, linears: BackboneLinears) -> int:
    """Quantises the backbone's linear layers of an ONNX file; weights per output channel, activations per tensor.

    Args:
        source: an fp32 model.
        target: the file to write.
        linears: of the model that ``source`` was exported from.

    Returns:
        How many products are in integers.

    Raises:
        ExportError: a large product would stay in fp32, the quantiser fails, or ONNX's packages are not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ExportError(f"int8 needs onnx and onnxruntime ({error}): {how_to_install('onnx')}.") from error
    model = onnx.load(source)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul"
        and node.input[1] in weights
        and linears.path(onnx.numpy_helper.to_array(weights[node.input[1]])) is not None
    ]
    # The shapes that the exporter has noted may contradict those that the quantiser infers, and it then gives up.
    model.graph.ClearField("value_info")
    # The quantiser warns unless its own preprocessing, which notes shapes and folds constants, has marked the model.
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")

    def write(path: Path) -> None:
        try:
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=nodes,
                per_channel=True,
                reduce_range=sums_saturate(),
                weight_type=QuantType.QInt8,
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )
        except Exception as error:  # whatever the quantiser meets
            raise ExportError(f"ONNX Runtime cannot quantise the model: {in_one_line(error)}. {_INSTEAD}.") from error
        audit(onnx.load(path), linears)

    if nodes:
        write_atomically(target, write)
    else:
        audit(model, linears)
    return len(nodes)


def audit(model: onnx.ModelProto, linears: BackboneLinears) -> None:
    """Checks that no product of tokens with a large weight is left in floating point.

    Large is what has as many elements as the smallest of the backbone's linear layers; weights of gates, adapters and
    head are let through.

    Raises:
        ExportError: there is one; the message names the nodes.
    """
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    left = []
    for node, name, size in _float_products(model.graph):
        weight = numpy_helper.to_array(weights[name]) if name in weights else None
        if size >= linears.smallest and (weight is None or not linears.stays_float(weight)):
            left.append(f"{node.name} ({node.op_type}, {(weight is not None and linears.path(weight)) or name})")
    if left:
        raise ExportError(
            f"int8 was asked for, but {len(left)} large products stayed in fp32: {listed(left)}. The "
            f"quantiser takes MatMul nodes with a constant weight of two dimensions. {_INSTEAD}."
        )


def sums_saturate() -> bool:
    """Whether this processor adds products of 8 bits in 16, so that weights may use 7 bits only (x86 without VNNI)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return not (capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def _float_products(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, str, int]]:
    """Products with a constant operand: the node, the operand's name, and its number of elements."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if node.op_type in _PRODUCTS:
            yield from ((node, name, sizes[name]) for name in inputs[:2] if name in sizes)
        if inputs and all(name in sizes for name in inputs):  # computed from constants: a transposed weight is one too
            sizes |= dict.fromkeys(node.output, max(sizes[name] for name in inputs))
