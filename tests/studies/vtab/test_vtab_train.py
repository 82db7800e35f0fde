"""What a job trains: the learning rate of full tuning, images of another size, and NOAH's stages."""

import json
from statistics import fmean

import pytest

import dyntune
from dyntune.core.errors import SpecError, TrainingError
from dyntune.data.datasets import FileImages
from dyntune.parts.registry import resolve
from dyntune.studies.noah import SearchSettings
from dyntune.studies.vtab import train as training
from dyntune.studies.vtab.plan import Job
from dyntune.studies.vtab.run import check_methods
from dyntune.studies.vtab.train import base_settings, train_job

SMALL = SearchSettings(population=3, generations=2, parents=2, mutations=1, crossovers=1)


def trained(make_plan, out, spec, img_size=None, **options):
    plan = make_plan(out, specs=(spec,), tasks=("digits",), options={"epochs": 1} | options, img_size=img_size)
    shares = []
    return train_job(Job(spec, "digits", 0), plan, shares.append), shares


def test_full_tuning_takes_a_tenth_of_the_learning_rate(make_plan, tmp_path):
    result, _ = trained(make_plan, tmp_path, "full", lr=0.02)
    assert result.lr == pytest.approx(0.002)
    recipe = make_plan(tmp_path, options={"lr": 0.02}).recipe
    assert base_settings("full", recipe).lr == pytest.approx(0.002)
    assert base_settings("linear", recipe).lr == pytest.approx(0.02)
    assert base_settings("full", recipe.changed(full_lr=1.0)).lr == pytest.approx(0.02)


@pytest.mark.slow
def test_noah_is_searched_and_trained_with_what_was_found(make_plan, tmp_path):
    options = {"noah": SMALL, "supernet": (1.0, 0.5)}
    result, shares = trained(make_plan, tmp_path, "noah:choices=1/2+dispatch:rate=0.5", **options)
    noah, dispatch = resolve([result.trained_spec])
    assert noah.searched and dispatch.rate == 0.5
    assert {*noah.prompts, *noah.ranks, *noah.bottlenecks} <= {0, 1, 2}
    run = Job("noah:choices=1/2+dispatch:rate=0.5", "digits", 0).folder(tmp_path) / "run"
    search = json.loads((run / "search.json").read_text())
    found = {tuple(row["prompts"]) for row in search["candidates"]}
    assert len(search["candidates"]) == 6 and noah.prompts in found
    assert (run / "supernet").is_dir() and (run / "search.png").stat().st_size > 1000
    # The last training has train800 and val200, the supernet train800 alone.
    sizes = [json.loads((folder / "train.json").read_text())["train_images"] for folder in (run / "supernet", run)]
    assert sizes == [16, 24]
    assert shares == sorted(shares)


def test_trainings_of_noah_decode_an_image_once(make_plan, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    decoded = []
    read = FileImages.read
    monkeypatch.setattr(FileImages, "read", lambda self, index: decoded.append(index) or read(self, index))

    def stop(part, build, train, val, train_val, *_, **__):
        preprocessing = build(part).preprocessing
        for images in (train, train_val):
            decoded.clear()
            first, again = images.read(1), images.read(1)
            assert decoded == [1] and first is again
            assert first.size == preprocessing.size[::-1]
        raise Seen

    monkeypatch.setattr(training, "train_noah", stop)
    with pytest.raises(Seen):
        trained(make_plan, tmp_path, "noah:choices=1/2")


def test_noah_is_refused_in_a_search(make_plan, tmp_path):
    with pytest.raises(SpecError, match="searches its own sizes"):
        check_methods(make_plan(tmp_path, specs=("noah",), search=2))


@pytest.mark.parametrize(
    ("batch", "spec", "fields", "images"),
    [
        (25, "linear", {}, 24),
        (24, "linear", {"search": 1}, 16),
        (24, "noah", {}, 16),
        (24, "linear", {"options": {"select": "val"}}, 16),
    ],
)
def test_a_recipe_that_would_drop_every_batch_is_refused(make_plan, tmp_path, batch, spec, fields, images):
    def plan(size):
        options = {"drop_last": True, "batch_size": size} | fields.get("options", {})
        return make_plan(tmp_path, specs=(spec,), **fields | {"options": options})

    with pytest.raises(TrainingError, match=f"--batch-size of at most {images}"):
        check_methods(plan(batch))
    check_methods(plan(images))


def test_images_of_another_size_are_what_is_trained_on(make_plan, tmp_path):
    small, _ = trained(make_plan, tmp_path, "dyt:rate=0.5", img_size=16)
    model = dyntune.load(Job("dyt:rate=0.5", "digits", 0).folder(tmp_path) / "run")
    assert model.preprocessing.size == (16, 16) and model.backbone.grid == (4, 4)
    assert small.macs < model.dense_macs
    assert len(small.activation_per_unit) == 12
    assert fmean(small.activation_per_unit.values()) == pytest.approx(small.activation)


def test_another_image_size_is_another_run(make_plan, tmp_path):
    make_plan(tmp_path / "run").take_folder()
    with pytest.raises(TrainingError, match="img_size was None, is 16"):
        make_plan(tmp_path / "run", img_size=16).take_folder()


def test_what_folds_is_merged_before_it_is_evaluated(make_plan, tmp_path):
    dense, _ = trained(make_plan, tmp_path / "a", "linear")
    lora, _ = trained(make_plan, tmp_path / "b", "lora")
    beside, _ = trained(make_plan, tmp_path / "c", "adaptformer")
    assert lora.macs == dense.macs < beside.macs
    assert lora.trainable_params == 12 * 8 * 4 * 96
