"""Data sets as people have them: what ``fit`` and ``evaluate`` take, and what they say of what they do not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchvision.datasets import ImageFolder

import dyntune
from dyntune.core.errors import DataError, DyntuneError, TrainingError
from dyntune.data import ImageSubset, build_transform, load_data
from dyntune.data.datasets import ArrayImages
from dyntune.data.others import accepted
from dyntune.training.evaluate import evaluate
from dyntune.training.seen import Seen
from dyntune.training.trainer import fit

SHORT = {"epochs": 1, "batch_size": 6, "device": "cpu", "seed": 0}


@pytest.fixture
def model(make_host):
    def make(classes=3, spec="linear"):
        torch.manual_seed(0)
        return dyntune.tune(make_host(num_classes=classes), spec)

    return make


def trained(model, data, val=None, **options):
    fit(model, data, val, **SHORT | options)
    return {name: p.clone() for name, p in model.tuned_state().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def splits(photos):
    return load_data(photos)


class Rows(Dataset):
    """Samples of any form, from a list."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def hub(images):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(images.classes))})
    rows = {"image": [], "label": list(images.targets)}
    for image, _ in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        rows["image"].append({"bytes": file.getvalue(), "path": None})
    return datasets.Dataset.from_dict(rows, features=features)


def test_every_kind_of_data_set_of_pictures_trains_to_the_same_weights(model, splits, photos, tmp_path):
    expected = trained(model(), splits.train)
    every = range(len(splits.train))
    pictures = [(image, np.int16(label)) for image, label in splits.train]
    kinds = {
        "subset": Subset(splits.train, every),
        "subset of a subset": Subset(Subset(splits.train, every), torch.tensor(every)),
        "parts": ConcatDataset([Subset(splits.train, every[:20]), Subset(splits.train, every[20:])]),
        "image folder": ImageFolder(photos / "train"),
        "part of an image folder": Subset(ImageFolder(photos / "train"), every),
        "list": pictures,
        "pictures": Rows(pictures),
        "dictionaries": Rows([{"img": image, "labels": torch.tensor(label)} for image, label in splits.train]),
        "hub": hub(splits.train),
        "part of a hub": Subset(hub(splits.train), every),
    }
    for kind, data in kinds.items():
        tuned = model()
        assert same(expected, trained(tuned, data, out=tmp_path / kind)), kind
        if "list" not in kind and "pictures" not in kind and "dict" not in kind:
            assert tuned.classes == ("blue", "green", "red"), kind
            assert len(Seen.read(tmp_path / kind).trained) == 36, kind
    assert Seen.read(tmp_path / "pictures").trained is None
    assert evaluate(tuned, kinds["image folder"]).accuracy == evaluate(tuned, kinds["hub"]).accuracy
    # A run that began with one kind goes on with another, as they are the same images.
    trained(model(), kinds["parts"], out=tmp_path / "subset", resume=True)


@pytest.mark.parametrize("name", ["image", "img"])
def test_of_several_pictures_the_one_that_is_called_as_an_image_is_trained_on(name):
    datasets = pytest.importorskip("datasets")
    mask, image = Image.new("RGB", (8, 8), "black"), Image.new("RGB", (8, 8), "red")
    rows = [{"mask": mask, name: image, "label": number % 2} for number in range(4)]
    features = {"mask": datasets.Image(), name: datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    hub = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    for data in (Rows(rows), hub, hub.with_transform(lambda batch: batch)):
        found, _ = accepted(data).with_transform(lambda picture: picture)[0]
        assert found.getpixel((0, 0)) == (255, 0, 0)
    unknown, _ = accepted(Rows([{"mask": mask, "scene": image, "label": 0}]))[0]
    assert unknown.getpixel((0, 0)) == (0, 0, 0)  # the first


def test_a_random_split_is_two_sets(model, splits):
    parts = random_split(splits.train, [0.75, 0.25], torch.Generator().manual_seed(0))
    tuned = model()
    assert fit(tuned, *parts, **SHORT).best_accuracy is not None
    assert evaluate(tuned, parts[1]).images == 9


def test_tensors_of_every_kind_train_to_the_same_weights(model, splits):
    tuned = model()
    prepared = splits.train.with_transform(build_transform(tuned.preprocessing))
    expected = trained(tuned, prepared)
    images, labels = torch.stack([image for image, _ in prepared]), torch.tensor(prepared.targets)
    mixed = ConcatDataset([Subset(splits.train, range(9)), Subset(prepared, range(9, 36))])
    data = hub(splits.train).with_transform(
        lambda rows: {"pixel_values": list(map(prepared.transform, rows["image"])), "label": rows["label"]}
    )
    kinds = [mixed, data, Subset(prepared, range(36)), ConcatDataset([prepared])]
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    kinds += [TensorDataset(images, labels.to(dtype)) for dtype in integers]
    kinds += [
        Rows(list(zip(images, labels.numpy().astype(dtype), strict=True))) for dtype in ("uint8", "int32", "uint64")
    ]
    for number, kind in enumerate(kinds):
        tuned = model()
        assert same(expected, trained(tuned, kind, kind)), number
        batches = DataLoader(kind, 8) if isinstance(kind, TensorDataset) else kind
        assert evaluate(tuned, batches, count_macs=False).images == 36


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3, 32, 32), 0


X, Y = torch.zeros(6, 3, 32, 32), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataLoader(TensorDataset(X, Y)), "is a DataLoader.*loader.dataset"),
        (Stream(), "is a Stream, which is not read by index"),
        (iter([(X[0], 0)]), "not read by index"),
        ({"train": TensorDataset(X, Y)}, "is a dict of train.*Give one of these"),
        (TensorDataset(X, Y, Y), "sample 0 of the training set is 3 parts"),
        (TensorDataset(X), "sample 0 of the training set is 1 parts"),
        (X, "sample 0 of the training set is a Tensor of float32"),
        (Rows([{"picture": X[0], "name": 3}]), "has the entries picture, name"),
        (TensorDataset(X.byte(), Y), "image 0 of the training set is a Tensor of uint8"),
        (TensorDataset(X.double(), Y), "image 0 of the training set is a Tensor of float64"),
        (Rows([(X[0].numpy(), 0)]), "is a ndarray of float32"),
        (TensorDataset(X[:, 0], Y), r"of shape \(32, 32\)"),
        (TensorDataset(X[:, :1], Y), r"of shape \(1, 32, 32\): the model takes .*\(3, 32, 32\)"),
        (TensorDataset(X.movedim(1, 3), Y), r"of shape \(32, 32, 3\)"),
        (TensorDataset(X[..., :20], Y), r"of shape \(3, 32, 20\)"),
        (Rows([(X[0], 0), (X[0, :, :20], 1)]), r"image 1 of the training set has the shape \(3, 20, 32\)"),
        (TensorDataset(X, Y + 1), "label of sample 2 of the training set is 3. Expected .* 0 to 2"),
        (TensorDataset(X, Y - 1), "label of sample 0 of the training set is -1"),
        (TensorDataset(X, Y.float()), r"label of sample 0 of the training set is tensor\(0\.\)"),
        (TensorDataset(X, Y[:, None]), r"sample 0 of the training set is a Tensor of int64 with the shape \(1,\)"),
        (TensorDataset(X, torch.eye(3)[Y]), r"is a Tensor of float32 with the shape \(3,\)"),
        (Rows([(X[0], 0), (X[0], "1")]), "label of sample 1 of the training set is '1'"),
        (Rows([(X[0], 0), (X[0], 0.5)]), "label of sample 1 of the training set is 0.5"),
        (Rows([(X[0], 0), (X[0], None)]), "label of sample 1 of the training set is None"),
        (ArrayImages(np.zeros((2, 8, 8), np.uint8), [0, 3], "mine"), r"image 1 \(mine image 1\) is 3"),
        ([], "training set is empty"),
    ],
)
def test_what_is_not_as_expected_is_said_before_the_first_step(model, data, words, tmp_path):
    tuned = model()
    state = torch.get_rng_state()
    with pytest.raises(DyntuneError, match=words):
        fit(tuned, data, out=tmp_path / "run", **SHORT)
    assert torch.equal(state, torch.get_rng_state())
    assert not (tmp_path / "run/last").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TensorDataset(X.byte(), Y), "uint8"),
        (TensorDataset(X, Y + 1), "sample 2 of the data set is 3"),
        (DataLoader(TensorDataset(X, Y, Y)), "batch 0 is not one of images and targets"),
        (DataLoader(TensorDataset(X.double(), Y)), "batch 0 is not"),
        (DataLoader(ArrayImages(np.zeros((2, 8, 8), np.uint8), [0, 1], "mine")), "Give the data set itself"),
    ],
)
def test_evaluation_says_it_too(model, data, words):
    with pytest.raises(DataError, match=words):
        evaluate(model(), data)


def test_labels_that_are_no_whole_numbers_are_not_cut():
    with pytest.raises(DataError, match=r"label of image 0 is 0\.7"):
        ArrayImages(np.zeros((1, 8, 8), np.uint8), [0.7], "mine")


def test_classes_that_differ_between_data_sets_are_said(model, splits):
    other = Subset(splits.val, range(4))
    renamed = load_data("digits").val
    renamed.classes = ("blue", "red", "green")
    tuned = model()
    assert fit(tuned, splits.train, other, **SHORT).steps == 6
    with pytest.raises(DataError, match="classes blue, green, red, the validation set blue, red, green"):
        fit(tuned, splits.train, renamed, **SHORT)


def test_labels_that_only_validation_has_are_said(model, caplog):
    tuned = model()
    tuned.classes = ("a", "b", "c")
    fit(tuned, TensorDataset(X[:2], Y[:2]), TensorDataset(X, Y), **SHORT)
    assert "1 label that no training image has, which cannot be learned: 2 (c)" in caplog.text


@pytest.mark.parametrize("names", [(1, 2, 3), np.arange(3)])
def test_class_names_are_texts(model, names):
    with pytest.raises(DyntuneError, match=r"a class is called .*: expected a text for each class"):
        model().classes = names


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c", "d")])
def test_class_names_that_cannot_be_saved_are_said_before_training(model, names, tmp_path):
    tuned = model()
    tuned.classes = names
    with pytest.raises(TrainingError, match=r"model\.classes has .* names"):
        fit(tuned, TensorDataset(X, Y), out=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", ["abc", {"b": 1, "a": 0, "c": 2}])
def test_class_names_in_no_order_of_their_own_are_refused(model, names):
    with pytest.raises(DyntuneError, match="expected a list of names in the order of their labels"):
        model().classes = names


@pytest.mark.parametrize("indices", [[0, 36], [-37], [True, False, True], torch.ones(36, dtype=torch.bool)])
def test_a_subset_of_what_is_not_there_is_refused(model, splits, indices):
    with pytest.raises(DataError, match=r"is a Subset with the index .* of a data set of 36.*torch\.nonzero"):
        fit(model(), Subset(splits.train, indices), **SHORT)


def test_tensors_that_look_as_if_nobody_had_preprocessed_them_are_named(model, caplog):
    fit(model(), TensorDataset(X + 255, Y), **SHORT)
    assert "the first image of the training set has values up to 255" in caplog.text
    with pytest.raises(DataError, match="first image of the training set has values that are not finite"):
        fit(model(), TensorDataset(X * torch.nan, Y), **SHORT)


@pytest.mark.parametrize("names", [[0, 1, 2], np.array(["a", "b", "c"]), ("a", "b", "c")])
def test_class_names_of_a_data_set_become_texts(model, names):
    data = Rows(list(zip(X, Y, strict=True)))
    data.classes = names
    tuned = model()
    fit(tuned, data, **SHORT)
    assert tuned.classes == tuple(map(str, names))


def test_what_a_run_on_a_million_images_has_seen_is_read_again(tmp_path, monkeypatch):
    seen = Seen(frozenset(f"{number:016x}" for number in range(750_000)), frozenset())
    seen.write(tmp_path)
    assert Seen.read(tmp_path) == seen
    monkeypatch.setattr("dyntune.training.seen._MOST", 3)
    data = load_data("digits")
    assert Seen.by(data.train, ImageSubset(data.val, [0, 1])) == Seen(None, frozenset(map(data.val.identity, (0, 1))))
