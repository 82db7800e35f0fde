"""What transformers' Trainer and hubs do with a tuned model, on tiny models and without a network."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import dyntune
from dyntune.backbones.hosts import create_backbone
from dyntune.core.errors import CheckpointError, SpecError, TrainingError
from dyntune.model import hub
from dyntune.model.adapter_folder import CONFIG, TRAINER_WEIGHTS, WEIGHTS
from dyntune.model.rates import dispatchers

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
    with pytest.raises(TypeError, match="without labels"):
        model(batch["pixel_values"], labels=batch["labels"])
    with pytest.raises(TypeError, match="output_hidden_states=True"):
        model(pixel_values=batch["pixel_values"], output_hidden_states=True)
    model(pixel_values=batch["pixel_values"], return_dict=True, output_attentions=False)
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")


def test_a_host_of_timm_answers_with_a_dictionary(make_host):
    model = dyntune.tune(make_host(), "dyt").eval()
    answer = model(pixel_values=images(), labels=torch.tensor([0, 1, 2]))
    assert answer["loss"].ndim == 0 and torch.equal(answer["logits"], model(images()))
    assert not hasattr(model, "config")


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


@pytest.fixture(params=["transformers", "timm"])
def anywhere(request, fresh, make_host):
    """``anywhere(spec)``: tuned models on a host of either library, each time the same weights."""
    return fresh if request.param == "transformers" else lambda spec="dyt:rate=0.5": dyntune.tune(make_host(), spec)


@torch.no_grad()
def test_its_state_is_that_of_the_trained_tensors(anywhere, tmp_path):
    model, other = anywhere(), anywhere()
    for tensor in model.saved_state().values():
        tensor += 0.1
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert not other.load_state_dict(state).missing_keys
    assert torch.equal(other.eval()(images()), model.eval()(images()))
    assert state.keys() == {*model.saved_state(), CONFIG}
    frozen = [p for p in other.backbone.parameters() if not p.requires_grad]
    other.load_state_dict(state, assign=True)
    assert {*frozen} <= {*other.backbone.parameters()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(state | {"host.head.weight": torch.zeros(1, 1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*backbone.host.head.bias"):
        other.load_state_dict(state | {"backbone.host.head.bias": state["host.head.bias"]})
    del state["host.head.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*host.head.bias"):
        other.load_state_dict(state)
    assert other.load_state_dict(state, strict=False).missing_keys == ["host.head.bias"]
    other.fold()
    assert other.state_dict().keys() == {f"backbone.{name}" for name in other.backbone.state_dict()}


def test_its_state_keeps_its_shapes_when_classes_are_named(anywhere):
    model = anywhere()
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.classes = [f"class {number}" for number in range(len(model.classes or model.backbone.heads[0].bias))]
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


@torch.no_grad()
def test_wrapped_models_take_their_own_state(anywhere):
    model, other = anywhere(), anywhere()
    for tensor in model.saved_state().values():
        tensor += 0.1
    for wrap in (torch.nn.Sequential, lambda module: torch.compile(module, backend="eager")):
        assert not wrap(other).load_state_dict(wrap(model).state_dict()).unexpected_keys
        assert torch.equal(other.eval()(images()), model.eval()(images()))


@torch.no_grad()
def test_a_state_of_another_model_is_told(fresh, caplog):
    state = fresh("adaptformer:scale=1").state_dict()
    fresh("adaptformer:scale=1").load_state_dict(state)
    assert not caplog.messages
    fresh("adaptformer:scale=0.1").load_state_dict(state)
    assert "adaptformer:scale=1" in caplog.text and "adaptformer" in caplog.text


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

    def file_exists(self, repo_id, filename, revision=None):
        return (self.root / repo_id / filename).exists()

    def parse_safetensors_file_metadata(self, repo_id, filename, revision=None):
        return SimpleNamespace(tensors=safetensors.torch.load_file(self.root / repo_id / filename))

    def upload_folder(self, repo_id, folder_path, delete_patterns=None, **about):
        for name in delete_patterns or ():
            (self.root / repo_id / name).unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        (self.root / "about.json").write_text(json.dumps(about))
        return SimpleNamespace(commit_url=f"hub://{repo_id}/1")

    def snapshot_download(self, repo_id, revision=None, token=None, allow_patterns=()):
        if not (self.root / repo_id).is_dir():
            raise OSError(f"no repository {repo_id}")
        assert {CONFIG, WEIGHTS} <= {Path(pattern).name for pattern in allow_patterns}
        return str(self.root / repo_id)


@torch.no_grad()
def test_a_model_goes_to_a_hub_and_comes_back(fresh, host_folder, tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model = fresh().eval()
    assert model.push_to_hub("me/flowers", commit_message="First") == "hub://me/flowers/1"
    assert json.loads((tmp_path / "hub" / "about.json").read_text())["commit_message"] == "First"
    assert {path.name for path in Path(tmp_path / "hub" / "me" / "flowers").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    host = create_backbone(f"hf:{host_folder}")
    loaded = dyntune.TunedModel.from_pretrained("me/flowers", backbone=host)
    assert torch.equal(loaded(images()), model(images()))
    with pytest.raises(CheckpointError, match=r"nobody/none.*fetch dyntune.json and dyntune.safetensors"):
        dyntune.TunedModel.from_pretrained("nobody/none")


@torch.no_grad()
def test_what_a_trainer_has_pushed_is_replaced_and_other_weights_stay(fresh, host_folder, tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model = fresh().eval()
    for repository, held in (("me/trained", model.state_dict()), ("me/host", {"weight": torch.zeros(1)})):
        hub.create_repo(repository)
        safetensors.torch.save_file(held, hub.root / repository / TRAINER_WEIGHTS)
        model.push_to_hub(repository)
        assert (hub.root / repository / TRAINER_WEIGHTS).exists() == (repository == "me/host")
        loaded = dyntune.TunedModel.from_pretrained(repository, backbone=create_backbone(f"hf:{host_folder}"))
        assert torch.equal(loaded(images()), model(images()))


@torch.no_grad()
def test_an_adapter_is_found_in_a_subfolder_and_folders_have_no_revisions(fresh, host_folder, tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model = fresh().eval()
    model.save(hub.root / "me" / "many" / "flowers")
    for place in ("me/many", hub.root / "me" / "many"):
        host = create_backbone(f"hf:{host_folder}")
        loaded = dyntune.TunedModel.from_pretrained(place, subfolder="flowers", backbone=host)
        assert torch.equal(loaded(images()), model(images()))
    with pytest.raises(CheckpointError, match="is a folder, which has no revision 'v2'"):
        dyntune.TunedModel.from_pretrained(hub.root, revision="v2")
    with pytest.raises(CheckpointError, match="the name is empty"):
        dyntune.TunedModel.from_pretrained("")


def test_a_hub_is_not_told_where_the_backbone_lies_on_this_machine(
    host_folder, two_blocks, tmp_path, monkeypatch, caplog
):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    hosts = create_backbone(f"hf:{host_folder}"), create_backbone("vit_two_blocks", weights=two_blocks)
    for number, host in enumerate(hosts):
        model = dyntune.tune(host, "linear").eval()
        assert str(tmp_path.parent.parent) in json.dumps(model.describe())
        model.push_to_hub(f"me/{number}")
        folder = tmp_path / "hub" / "me" / str(number)
        assert all(str(tmp_path.parent.parent) not in (folder / name).read_text() for name in (CONFIG, "README.md"))
        assert "does not say from where" in caplog.messages.pop()
    images = torch.randn(2, 3, 32, 32)
    loaded = dyntune.load(folder, weights=two_blocks)
    assert torch.equal(loaded(images), model(images))
    assert model.origin.weights is not None  # what is uploaded alone lacks it


def test_a_folder_with_two_adapters_is_refused(fresh, tmp_path):
    model = fresh("linear")
    model.save(tmp_path)
    safetensors.torch.save_file(model.state_dict(), tmp_path / TRAINER_WEIGHTS)
    with pytest.raises(CheckpointError, match="holds two adapters"):
        dyntune.load(tmp_path)
    model.save(tmp_path)  # replaces both
    dyntune.load(tmp_path)


def test_hosts_for_other_problems_are_refused(host_folder):
    host = transformers.AutoModelForImageClassification.from_pretrained(
        host_folder, problem_type="multi_label_classification"
    )
    with pytest.raises(SpecError, match=r"problem_type='multi_label_classification'.*TunedModel.task"):
        dyntune.tune(host, "linear")


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True])
def test_biases_that_a_merge_adds_are_read_again(make_hf, randomise, tmp_path, wrapped):
    host = randomise(make_hf("vit", qkv_bias=False))
    if wrapped:
        peft = pytest.importorskip("peft")
        names = ["query", "value"] if hasattr(host, "vit") and hasattr(host.vit, "encoder") else ["q_proj", "v_proj"]
        host = peft.get_peft_model(host, peft.LoraConfig(target_modules=names, modules_to_save=["classifier"]))
    model = dyntune.tune(host, "ssf").eval()
    for tensor in model.saved_state().values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    expected = model(images())
    model.merge().save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images()).logits, expected, atol=1e-5, rtol=1e-5)


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
            seen.append((model.backbone.step, model.backbone.shared["dispatch-mlp"].progress))
            torch.testing.assert_close(gate.bias_pace.item(), 6 / (3 * 1e-2), rtol=1e-5, atol=0)

    model = fresh()
    # An epoch has 4 batches, so its second update has one of them.
    train = trainer(model, tmp_path / "run", max_steps=3, gradient_accumulation_steps=3, learning_rate=1.0)
    train.create_optimizer_and_scheduler(3)
    for group in train.optimizer.param_groups:
        group["initial_lr"] = 1e-2  # the pace follows the optimiser, not the arguments
    train.add_callback(dyntune.CourseCallback())
    train.add_callback(Watching())
    train.train()
    assert seen == [
        (3, pytest.approx(2 / 9)),
        (4, pytest.approx(3 / 9)),
        (9, pytest.approx(8 / 9)),
    ]
    gate = model.backbone.blocks[0].mlp.dispatcher
    assert not gate.paced and model.backbone.steps is None
    loaded = dyntune.load(tmp_path / "run" / "checkpoint-3")
    torch.testing.assert_close(loaded.backbone.blocks[0].mlp.dispatcher.gate.bias, gate.gate.bias)


def test_the_complete_model_runs_in_every_kth_step_of_a_trainer_too(fresh, tmp_path):
    model = fresh("dyt:complete_every=4,complete_during=0/1")
    passes = []
    run = model.run

    def watched(images, *, complete=False):
        passes.append(complete)
        return run(images, complete=complete)

    model.run = watched
    train = trainer(model, tmp_path, max_steps=6)
    train.add_callback(dyntune.CourseCallback())
    train.train()
    # Dispatched, and behind the first and the fifth step's pass the complete model.
    assert passes == [False, True, False, False, False, False, True, False]


def test_no_model_is_the_best_before_its_gates_have_settled(fresh, tmp_path):
    class Falling(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_falling"] = -state.global_step

    best = {"load_best_model_at_end": True, "metric_for_best_model": "falling", "greater_is_better": True}
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4}
    train = trainer(fresh("dyt:course=0.1/0.5"), tmp_path, **best, **each)
    train.add_callback(dyntune.CourseCallback())
    train.add_callback(Falling())
    train.train()
    assert train.state.best_global_step == 3


@pytest.mark.parametrize(("name", "paced"), [("AdamW", True), ("SGD", False)])
def test_a_pace_is_for_optimisers_of_adams_kin(fresh, tmp_path, name, paced):
    model = fresh()
    optimizer = getattr(torch.optim, name)([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    dyntune.CourseCallback().on_train_begin(
        transformers.TrainingArguments(str(tmp_path), use_cpu=True),
        transformers.TrainerState(max_steps=10),
        None,
        model=model,
        optimizer=optimizer,
    )
    dyntune.training_loss(model.train(), images(), torch.arange(3))
    assert model.backbone.blocks[0].mlp.dispatcher.paced == paced


def test_only_training_goes_along_the_course(fresh):
    model = fresh()
    with pytest.raises(SpecError, match="above 0, or None"):
        model.begin_training(10, 0.0)
    model.begin_training(10, 1e-2)
    dyntune.training_loss(model.eval(), images(), torch.arange(3))
    assert model.backbone.step == 0


def test_a_state_goes_back_into_gates_that_are_paced(anywhere):
    model = anywhere()
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
    other = anywhere()
    other.load_state_dict(state)
    plain = other.backbone.blocks[0].mlp.dispatcher
    assert not plain.paced and torch.equal(plain.gate.weight, state["blocks.0.mlp.dispatcher.gate.weight"])
    torch.testing.assert_close(other.eval()(images()), model.eval()(images()))


def test_a_look_at_gates_draws_nothing(fresh):
    model = fresh()
    model.begin_training(10, 1e-2)
    dyntune.training_loss(model.train(), images(), torch.arange(3))
    before = torch.get_rng_state()
    model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_trainer_resumes_on_a_host_of_timm(make_host, tmp_path):
    def trained(**options):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(), "dyt:rate=0.5,dropout=0")
        train = trainer(model, tmp_path, max_steps=4, save_steps=2)
        train.add_callback(dyntune.CourseCallback())
        train.add_callback(Watching())
        train.train(**options)
        return model

    class Watching(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            began.append([gate.gate.bias.item() for gate in dispatchers(model.backbone).values()])

    began = []
    model = trained()
    loaded = dyntune.TunedModel.from_pretrained(tmp_path / "checkpoint-4", backbone=make_host())
    torch.testing.assert_close(loaded(images()), model.eval()(images()))
    half = dyntune.load(tmp_path / "checkpoint-2", backbone=make_host())
    trained(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert began == [[2.0] * 3, [gate.gate.bias.item() for gate in dispatchers(half.backbone).values()]]


def test_replicas_of_data_parallel_do_not_train_gates(fresh):
    batch = {"pixel_values": images(), "labels": torch.arange(3)}
    replica = fresh().train()._replicate_for_data_parallel()
    with pytest.raises(TrainingError, match="torchrun"):
        replica(**batch)
    replica.eval()(**batch)
    fresh("linear").train()._replicate_for_data_parallel()(**batch)


def test_a_training_that_asks_for_logits_alone_is_warned_of(make_host, caplog):
    hub._without_terms.cache_clear()
    model = dyntune.tune(make_host(), "dyt").train()
    model(pixel_values=torch.zeros(1, 3, 32, 32))
    assert "lacks the terms" not in caplog.text
    model.begin_training(10, 1e-3)
    model(pixel_values=torch.zeros(1, 3, 32, 32))
    assert "lacks the terms that hold the activation rate" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("spec", ["vpt+tome:r=2", "adaptformer+tome:r=2"])
def test_no_images_are_a_batch_too(make_host, spec):
    model = dyntune.tune(make_host("beit"), spec).eval()
    assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 5)
