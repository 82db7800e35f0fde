"""Supernet, search and retraining on a tiny host: the result, and that stopping anywhere does not change it."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, TensorDataset
from typer.testing import CliRunner

import dyntune
from dyntune.commands.main import app
from dyntune.core.errors import CheckpointError, TrainingError
from dyntune.model.adapter_folder import WEIGHTS
from dyntune.parts.methods.noah import Noah
from dyntune.studies.noah import SearchSettings, search_noah, train_noah
from dyntune.studies.noah.pipeline import SEARCH, SUPERNET
from dyntune.studies.noah.progress import SearchBar, SilentSearch
from dyntune.training.interrupt import TrainingInterrupted
from dyntune.training.progress import Silent
from dyntune.training.settings import TrainSettings

PART = Noah(choices=(1, 3), depths=(1, 2, 3))
SEARCHED = SearchSettings(limit=0.003, least=0.0005, population=6, generations=3, parents=2, mutations=2, crossovers=2)
SETTINGS = TrainSettings(epochs=2, batch_size=8, lr=1e-2, device="cpu", seed=5)


def images(count, seed):
    """Noise whose mean says the class."""
    labels = torch.arange(count) % 5
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(noise + (labels - 2.0)[:, None, None, None], labels)


@pytest.fixture(scope="module")
def procedure(make_host):
    """``procedure(out, **changes)`` runs the whole, or goes on with it."""
    train, val = images(24, 0), images(20, 1)

    def run(out, part=PART, settings=SETTINGS, **changes):
        def build(part):
            return dyntune.tune(make_host(), part)

        arguments = {"supernet_epochs": 2, "supernet_lr": 5e-3, "search": SEARCHED} | changes
        return train_noah(part, build, train, val, ConcatDataset([train, val]), out, settings, **arguments)

    return run


@pytest.fixture(scope="module")
def finished(procedure, tmp_path_factory):
    out = tmp_path_factory.mktemp("noah") / "whole"
    return out, procedure(out)


@pytest.fixture
def whole(finished, tmp_path):
    """A folder of a finished run, to do with as one likes, and its result."""
    shutil.copytree(finished[0], tmp_path / "whole")
    return tmp_path / "whole", finished[1]


@pytest.fixture(autouse=True)
def _no_pictures(finished, monkeypatch):
    """Only the finished run draws: pictures take longer than its trainings."""
    monkeypatch.setattr("dyntune.studies.pictures.style.save_figure", lambda figure, path: path)


def candidates(out: Path) -> list:
    return json.loads((out / SEARCH).read_text())["candidates"]


def same_bits(first: Path, second: Path) -> bool:
    files = (WEIGHTS, f"{SUPERNET}/{WEIGHTS}")
    same = all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    return same and candidates(first) == candidates(second)


def test_the_result_is_the_best_candidate_retrained_from_the_pretrained_backbone(whole, make_host, tmp_path):
    out, result = whole
    rows = candidates(out)
    assert [row["generation"] for row in rows] == [g for g in range(3) for _ in range(6)]
    assert all(500 <= row["parameters"] <= 3000 for row in rows)
    best = min(rows, key=lambda row: (-row["accuracy"], row["parameters"]))
    assert dataclasses.asdict(result.best.subnet) == {name: tuple(best[name]) for name in vars(result.best.subnet)}
    assert result.part == PART.with_sizes(result.best.subnet)
    assert dyntune.cost(result.model).trainable_params == best["parameters"]
    assert result.fit.steps == 2 * 6 and result.fit.best_epoch == 2
    loaded = dyntune.load(out, backbone=make_host())
    assert loaded.parts == (result.part,)
    batch = images(4, 2).tensors[0]
    with torch.no_grad():
        assert torch.equal(loaded(batch), result.model(batch))
    pretrained = dict(make_host().named_parameters())
    for name, p in result.model.backbone.host.named_parameters():
        assert p.requires_grad or torch.equal(p, pretrained[name.replace(".base.", ".")])


def test_the_candidates_scores_are_those_of_the_supernets_slices(whole, make_host):
    out, result = whole
    supernet = dyntune.load(out / SUPERNET, backbone=make_host())
    supernet.backbone.shared["noah"].set_subnet(result.best.subnet)
    accuracy = dyntune.evaluate(supernet, images(20, 1)).accuracy
    assert accuracy == result.best.accuracy > 0.2


def test_pictures_lie_beside_the_search(whole):
    out, _ = whole
    assert Image.open(out / "search.png").width > 1000
    assert (out / "search.svg").read_text().lstrip().startswith("<?xml")


class Stop(Exception):
    """What a killed process leaves behind is what is on disk at this moment."""


class StopTraining(Silent):
    def __init__(self, steps):
        self.steps = steps

    def step(self, figures):
        self.steps -= 1
        if not self.steps:
            raise Stop


class StopSearch(SilentSearch):
    def __init__(self, candidates, how=None):
        self.left, self.how = candidates, how

    def candidate(self, candidate, best):
        self.left -= 1
        if not self.left:
            if self.how is None:
                raise Stop
            os.kill(os.getpid(), self.how)


@pytest.mark.parametrize(
    "stop",
    [
        {"progress": lambda title: StopTraining(5 if title == "noah supernet" else 99)},
        {"search_progress": lambda settings: StopSearch(8)},
        {"search_progress": lambda settings: StopSearch(18)},
        {"progress": lambda title: StopTraining(8 if title == "noah" else 99)},
    ],
    ids=["supernet", "second generation", "last candidate", "retraining"],
)
def test_a_killed_run_goes_on_to_the_same_bits(procedure, whole, tmp_path, stop):
    out = tmp_path / "killed"
    with pytest.raises(Stop):
        procedure(out, **stop)
    again = procedure(out)
    assert same_bits(out, whole[0])
    assert again.best == whole[1].best
    assert again.fit.best_epoch == whole[1].fit.best_epoch


def test_a_signal_ends_the_search_after_the_running_candidate(procedure, whole, tmp_path):
    out = tmp_path / "stopped"
    with pytest.raises(TrainingInterrupted, match="stopped after 4 candidates"):
        procedure(out, search_progress=lambda settings: StopSearch(4, signal.SIGTERM))
    assert len(candidates(out)) == 4
    procedure(out)
    assert same_bits(out, whole[0])


def test_a_finished_run_is_read_not_repeated(procedure, whole, monkeypatch):
    out, result = whole
    monkeypatch.setattr("dyntune.studies.noah.pipeline.evaluate", None)
    before = (out / WEIGHTS).stat().st_mtime_ns
    again = procedure(out)
    assert again.best == result.best
    assert again.fit.seconds < again.seconds <= result.seconds, (
        "of the trainings, as it was when each wrote its last state"
    )
    assert result.seconds > result.fit.seconds > 0
    assert (out / WEIGHTS).stat().st_mtime_ns == before


def test_another_seed_gives_another_search(procedure, whole, tmp_path):
    other = procedure(tmp_path / "other", settings=dataclasses.replace(SETTINGS, seed=6))
    assert other.best.subnet != whole[1].best.subnet or not same_bits(tmp_path / "other", whole[0])


def test_other_options_are_refused(procedure, whole, tmp_path):
    out, _ = whole
    with pytest.raises(TrainingError, match=r"the search in .* was started differently: limit was 0\.003, is 0\.002"):
        procedure(out, search=dataclasses.replace(SEARCHED, limit=0.002))
    with pytest.raises(TrainingError, match="epochs was 2, is 3"):
        procedure(out, supernet_epochs=3)
    with pytest.raises(TrainingError, match="epochs was 2, is 4"):
        procedure(out, settings=dataclasses.replace(SETTINGS, epochs=4))
    with pytest.raises(TrainingError, match="no sub-network with"):
        procedure(tmp_path / "none", search=SearchSettings(limit=1e-5))


def test_a_copied_supernet_is_searched_again_under_another_limit(procedure, whole, tmp_path):
    shutil.copytree(whole[0] / SUPERNET, tmp_path / "other" / SUPERNET)
    result = procedure(
        tmp_path / "other",
        search=dataclasses.replace(SEARCHED, limit=0.002),
        progress=lambda title: StopTraining(1) if title == "noah supernet" else Silent(),
    )
    assert result.best.parameters <= 2000


def test_folders_of_other_runs_and_damaged_files_are_refused(procedure, whole, make_host, tmp_path):
    out, _ = whole
    (out / SEARCH).write_text("{")
    with pytest.raises(CheckpointError, match=r"search\.json cannot be read"):
        procedure(out)
    (out / SEARCH).unlink()
    with pytest.raises(TrainingError, match="holds a run already, and no search"):
        procedure(out)


def test_a_part_with_sizes_is_just_trained(procedure, tmp_path):
    part = Noah((1,), (1,), (1,))
    result = procedure(tmp_path / "sizes", part=part)
    assert result.best is None and result.part == part
    assert not (tmp_path / "sizes" / SUPERNET).exists()
    with pytest.raises(TrainingError, match="nothing to search"):
        search_noah(part, lambda part: None, None, None, tmp_path, SETTINGS)


def test_several_processes_are_refused(procedure, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="one process"):
        procedure(tmp_path / "distributed")


def test_the_bar_prints_a_line_per_generation_where_there_is_no_terminal(procedure, tmp_path, capsys):
    procedure(tmp_path / "lines", search_progress=SearchBar)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("search")]
    assert [line.split(":")[0] for line in lines] == [f"search generation {g}/3" for g in (1, 2, 3)]
    assert all("best val acc" in line and "M parameters" in line for line in lines)


def test_command_line(photos, tmp_path):
    out = tmp_path / "run"
    options = ("--supernet-epochs", 2, "--epochs", 2, "--population", 3, "--generations", 2, "--lr", 0.01)
    more = ("--batch-size", 18, "--limit", 0.03, "--device", "cpu")
    arguments = ["noah", *map(str, (photos, "--out", out, *options, *more))]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    spec = next(line for line in first.stdout.splitlines() if "--method" in line).split("--method ")[1]
    assert json.loads((out / "dyntune.json").read_text())["spec"] == spec
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert report["spec"] == report["method"] == spec
    assert report["trainable_params"] <= 30_000
    refused = CliRunner().invoke(app, [*arguments, "--method", "noah:prompts=1,ranks=1,bottlenecks=1"])
    assert "noah without sizes" in str(refused.exception)
