"""The choice of a runtime: candidates in processes of their own, the fastest taken, the others named with a reason."""

import numpy as np
import pytest

from dyntune.core.errors import ExportError
from dyntune.inference.export import process
from dyntune.inference.export.choose import choose
from dyntune.inference.export.folder import open_export
from dyntune.inference.export.process import Candidate
from dyntune.inference.export.registry import every
from dyntune.inference.export.runtimes.onnx import Onnx
from dyntune.inference.export.runtimes.openvino import OpenVino


@pytest.mark.slow
def test_the_one_with_the_most_images_per_second_is_taken(export, some_images, tmp_path, monkeypatch):
    def missing(self, program, path, spec):
        raise ExportError("OpenVINO is not installed: pip install openvino nncf.")

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(OpenVino, "write", missing)
    choice = choose(export, tmp_path, some_images[:2], every({}), threads=1, rounds=3)
    speeds = {name: spread.median for name, spread in choice.images_per_second.items()}
    assert speeds.keys() == {"onnx", "torch"} and min(speeds.values()) > 0
    assert choice.runtime == max(speeds, key=speeds.get)
    assert choice.refused == {"openvino": "OpenVINO is not installed: pip install openvino nncf."}
    for words in (*(f"{name} {speed:.1f}" for name, speed in speeds.items()), "of 2 runtimes", "pip install"):
        assert words in choice.reason
    assert open_export(tmp_path / choice.runtime, trust=True).config["runtime"] == choice.runtime


def test_without_any_candidate_every_reason_is_given(export, some_images, tmp_path, monkeypatch):
    def fail(source, target, linears):
        raise ExportError("1 large products stayed in fp32")

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(Onnx, "write", lambda *_: None)
    monkeypatch.setattr("dyntune.inference.export.runtimes.onnx.quantize_onnx", fail)
    with pytest.raises(ExportError) as error:
        choose(export, tmp_path, some_images[:1], every({}), precision="int8", threads=1)
    for words in ("no runtime", "onnx: 1 large", "openvino: int8 in OpenVINO", "torch: int8 is for"):
        assert words in str(error.value)


def test_a_candidate_that_takes_too_long_is_ended(exported, some_images, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_PATIENCE", 0.01)  # less than an interpreter takes to start
    np.save(tmp_path / "images.npy", some_images[:1].numpy())
    with (
        Candidate(exported("torch"), tmp_path / "images.npy", 1) as slow,
        pytest.raises(ExportError, match=r"torch-fp32 took longer than 0\.01 seconds"),
    ):
        slow(some_images[:1])


def test_a_candidate_that_does_not_run_says_why(exported, some_images, tmp_path):
    np.save(tmp_path / "images.npy", some_images[:1].numpy())
    (tmp_path / "empty").mkdir()
    with (
        Candidate(tmp_path / "empty", tmp_path / "images.npy", 1) as broken,
        pytest.raises(ExportError, match=r"empty does not run here: .*deploy\.json is missing"),
    ):
        broken(some_images[:1])
