"""ToMe against logits recorded from the public code, and against its steps written out for one image."""

import pytest
import torch

import dyntune

RECORDED = {
    "tome:r=8": (".4272 .6136 -1.0297 -2.0852 .3975 | .4685 .4922 -1.2329 | 22.4818", 101),
    "tome:r=8,proportional=false": (".4404 .6552 -.9826 -2.0418 .3980 | .4707 .4959 -1.2385 | 22.4480", 101),
    "tome:r=7": (".4283 .6304 -1.0278 -2.0842 .3993 | .4777 .5247 -1.2492 | 22.4874", 113),
    "tome:r=8,inflect=-1": (".3742 .6103 -1.0081 -2.1677 .3743 | .5285 .5103 -1.3014 | 22.5489", 106),
    "tome:r=16": (".3597 .5939 -1.0190 -2.1709 .3795 | .5052 .5107 -1.3174 | 22.7514", 11),
    "tome:r=60": (".3172 .6930 -1.1937 -2.4141 .2274 | .6658 .4166 -1.1054 | 22.7560", 2),
}
LARGEST = {"tome:r=8": 52, "tome:r=8,proportional=false": 55, "tome:r=60": 196}
HOSTS = ("plain", "deit3", "registers", "distilled", "average", "qk_norm", "swiglu", "oblong", "clip", "siglip")


@pytest.mark.parametrize("spec", RECORDED)
@torch.no_grad()
def test_logits_recorded_from_the_public_code(recorded, spec):
    line, count = RECORDED[spec]
    model = dyntune.tune(recorded.host(), "linear", spec).eval()
    output = model.run(recorded.images)
    recorded.check(output.logits, line)
    assert output.tokens.x.shape[1] == output.reductions[-1].count == count
    sizes = output.tokens.sources.sizes
    assert sizes.sum(1).tolist() == [196, 196]
    if spec in LARGEST:
        assert sizes[0].max() == LARGEST[spec]
    if spec == "tome:r=8":
        assert sizes[0, :5].tolist() == [1, 1, 2, 1, 1]
    for image, expected in zip(recorded.images, output.logits, strict=True):
        torch.testing.assert_close(model(image[None])[0], expected, atol=1e-5, rtol=1e-5)
