"""The demo's table of a model of deployed size, here made on the built-in backbone."""

import pytest

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.commands import demo
from dyntune.studies.bench.run import OtherMeasurements


def test_dense_stands_before_dyt_and_a_runtime_that_cannot_be_used_is_left_out(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "LARGE", BUILTIN_BACKBONE)
    monkeypatch.setattr(demo, "RUNTIMES", ("eager", "nowhere"))
    monkeypatch.setitem(demo._WORDS, "nowhere", "Nowhere")
    table = demo._large(tmp_path)
    assert [row[0] for row in table.rows] == ["dense, PyTorch", "DyT at half, PyTorch"]
    dense, dyt = table.rows
    assert dense[3:] == ("-", "1.00 x") and dyt[3].endswith(" x")
    assert dense[1].endswith(" ms") and len(dyt) == len(table.columns)
    assert "Nowhere is left out" in capsys.readouterr().err
    assert demo._large(tmp_path) == table, "what was measured is shown again"
    plan = tmp_path / "plan.json"
    plan.write_text(plan.read_text().replace("torch ", "torch of old "))
    demo._large(tmp_path)
    assert "torch of old " not in plan.read_text()
    plan.unlink()
    with pytest.raises(OtherMeasurements):
        demo._large(tmp_path)
