"""``dyntune cost``: blocks, memory and the published table."""

import json

import pytest
from typer.testing import CliRunner

from dyntune.commands.main import app
from dyntune.studies import table5


def cost(*arguments, status=0):
    done = CliRunner().invoke(app, ["cost", *arguments])
    assert done.exit_code == status, done.output
    return done.output


def test_json_has_every_block():
    report = json.loads(cost("--method", "dyt:rate=0.5", "--policy", "tome:r=4", "--json"))
    blocks = report["blocks"]
    assert report["embedding_macs"] + sum(block["macs"] for block in blocks) + report["norm_macs"] == report["macs"]
    assert [block["mlp_tokens"] for block in blocks] == [65 - 4 * (index + 1) for index in range(12)]
    assert blocks[0]["mlp_active"] == 1 + 60 / 2
    assert report["largest_activation_bytes"] > 0


def test_per_block_prints_tokens_and_shares():
    without = cost("--method", "dyt:rate=0.5", "--policy", "tome:r=4")
    assert "largest activation" in without and "blocks.11" not in without
    text = cost("--method", "dyt:rate=0.5", "--policy", "tome:r=4", "--per-block")
    for words in ("tokens in attention", "31 of 61", "blocks.11", "embedding", "norm", "total"):
        assert words in text


def test_table5_prints_ours_beside_the_published(monkeypatch):
    rows = tuple(row for row in table5.ROWS if row.name in ("Full tuning", "AdaptFormer + ToMe"))
    monkeypatch.setattr("dyntune.commands.cost.ROWS", rows)
    text = cost("--table5")
    for words in ("13.14 / 13.29 G", "0.16 / 1.19 M", "0.16 M / 13.29 G", "full", "85.80 M / 17.58 G", rows[1].note):
        assert words in text
    report = json.loads(cost("--table5", "--json"))
    assert [row["name"] for row in report] == [row.name for row in rows]
    assert report[1]["counted"][1]["method"] == "adaptformer:bottleneck=64"
    assert report[1]["published"] == {"params_m": 0.16, "gmacs": 13.29}


@pytest.mark.parametrize("option", [("--per-block",), ("--model", "vit_base_patch16_224"), ("--policy", "tome")])
def test_table5_takes_no_other_option(option):
    assert "--json" in cost("--table5", *option, status=2)
