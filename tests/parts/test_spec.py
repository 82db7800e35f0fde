"""The written forms of parts, and what a wrong one is told."""

import copy
import pickle
import re
from dataclasses import dataclass, replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dyntune
from dyntune.core.errors import SpecError, TrainingError
from dyntune.parts.methods.adaptformer import AdaptFormer
from dyntune.parts.policies.dispatch import Dispatch
from dyntune.parts.presets.dyt import DyT
from dyntune.parts.registry import part_from_dict, resolve
from dyntune.parts.spec import Part, format_spec, split_spec
from dyntune.training.settings import TrainSettings


@dataclass(frozen=True)
class Listed(Part):
    """A part with lists and optional values.

    Args:
        layers: which layers.
        names: which names.
        limit: how many at most.
        flag: whether it
            is on.
        blocks: numbers of blocks, or all.
    """

    layers: tuple[int, ...] = ()
    names: tuple[str, ...] = ("q", "v")
    limit: int | None = None
    flag: bool = False
    blocks: tuple[int, ...] | Literal["all"] | None = (0, 1)


@pytest.mark.parametrize(
    "text,parts",
    [
        ("dyt", [("dyt", {})]),
        ("dyt:", [("dyt", {})]),
        ("dyt:rate=0.7", [("dyt", {"rate": "0.7"})]),
        ("dyt:rate=0.7, dispatch=attn", [("dyt", {"rate": "0.7", "dispatch": "attn"})]),
        ("linear+dispatch:rate=0.5", [("linear", {}), ("dispatch", {"rate": "0.5"})]),
        ("linear + dispatch", [("linear", {}), ("dispatch", {})]),
        ("x:a=1e+3,b=2E+5+y:c=1e+1", [("x", {"a": "1e+3", "b": "2E+5"}), ("y", {"c": "1e+1"})]),
        ("x:layers=1/2/3", [("x", {"layers": "1/2/3"})]),
        ("moe-adapter+dispatch", [("moe-adapter", {}), ("dispatch", {})]),
    ],
)
def test_split(text, parts):
    assert split_spec(text) == parts


@pytest.mark.parametrize(
    "text,said",
    [
        ("", "no name"),
        (":rate=1", "no name"),
        ("dyt:rate", "not key=value"),
        ("dyt:rate=", "not key=value"),
        ("dyt:=3", "not key=value"),
        ("dyt:rate=0.5,rate=0.6", "given twice"),
    ],
)
def test_malformed_specs_are_refused(text, said):
    with pytest.raises(SpecError, match=said):
        resolve([text])


def test_values_get_the_types_of_their_fields():
    assert resolve(["dyt:rate=1,bottleneck=16,scale=learnable,dispatch=attn-mlp,rate_weight=1e+3"]) == (
        DyT(rate=1.0, bottleneck=16, scale="learnable", dispatch="attn-mlp", rate_weight=1000.0),
    )
    rate = resolve(["dyt:rate=1"])[0].rate
    assert type(rate) is float
    assert type(DyT(rate=1).rate) is float


@pytest.mark.parametrize(
    "values,expected",
    [
        ({"layers": "1/2/3", "names": "k"}, Listed((1, 2, 3), ("k",))),
        ({"limit": "5", "flag": "true"}, Listed(limit=5, flag=True)),
        ({"limit": "none", "flag": "False"}, Listed()),
        ({"flag": "yes"}, Listed(flag=True)),
        ({"flag": "0"}, Listed(flag=False)),
        ({"blocks": "2"}, Listed(blocks=(2,))),
        ({"blocks": "all"}, Listed(blocks="all")),
        ({"blocks": "none"}, Listed(blocks=None)),
    ],
)
def test_lists_options_and_switches(values, expected):
    part = Listed.from_strings(values)
    assert part == expected
    (_, written), *rest = split_spec(format_spec(part))
    assert not rest
    assert Listed.from_strings(written) == part


def test_lists_come_back_from_json_as_tuples():
    assert Listed(layers=[1, 2]) == Listed(layers=(1, 2))


def test_descriptions_are_read_from_the_docstring():
    assert Listed.options() == {
        "layers": "which layers.",
        "names": "which names.",
        "limit": "how many at most.",
        "flag": "whether it is on.",
        "blocks": "numbers of blocks, or all.",
    }
    assert Listed.summary() == "A part with lists and optional values."


@pytest.mark.parametrize(
    "text,near,names",
    [
        ("adaptformr", "'adaptformer'", ("adaptformer", "dispatch", "dyt", "full", "linear", "moe-adapter")),
        ("dyt:rat=0.5", "'rate'", ("rate", "dispatch", "bottleneck", "scale")),
        ("dyt:bottelneck=8", "'bottleneck'", ("rate", "bottleneck")),
    ],
)
def test_unknown_names_are_told_the_nearest_and_all(text, near, names):
    with pytest.raises(SpecError) as error:
        resolve([text])
    assert f"Did you mean {near}" in str(error.value)
    assert all(name in str(error.value).partition("Known: ")[2] for name in names)


def test_a_name_that_is_near_to_nothing_gets_no_guess():
    with pytest.raises(SpecError) as error:
        resolve(["zzzzzz"])
    assert "Did you mean" not in str(error.value)
    assert "Known: " in str(error.value)


@pytest.mark.parametrize(
    "text,said",
    [
        ("dyt:rate=half", "dyt: rate='half' is not valid: expected a number"),
        ("dyt:rate=nan", "expected a number"),
        ("dyt:rate=inf", "expected a number"),
        ("dyt:bottleneck=8.5", "expected a whole number"),
        ("dyt:bottleneck=1e3", "expected a whole number"),
        ("dyt:scale=free", "expected a number or one of learnable"),
        ("dyt:dispatch=mpl", "expected one of mlp, attn, attn-mlp, layer"),
        ("dyt:rate=50", "dyt: expected rate between 0 and 1; given 'dyt:rate=50'."),
        ("dyt:bottleneck=0,rate=0.3", "dyt: expected bottleneck of at least 1; given 'dyt:rate=0.3,bottleneck=0'."),
        ("dyt:experts=2,bottleneck=0", "dyt: expected bottleneck of at least 1; given 'dyt:"),
        ("dyt:rate=1.5", "rate between 0 and 1"),
        ("dyt:experts=0", "at least 1 expert"),
        ("adaptformer:bottleneck=0", "bottleneck of at least 1"),
        ("lora:rank=1000000000000", "lora: rank=1000000000000 is beyond 65,536, which no backbone has room for."),
        ("dyt:complete_every=65537", "beyond 65,536"),
        ("evit:layers=3/70000", "layers=3/70000 is beyond 65,536"),
    ],
)
def test_bad_values_are_told_what_was_expected(text, said):
    with pytest.raises(SpecError) as error:
        resolve([text])
    assert said in str(error.value)


@pytest.mark.parametrize(
    "values,said",
    [
        ({"layers": "1/x"}, "whole number"),
        ({"flag": "maybe"}, "true or false"),
        ({"limit": "a"}, "a whole number or none"),
    ],
)
def test_bad_lists_and_switches(values, said):
    with pytest.raises(SpecError, match=said):
        Listed.from_strings(values)


@pytest.mark.parametrize(
    "options",
    [
        {"bottleneck": 8.0},
        {"bottleneck": "8"},
        {"bottleneck": True},
        {"bottleneck": None},
        {"dropout": "0.1"},
        {"dropout": True},
        {"dropout": float("nan")},
        {"scale": "fixed"},
        {"scale": [0.1]},
        {"where": 1},
        {"where": ["mlp"]},
    ],
)
def test_values_of_another_type_are_refused(options):
    (name,) = options
    with pytest.raises(SpecError, match=f"adaptformer: {name}=.* is not valid: expected"):
        AdaptFormer(**options)
    with pytest.raises(SpecError, match="is not valid: expected"):
        part_from_dict({"type": "adaptformer", **options})


@pytest.mark.parametrize("data", [{}, {"type": None}, {"type": "nothing"}, {"type": "dyt", "rat": 0.5}])
def test_json_of_no_part_is_refused(data):
    with pytest.raises(SpecError, match="unknown"):
        part_from_dict(data)


@pytest.mark.parametrize("items", [[5], [None], [["dyt"]], [DyT]])
def test_items_that_are_neither_text_nor_part_are_refused(items):
    with pytest.raises(SpecError, match="spec string"):
        resolve(items)


def test_texts_and_parts_may_be_mixed():
    assert resolve(["linear", Dispatch(rate=0.2), "full+dyt"])[1] == Dispatch(rate=0.2)
    assert [part.name() for part in resolve(["linear", Dispatch(rate=0.2), "full+dyt"])] == [
        "linear",
        "dispatch",
        "full",
        "dyt",
    ]


def test_tuning_without_any_part_is_refused(make_host):
    with pytest.raises(SpecError, match="no tuning method"):
        dyntune.tune(make_host())


@given(
    rate=st.floats(0, 1),
    temperature=st.floats(1e-300, 3e38),
    weight=st.floats(0, 3e38),
    where=st.sampled_from(["mlp", "attn", "attn-mlp", "layer"]),
)
def test_any_part_comes_back_from_its_spec(rate, temperature, weight, where):
    part = Dispatch(rate=rate, temperature=temperature, rate_weight=weight, where=where)
    assert resolve([format_spec(part)]) == (part,)
    assert resolve([f"linear+{format_spec(part)}+full"])[1] == part


@given(st.text(alphabet="dyt:=,+rate0.5-/ e", max_size=20))
def test_any_text_gives_parts_or_a_spec_error(text):
    try:
        parts = resolve([text])
    except SpecError:
        return
    assert resolve(["+".join(map(format_spec, parts))]) == parts


def test_a_missing_colon_is_named():
    with pytest.raises(SpecError, match="has no colon between name and options"):
        split_spec("tome r=3")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lora:r=8", "lora: unknown option 'r'. Did you mean 'rank'? Known: dropout, "),
        ("lora:lora_alpha=16", "Did you mean 'scale' (scale is lora_alpha / rank)?"),
        ("lora:target_modules=qkv", "Did you mean 'targets'?"),
        ("adapter:reduction_factor=16", "Did you mean 'bottleneck' (bottleneck is the width of the tokens / "),
        ("adaptformer:bottleneck_size=4", "Did you mean 'bottleneck'?"),
        ("adaptformer:drop=0.1", "Did you mean 'dropout'?"),
        ("vpt:num_tokens=4", "Did you mean 'prompts'?"),
        ("evit:keep_rate=0.7", "Did you mean 'keep'?"),
        ("dyt:target_rate=0.5", "Did you mean 'rate'?"),
        ("tome:alpha=2", "tome: unknown option 'alpha'. Known: "),
        ("linear_probe", "Did you mean 'linear'?"),
    ],
)
def test_names_that_other_libraries_have_are_known(spec, said):
    with pytest.raises(SpecError, match=re.escape(said)):
        resolve([spec])


def test_arguments_in_python_are_told_the_nearest_option_too():
    with pytest.raises(SpecError, match=r"lora: unknown option 'r'.*mean 'rank'"):
        dyntune.LoRA(r=8)
    with pytest.raises(SpecError, match=r"unknown option 'botleneck'.*mean 'bottleneck'"):
        dyntune.AdaptFormer(botleneck=8)
    part = dyntune.LoRA(rank=3)
    assert pickle.loads(pickle.dumps(part)) == copy.copy(part) == replace(part) == part
    with pytest.raises(TrainingError, match=r"unknown training option 'learning_rate'.*mean 'lr'"):
        TrainSettings.of(learning_rate=0.1)
    with pytest.raises(TrainingError, match=r"unknown training option 'num_train_epochs'.*mean 'epochs'"):
        TrainSettings.of(num_train_epochs=3)
