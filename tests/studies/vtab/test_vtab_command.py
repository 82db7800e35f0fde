"""``dyntune vtab`` as users call it."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

import dyntune
from dyntune.commands.main import app
from dyntune.core.errors import DyntuneError
from dyntune.studies.vtab.tasks import VTAB_1K

SHORT = ("--epochs", "1", "--batch-size", "8", "--device", "cpu")


def vtab(*arguments):
    done = CliRunner().invoke(app, ["vtab", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    """KITTI as VTAB-1K has it, with the number of images that it has there, all the same picture."""
    root = tmp_path_factory.mktemp("vtab-1k")
    picture = root / "picture.jpg"
    Image.new("RGB", (32, 32), (90, 60, 30)).save(picture)
    for split, size in {"train800": 800, "val200": 200, "train800val200": 1000, "test": 711}.items():
        folder = root / "kitti" / "images" / split
        folder.mkdir(parents=True)
        names = [f"images/{split}/{number:06d}.jpg" for number in range(size)]
        for name in names:
            (root / "kitti" / name).hardlink_to(picture)
        (root / "kitti" / f"{split}.txt").write_text("".join(f"{n} {i % 4}\n" for i, n in enumerate(names)))
    return root


def test_a_task_with_the_images_of_vtab_1k_is_complete(kitti, tmp_path):
    arguments = ("--methods", "linear", "--tasks", "kitti", "--device", "cpu", "--out", tmp_path / "run")
    assert "to do: linear on kitti, seed 0" in vtab(kitti, *arguments, "--dry-run").stdout


def test_missing_tasks_are_all_named_before_anything_is_made(kitti, tmp_path):
    with pytest.raises(DyntuneError) as caught:
        vtab(kitti, "--methods", "linear", "--out", tmp_path / "run")
    assert all(task.title in str(caught.value) for task in VTAB_1K.tasks if task.folder != "kitti")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_lists_jobs_and_makes_nothing(mini_root, tmp_path):
    arguments = (mini_root, "--methods", "linear,dyt:rate=0.5,scale=1", "--seeds", "0,1", "--out", tmp_path / "run")
    text = vtab(*arguments, *SHORT, "--dry-run", "--search", 2).stdout
    assert "to do: dyt:rate=0.5,scale=1 on digits, search" in text and "36 of 36 jobs to do" in text
    report = json.loads(vtab(*arguments, *SHORT, "--dry-run", "--json").stdout)
    assert len(report["jobs"]) == 24 and {job["state"] for job in report["jobs"]} == {"to do"}
    assert not (tmp_path / "run").exists()


def test_a_folder_is_refused_before_the_lists_are_read(mini_root, tmp_path, monkeypatch):
    monkeypatch.setattr("dyntune.commands.vtab.find_folders", lambda *given: pytest.fail("the lists were read"))
    (tmp_path / "notes.txt").touch()
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DyntuneError, match="holds something else than a benchmark run"):
            vtab(mini_root, "--methods", "linear", "--out", out, *SHORT)


@pytest.mark.slow
def test_all_tasks_run_and_failures_are_named_at_the_end(mini_root, tmp_path):
    run = tmp_path / "run"
    arguments = (
        mini_root,
        "--methods",
        "linear,adaptformer+dispatch:rate=0.7",
        "--tasks",
        "cells",
        "--out",
        run,
    )
    options = (*SHORT, "--seeds", "0,3", "--select", "test", "--normalisation", "none")
    done = vtab(*arguments, *options)
    assert "Shapes" not in done.stdout and "±" in done.stdout and "4/4" in done.stderr
    assert "adaptformer+dispatch:rate=0.7" in (run / "table.tex").read_text()
    trained = (
        "Recipe dyt with epochs 1 (preset 100), batch_size 8 (preset 64), warmup_epochs 0.1 (preset 10), precision "
        "fp32 (preset fp16), normalisation none (preset inception); trained on train800val200, epoch picked on the "
        "test images that it is reported on; backbone weights of vit_mini_patch4_32.dyntune; no search."
    )
    assert trained in done.stdout and trained in (run / "table.md").read_text()
    assert (run / "table.tex").read_text().startswith(f"% vtab-mini: {trained} Measured on ")
    job = run / "jobs" / "linear" / "cells" / "seed-3"
    assert dyntune.load(job / "run").preprocessing.mean == (0, 0, 0)
    (job / "result.json").unlink()
    (job / "failed.json").write_text('{"kind": "DataError", "error": "a bad day"}')
    with pytest.raises(DyntuneError, match=r"(?s)1 job failed.*--retry-failed.*a bad day"):
        vtab(*arguments, *options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "lineer"), "linear"),
        (("--methods", "linear", "--seeds", "0,x"), "whole numbers"),
        (("--methods", "linear", "--recipe", "dytt"), "Did you mean 'dyt'"),
        (("--methods", "linear", "--tasks", "digitz"), "Did you mean 'digits'"),
        (("--methods", "linear", "--model", "vit_basement"), "vit_basement"),
        (("--methods", "linear", "--weights", "missing.npz"), "missing.npz"),
        (("--methods", "linear", "--recipe", "fact"), "at most 24"),
        (("--methods", "full", "--full-lr", "0"), "above 0"),
        (("--methods", "linear", "--storage", "sqlite:///trials.db"), "does nothing without"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(mini_root, tmp_path, arguments, words):
    with pytest.raises(DyntuneError, match=words):
        vtab(mini_root, *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
