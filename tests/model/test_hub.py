"""What transformers' Trainer and hubs do with a tuned model, on tiny models and without a network."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dyntune
from dyntune.core.errors import CheckpointError
from dyntune.model.adapter_folder import CONFIG, TRAINER_WEIGHTS, WEIGHTS

transformers = pytest.importorskip("transformers")


class Labelled(torch.utils.data.Dataset):
    """Random images as the Trainer takes them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": image, "labels": index % 5, "name": f"{index}.png"}


@pytest.fixture
def host_folder(make_hf, randomise, tmp_path):
    host = randomise(make_hf("vit"))
    host.config.id2label = dict(enumerate("abcde"))
    host.save_pretrained(tmp_path / "host")
    return tmp_path / "host"


@pytest.fixture
def fresh(host_folder):
    def make(spec="dyt:rate=0.5"):
        torch.manual_seed(0)
        return dyntune.tune(transformers.AutoModelForImageClassification.from_pretrained(host_folder), spec)

    return make


def trainer(model, folder, **settings):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    arguments = transformers.TrainingArguments(**settings)
    return transformers.Trainer(model=model, args=arguments, train_dataset=Labelled(), eval_dataset=Labelled())


def images(batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_by_keyword_the_model_answers_as_transformers_models_do(fresh):
    model = fresh()
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        answer = model.train()(**batch)
        torch.manual_seed(0)
        loss = dyntune.training_loss(model, batch["pixel_values"], batch["labels"])
    assert isinstance(answer, transformers.modeling_outputs.ImageClassifierOutput)
    assert torch.equal(answer.loss, loss.total) and torch.equal(answer.logits, loss.output.logits)
    assert set(loss.terms) > {"task"}  # the loss is DyT's, not the task's alone
    with torch.no_grad():
        answer = model.eval()(**batch)
        assert torch.equal(answer.loss, torch.nn.functional.cross_entropy(answer.logits, batch["labels"]))
        assert torch.equal(model(batch["pixel_values"]), answer.logits)  # a tensor for a tensor
        assert model(pixel_values=batch["pixel_values"]).loss is None
    with pytest.raises(TypeError, match="none were given"):
        model(labels=batch["labels"])


def test_a_host_of_timm_answers_with_a_dictionary(make_host):
    model = dyntune.tune(make_host(), "dyt").eval()
    answer = model(pixel_values=images(), labels=torch.tensor([0, 1, 2]))
    assert answer["loss"].ndim == 0 and torch.equal(answer["logits"], model(images()))
    assert not hasattr(model, "config")
    assert model.state_dict().keys() > {f"backbone.{name}" for name in model.tuned_state()}


@torch.no_grad()
@pytest.mark.parametrize("spec", ["dyt:rate=0.5", "lora:targets=q/v"])
def test_the_trainer_trains_saves_and_resumes_it(fresh, tmp_path, spec):
    model = fresh(spec)
    before = {name: p.clone() for name, p in model.backbone.named_parameters()}
    whole = trainer(model, tmp_path / "run")
    with torch.enable_grad():
        whole.train()
    moved = {name for name, p in model.backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(model.tuned_state())
    model.eval()
    assert whole.evaluate()["eval_loss"] > 0
    predicted = torch.as_tensor(whole.predict(Labelled()).predictions)
    torch.testing.assert_close(predicted[:1], model(Labelled()[0]["pixel_values"][None]), atol=1e-5, rtol=1e-5)
    whole.save_model(str(tmp_path / "final"))
    size = sum(t.numel() * t.element_size() for t in model.saved_state().values())
    assert (tmp_path / "final" / TRAINER_WEIGHTS).stat().st_size < size + 8000  # without the backbone
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-2"):
        loaded = dyntune.TunedModel.from_pretrained(folder)
        assert torch.equal(loaded(images()), model(images()))
        assert loaded.spec == model.spec and loaded.classes == tuple("abcde")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    again = fresh(spec)
    resumed = trainer(again, tmp_path / "run")
    with torch.enable_grad():
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    torch.testing.assert_close(again.eval()(images()), model(images()), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("error:.*checkpointing_.*deprecated")
def test_the_trainer_checkpoints_gradients_and_accumulates_them(fresh, tmp_path):
    model = fresh("linear")
    given = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trained = trainer(model, tmp_path, **given)
    trained.train()
    assert model.backbone.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.backbone.gradient_checkpointing
    other = fresh("linear")
    trainer(other, tmp_path, **(given | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1})).train()
    torch.testing.assert_close(other.tuned_state(), model.tuned_state(), atol=1e-5, rtol=1e-4)  # the loss was divided


@torch.no_grad()
def test_its_state_is_that_of_the_trained_tensors(fresh, tmp_path):
    model, other = fresh(), fresh()
    for tensor in model.saved_state().values():
        tensor += 0.1
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert not other.load_state_dict(state).missing_keys
    assert torch.equal(other.eval()(images()), model.eval()(images()))
    outer = torch.nn.Sequential(model)
    assert {name.removeprefix("0.") for name in outer.state_dict()} == state.keys()
    del state["host.head.bias"]
    with pytest.raises(RuntimeError, match=r"missing \['host.head.bias'\]"):
        other.load_state_dict(state)
    assert other.load_state_dict(state, strict=False).missing_keys == ["host.head.bias"]


@torch.no_grad()
def test_adapter_and_host_may_lie_in_one_folder(fresh, host_folder):
    """transformers reads every adapter_config.json as PEFT's, and fails on another's."""
    model = fresh().eval()
    assert model.save_pretrained(host_folder) == host_folder
    transformers.AutoModelForImageClassification.from_pretrained(host_folder)
    assert torch.equal(dyntune.TunedModel.from_pretrained(host_folder)(images()), model(images()))


class Hub:
    """A hub of one folder for each repository."""

    def __init__(self, root):
        self.root = root

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id, folder_path, **about):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        (self.root / "about.json").write_text(json.dumps(about))
        return SimpleNamespace(commit_url=f"hub://{repo_id}/1")

    def snapshot_download(self, repo_id, revision=None, token=None, allow_patterns=()):
        if not (self.root / repo_id).is_dir():
            raise OSError(f"no repository {repo_id}")
        assert {CONFIG, WEIGHTS} <= set(allow_patterns)
        return str(self.root / repo_id)


@torch.no_grad()
def test_a_model_goes_to_a_hub_and_comes_back(fresh, tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model = fresh().eval()
    assert model.push_to_hub("me/flowers", commit_message="First") == "hub://me/flowers/1"
    assert json.loads((tmp_path / "hub" / "about.json").read_text())["commit_message"] == "First"
    assert {path.name for path in Path(tmp_path / "hub" / "me" / "flowers").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert torch.equal(dyntune.TunedModel.from_pretrained("me/flowers")(images()), model(images()))
    with pytest.raises(CheckpointError, match=r"nobody/none.*fetch dyntune.json and dyntune.safetensors"):
        dyntune.TunedModel.from_pretrained("nobody/none")


def test_a_file_of_another_model_is_no_adapter(host_folder):
    with pytest.raises(CheckpointError, match=r"model.safetensors was not written by Dyntune"):
        dyntune.load(host_folder)


@torch.no_grad()
def test_a_merged_model_is_transformers_own(fresh, tmp_path):
    model = fresh("lora:targets=q/v").eval()
    for tensor in model.saved_state().values():
        tensor += 0.02
    expected = model(images())
    model.merge().save_pretrained(tmp_path / "merged")
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(images()).logits, expected, atol=1e-5, rtol=1e-5)
    assert plain.config.id2label == dict(enumerate("abcde"))


def test_the_callback_tells_the_course_of_a_training(fresh, tmp_path):
    seen = []

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            gate = model.backbone.blocks[0].mlp.dispatcher
            seen.append((model.backbone.step, model.backbone.shared["dispatch-mlp"].progress, gate.paced))

    model = fresh()
    train = trainer(model, tmp_path / "run", max_steps=3, gradient_accumulation_steps=2)
    train.add_callback(dyntune.CourseCallback())
    train.add_callback(Watching())
    train.train()
    assert seen == [
        (2, pytest.approx(1 / 6), True),
        (4, pytest.approx(3 / 6), True),
        (6, pytest.approx(5 / 6), True),
    ]
    gate = model.backbone.blocks[0].mlp.dispatcher
    assert not gate.paced and model.backbone.steps is None
    loaded = dyntune.load(tmp_path / "run" / "checkpoint-3")
    torch.testing.assert_close(loaded.backbone.blocks[0].mlp.dispatcher.gate.bias, gate.gate.bias)


def test_a_state_goes_back_into_gates_that_are_paced(fresh):
    model = fresh()
    model.begin_training(10, 1e-2)
    dyntune.training_loss(model.train(), torch.randn(4, 3, 32, 32), torch.arange(4))
    gate = model.backbone.blocks[0].mlp.dispatcher
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = gate.linear.weight.clone()
    with torch.no_grad():
        gate.gate.weight.zero_()
    model.load_state_dict(state)
    assert gate.paced
    torch.testing.assert_close(gate.linear.weight, before)
