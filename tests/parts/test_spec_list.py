"""Several specs in one text, and the folders that their runs are kept in."""

import pytest

from dyntune.parts.spec_list import folder_name, split_specs


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("dyt:rate=0.5,scale=1", "dyt-rate-0.5-scale-1"),
        ("dyt: rate=0.5, scale=1", "dyt-rate-0.5-scale-1"),
        ("adaptformer+dispatch:rate_of=inference", "adaptformer-dispatch-rate-of-inference"),
        (
            "lora:targets=q/v,dropout_on=hidden+res-tuning-bypass",
            "lora-targets-q-v-dropout-on-hidden-res-tuning-bypass",
        ),
        ("dyt:dispatch=attn-mlp", "dyt-dispatch-attn-mlp"),
        ("fact-tt", "fact-tt"),
    ],
)
def test_ordinary_specs_have_plain_folder_names(spec, name):
    assert folder_name(spec) == name


def test_signs_of_numbers_tell_folders_apart():
    specs = [f"adaptformer:scale={scale}" for scale in ("1", "-1", "+1", "1e-2", "1e+2", "1e2")]
    assert len({folder_name(spec) for spec in specs}) == len(specs)
    assert all(set(folder_name(spec)) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for spec in specs)
    assert split_specs(",".join(specs)) == specs
