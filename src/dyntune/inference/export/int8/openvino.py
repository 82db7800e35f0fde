"""int8 for OpenVINO: the backbone's linear layers in integers, with scales from calibration images (NNCF)."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dyntune.core.errors import ExportError, how_to_install, in_one_line
from dyntune.core.texts import listed
from dyntune.inference.export.linears import BackboneLinears

if TYPE_CHECKING:
    import openvino


def save_quantized(source: Path, target: Path, images: Tensor, linears: BackboneLinears) -> int:
    """Writes the quantised version of an OpenVINO file; see ``quantize_openvino``.

    Returns:
        How many products are in integers.
    """
    try:
        import openvino
    except ImportError as error:
        raise ExportError(f"OpenVINO is not installed ({error}): {how_to_install('openvino')}.") from error
    quantized = quantize_openvino(openvino.Core().read_model(source), images, linears)
    openvino.save_model(quantized, target, compress_to_fp16=False)
    return count_integer_products(quantized)


def quantize_openvino(model: openvino.Model, images: Tensor, linears: BackboneLinears) -> openvino.Model:
    """Quantises the backbone's linear layers; gates, adapters, attention and the head stay in fp32.

    Args:
        model: in fp32, with one input.
        images: preprocessed, ``(N, 3, height, width)``, to calibrate on; some hundred of the model's own task do.
        linears: of the model that ``model`` was exported from.

    Raises:
        ExportError: a large product would stay in fp32, NNCF fails, or it is not installed.
    """
    try:
        import nncf
    except ImportError as error:
        raise ExportError(f"int8 in OpenVINO needs nncf ({error}): {how_to_install('openvino')}.") from error
    others = [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() not in ("Constant", "Parameter", "Result") and _path(node, linears) is None
    ]
    # Not nncf.set_log_level(), which silences the application's own handlers too.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    samples = [image[None].numpy() for image in images.detach().cpu().float()]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # NNCF shows its progress on standard output, for results alone
            quantized = nncf.quantize(
                model,
                nncf.Dataset(samples),
                subset_size=len(samples),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=nncf.IgnoredScope(names=others, validate=False),
                # SmoothQuant would put factors in front of the gates too, which then are not those that were trained.
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
                ),
            )
    except Exception as error:  # whatever NNCF and OpenVINO meet
        raise ExportError(
            f"NNCF cannot quantise the model on images {tuple(images.shape)}: {in_one_line(error)}. "
            "Take --precision fp32, or give calibration images (N, 3, height, width) of the model's size."
        ) from error
    audit(quantized, linears)
    return quantized


def audit(model: openvino.Model, linears: BackboneLinears) -> None:
    """Checks that no product of tokens with a large weight is left in floating point.

    Raises:
        ExportError: there is one; the message names the nodes.
    """
    left = []
    for node in model.get_ops():
        weight = _weight(node)
        if weight is not None and weight.size >= linears.smallest and not linears.stays_float(weight):
            left.append(f"{node.get_friendly_name()} ({linears.path(weight) or 'unknown weight'})")
    if left:
        raise ExportError(
            f"int8 was asked for, but {len(left)} large products stayed in fp32: {listed(left)}. Take --precision fp32."
        )


def count_integer_products(model: openvino.Model) -> int:
    """How many products have a weight of 8 bits."""
    return sum(_source(node).get_element_type().bitwidth == 8 for node in model.get_ops() if _is_product(node))


def _path(node: Any, linears: BackboneLinears) -> str | None:
    weight = _weight(node)
    return None if weight is None else linears.path(weight)


def _is_product(node: Any) -> bool:
    return node.get_type_name() == "MatMul" and _source(node).get_type_name() == "Constant"


def _source(node: Any) -> Any:
    """Where the second operand of a product comes from, behind conversions, scales and transpositions."""
    node = node.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return node


def _weight(node: Any) -> np.ndarray[Any, Any] | None:
    """The constant floating-point weight of a product; None for anything else."""
    if not _is_product(node) or not _source(node).get_element_type().is_real():
        return None
    return np.asarray(_source(node).data)
