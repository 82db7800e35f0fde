"""ONNX: writing a program as a file, and running the file with ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dyntune.core.errors import EXTRAS, ExportError, in_one_line
from dyntune.core.files import write_atomically
from dyntune.core.version import VERSION
from dyntune.inference.export.int8.onnx import quantize_onnx, sums_saturate
from dyntune.inference.export.linears import BackboneLinears
from dyntune.inference.export.program import ACTIVE, INPUT, LOGITS, own_copy
from dyntune.inference.export.runtimes.base import FP32, Offer, Quantised, Runner, Runtime, Session

if TYPE_CHECKING:
    import onnx_ir

OPSET = 23
"""The first with an attention operator, with which ONNX Runtime was at least as fast as with its parts."""
OLDEST_OPSET = 18
"""The one that PyTorch's exporter translates to; older ones would be converted, and often cannot."""
_NEWEST_IR = 10
"""Version of the file format itself that PyTorch's exporter writes; runtimes for older opsets want an older one."""
_LARGEST = 2**31 - 2**24
"""Bytes of weights that fit into one file, whose limit is 2 GiB; beyond, they lie in a second file beside it."""
_FIRST_READERS = {18: "1.15", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 24: "1.24", 25: "1.24"}
"""The first ONNX Runtime that reads an opset, of those that Python 3.11 can install; each was tried."""
_OVER_THE_BATCH = (
    "Activations are scaled by their range over the whole batch, so an image's logits depend a little on the images "
    "beside it; a batch of one, as in `run.py`, gives an image the same logits always."
)


@dataclass(frozen=True)
class Onnx(Runtime):
    """An ONNX file run by ONNX Runtime, on the CPU.

    Args:
        opset: version of ONNX's operators, from 18 to the newest that the installed packages write. A lower one is read
            by older runtimes; below 23 attention is written as its parts.
    """

    title = "ONNX Runtime"
    file = "model.onnx"
    writes_with = ("onnx", "onnxscript")
    runs_with = ("onnxruntime",)
    install = " ".join(EXTRAS["onnx"])
    runner = Runner(
        "onnxruntime",
        'onnxruntime.InferenceSession(FOLDER / "model.onnx")',
        'model.run(["logits"], {"images": images})[0]',
    )
    precisions: ClassVar[Mapping[str, Offer]] = {FP32: Offer(), "int8": Offer()}

    opset: int = field(
        default=OPSET, metadata={"help": f"Opset of the ONNX file, {OPSET} if not given; older runtimes need lower."}
    )

    def check(self) -> None:
        try:
            newest = newest_opset()
        except ImportError:
            return
        if not OLDEST_OPSET <= self.opset <= newest:
            raise ExportError(
                f"opset {self.opset} cannot be written: the packages installed here write {OLDEST_OPSET} to {newest}. "
                "Give one of them."
            )

    def write(self, program: ExportedProgram, path: Path, spec: str) -> None:
        """Writes a program to an ONNX file. Weights above 2 GiB go into a second one, with ``.data`` behind its name.

        Linear maps are ``MatMul`` and ``Add`` nodes with a constant matrix of two dimensions: ONNX Runtime joins them
        when it opens the file, and its quantisation, which leaves ``Gemm`` alone, takes them.
        """
        with self.importing("writing ONNX files", self.writes_with):
            import onnx
            import onnx_ir

            translations = _translations(self.opset)
        self.check()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # PyTorch 2.8 says there how much it has optimised
                exported = torch.onnx.export(
                    own_copy(program),
                    dynamo=True,
                    opset_version=self.opset,
                    custom_translation_table=translations,
                    verbose=False,
                )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"the model cannot be written as ONNX: {in_one_line(error)}.") from error
        assert exported is not None  # only the exporter before dynamo's gives none
        model = exported.model
        model.graph.sort()  # PyTorch 2.8 may leave an operator behind what reads its output
        _name(model)
        oldest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.opset)])
        model.ir_version = min(_NEWEST_IR, oldest)
        model.metadata_props.update({"dyntune_version": VERSION, "spec": spec})
        weights = [value.const_value for value in model.graph.initializers.values()]
        size = sum(weight.nbytes for weight in weights if weight is not None)

        def save(temporary: Path) -> None:
            onnx_ir.save(model, temporary, external_data=f"{path.name}.data" if size > _LARGEST else None)
            try:
                onnx.checker.check_model(temporary, full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                raise ExportError(
                    f"the model has been written as ONNX, but is not valid: {in_one_line(error)}."
                ) from error

        write_atomically(path, save)

    def quantize(
        self, precision: str, exact: Path, path: Path, linears: BackboneLinears, images: Tensor | None
    ) -> Quantised:
        return Quantised(quantize_onnx(exact, path, linears), weight_bits=7 if sums_saturate() else 8)

    def open(self, path: Path, threads: int | None) -> Session:
        with self.importing("running ONNX files", self.runs_with):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Where other work shares the cores, threads that wait by spinning took a third more CPU time and were slower.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            return OnnxSession(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
        except Exception as error:  # ONNX Runtime's own errors have no common base
            raise ExportError(f"ONNX Runtime cannot open {path}: {in_one_line(error)}.") from error

    def requirement(self) -> str:
        first = _FIRST_READERS.get(self.opset)
        return f'"onnxruntime>={first}"' if first else "onnxruntime"

    def note(self, config: Mapping[str, Any]) -> str:
        return "" if config["precision"] == FP32 else _OVER_THE_BATCH

    def warning(self, config: Mapping[str, Any]) -> str:
        if config["weight_bits"] != 8 or not sums_saturate():
            return ""
        return (
            "was quantised for processors with VNNI instructions, which this one lacks: sums may overflow here. "
            "Export it again on this machine, or check its accuracy (dyntune export RUN --out FOLDER --check DATA)."
        )


class OnnxSession(Session):
    """A session of ONNX Runtime.

    Args:
        session: ``onnxruntime.InferenceSession``.
    """

    def __init__(self, session: Any) -> None:
        self._session = session

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, *masks = self._session.run(None, {INPUT: images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(masks[0]) if masks else None


def newest_opset() -> int:
    """The newest version of ONNX's operators that the installed onnx and onnxscript write.

    Raises:
        ImportError: one of them is not installed.
    """
    import onnx
    from onnxscript.version_converter import _version_converter

    # It has no public name. An opset beyond it would leave a model whose operators do not fit together.
    converted: int = getattr(_version_converter, "SUPPORTED_MAX_ONNX_OPSET", OPSET)
    return min(converted, onnx.defs.onnx_opset_version())


def _name(model: onnx_ir.Model) -> None:
    """Gives inputs, outputs and the batch's dimension the names that ``export_program`` promises.

    What the exporter has noted about each node goes: paths of this machine are part of it.
    """
    import onnx_ir

    names = (INPUT, LOGITS, ACTIVE)
    for name, value in zip(names, (*model.graph.inputs, *model.graph.outputs), strict=False):
        value.name = name
        assert value.shape is not None
        value.shape = onnx_ir.Shape(["batch", *value.shape[1:]])
    for node in model.graph.all_nodes():
        node.metadata_props.clear()


def _translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Operators that are translated otherwise than by PyTorch, or that it does not translate at all.

    Parameters are named as the operators' own: PyTorch 2.8 passes over translations with others.
    """
    from onnxscript.values import Opset

    op = Opset("", min(opset, OPSET))

    aten = torch.ops.aten

    def linear(input: Any, weight: Any, bias: Any = None) -> Any:
        product = op.MatMul(input, op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Between maps that keep the heads of a token together, so that the transpositions around it cancel out."""
        if dropout_p or is_causal or enable_gqa:
            raise NotImplementedError("attention with dropout, a causal mask or grouped queries is not translated")
        heads, width = query.shape[1], query.shape[3]

        def joined(x: Any) -> Any:
            return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, heads * width]))

        if attn_mask is not None:  # ONNX Runtime wants its rows written out, one for each query
            one = op.Constant(value_ints=[1])
            attn_mask = op.Expand(attn_mask, op.Concat(one, one, op.Shape(query, start=2, end=3), one, axis=0))
        attended, *_ = op.Attention(
            joined(query), joined(key), joined(value), attn_mask, q_num_heads=heads, kv_num_heads=heads, scale=scale
        )
        return op.Transpose(op.Reshape(attended, op.Constant(value_ints=[0, 0, heads, width])), perm=[0, 2, 1, 3])

    def stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        """Equal values stay in their order: among them, TopK takes the first ones first."""
        return op.TopK(self, op.Constant(value_ints=[self.shape[dim]]), axis=dim, largest=int(descending))

    translations: dict[Any, Callable[..., Any]] = {aten.linear.default: linear, aten.sort.stable: stable_sort}
    if opset >= OPSET:
        translations[aten.scaled_dot_product_attention.default] = attention
    return translations
