"""The choice of a runtime: candidates in processes of their own, the fastest taken, the others named with a reason."""

import numpy as np
import pytest

from dyntune.core.errors import DeploymentError
from dyntune.inference.export import bundle, candidate
from dyntune.inference.export.candidate import Candidate
from dyntune.inference.export.choose import choose
from dyntune.inference.export.folder import open_runtime


def test_the_one_with_the_most_images_per_second_is_taken(export, some_images, tmp_path, monkeypatch):
    def missing(program, path):
        raise DeploymentError("OpenVINO is not installed: pip install 'dyntune[openvino]'.")

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(bundle, "write_openvino", missing)
    choice = choose(export, tmp_path, some_images[:2], threads=1, rounds=3)
    speeds = {name: spread.median for name, spread in choice.images_per_second.items()}
    assert speeds.keys() == {"onnx", "torch"} and min(speeds.values()) > 0
    assert choice.runtime == max(speeds, key=speeds.get)
    assert choice.refused == {"openvino": "OpenVINO is not installed: pip install 'dyntune[openvino]'."}
    for words in (*(f"{name} {speed:.1f}" for name, speed in speeds.items()), "of 2 runtimes", "pip install"):
        assert words in choice.reason
    assert open_runtime(tmp_path / choice.runtime, trust=True).config["runtime"] == choice.runtime


def test_without_any_candidate_every_reason_is_given(export, some_images, tmp_path, monkeypatch):
    def fail(source, target, linears):
        raise DeploymentError("1 large products stayed in fp32")

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(bundle, "quantize_onnx", fail)
    with pytest.raises(DeploymentError) as error:
        choose(export, tmp_path, some_images[:1], precision="int8", threads=1)
    for words in ("no runtime", "onnx: 1 large", "openvino: int8 in OpenVINO", "torch: int8 is for"):
        assert words in str(error.value)


def test_a_candidate_that_takes_too_long_is_ended(deployed, some_images, tmp_path, monkeypatch):
    monkeypatch.setattr(candidate, "_PATIENCE", 0.01)  # less than an interpreter takes to start
    np.save(tmp_path / "images.npy", some_images[:1].numpy())
    with (
        Candidate(deployed("torch"), tmp_path / "images.npy", 1) as slow,
        pytest.raises(DeploymentError, match=r"torch-fp32 took longer than 0\.01 seconds"),
    ):
        slow(some_images[:1])


def test_a_candidate_that_does_not_run_says_why(deployed, some_images, tmp_path):
    np.save(tmp_path / "images.npy", some_images[:1].numpy())
    (tmp_path / "empty").mkdir()
    with (
        Candidate(tmp_path / "empty", tmp_path / "images.npy", 1) as broken,
        pytest.raises(DeploymentError, match=r"empty does not run here: .*deploy\.json is missing"),
    ):
        broken(some_images[:1])
