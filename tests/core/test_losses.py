"""The terms of the loss against numbers worked out by hand."""

import math

import pytest
import torch

from dyntune.core.losses import distillation_loss, feature_loss, rate_loss, trust


def test_rate_loss_is_the_square_of_one_global_mean():
    gates = [torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])]
    assert rate_loss(gates, 0.5).item() == pytest.approx((5 / 16 - 0.5) ** 2)
    assert rate_loss(gates, 5 / 16).item() == 0


def test_rate_loss_is_zero_for_images_and_blocks_that_even_out():
    """Squared per image or per block it would not be."""
    gates = [torch.tensor([[1.0, 1], [0, 0]]), torch.tensor([[1.0, 1], [1, 1]]), torch.zeros(2, 2)]
    assert rate_loss(gates, 0.5).item() == 0


def test_units_with_fewer_patches_count_alike():
    assert rate_loss([torch.ones(1, 2), torch.zeros(1, 8)], 0.0).item() == pytest.approx(0.25)


def test_gradient_of_rate_loss():
    gate = torch.tensor([[1.0, 0, 0, 1]], requires_grad=True)
    rate_loss([gate, torch.ones(1, 4)], 0.5).backward()
    torch.testing.assert_close(gate.grad, torch.full((1, 4), 2 * (0.75 - 0.5) / 8))


def test_rate_loss_is_computed_in_float32():
    gates = [torch.cat([torch.ones(1, 1001), torch.zeros(1, 999)], dim=1).bfloat16()]
    assert rate_loss(gates, 0.0).item() == pytest.approx((1001 / 2000) ** 2, rel=1e-6)


def kl(p_logits, q_logits):
    """KL(p || q) of one row each."""
    p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (p_logits, q_logits))
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


STUDENT = [[0.5, -1.0, 2.0], [0.0, 0.0, 1.0]]
TEACHER = [[1.5, 0.2, -0.3], [3.0, 0.0, 1.0]]


def test_distillation_is_the_mean_divergence_of_the_student_from_the_teacher():
    expected = sum(map(kl, TEACHER, STUDENT)) / 2
    swapped = sum(map(kl, STUDENT, TEACHER)) / 2
    loss = distillation_loss(torch.tensor(STUDENT), torch.tensor(TEACHER)).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(expected - swapped) > 0.1
    assert distillation_loss(torch.tensor(TEACHER), torch.tensor(STUDENT)).item() == pytest.approx(swapped, rel=1e-5)


def test_distillation_between_equals_is_zero():
    assert distillation_loss(torch.tensor(STUDENT), torch.tensor(STUDENT) + 3).item() == pytest.approx(0, abs=1e-6)


def test_gradient_of_distillation_reaches_the_student_alone():
    student, teacher = (torch.tensor(rows, requires_grad=True) for rows in (STUDENT, TEACHER))
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 2)


def test_feature_loss_is_the_mean_share_of_the_teacher_that_is_missed_beyond_a_margin():
    student, teacher = torch.tensor([[3.0, 4], [0, 2]]), torch.tensor([[3.0, 0], [0, 1]])
    assert feature_loss(student, teacher).item() == pytest.approx((16 / 9 + 1 / 1) / 2 - 0.04)
    of_tokens = feature_loss(student.view(1, 2, 2), teacher.view(1, 2, 2))
    assert of_tokens.item() == pytest.approx((16 + 1) / (9 + 1) - 0.04)
    assert feature_loss(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0


def test_feature_loss_leaves_an_image_alone_that_is_near():
    student = torch.tensor([[1.19, 0.0], [2.0, 0]], requires_grad=True)
    loss = feature_loss(student, torch.tensor([[1.0, 0], [1, 0]]))
    assert loss.item() == pytest.approx((0 + 0.96) / 2)
    loss.backward()
    assert student.grad is not None and student.grad.tolist() == [[0, 0], [1, 0]]


def test_trust_falls_with_the_loss_from_one_and_carries_no_gradient():
    loss = torch.tensor([0.0, 0.25, 1.0], requires_grad=True)
    assert trust(loss).tolist() == pytest.approx([1, 0.223130, 0.00247875], rel=1e-4) and not trust(loss).requires_grad
    assert trust(torch.tensor(-3.0)).item() == 1, "a criterion may fall below 0"


def test_gradient_of_feature_loss_reaches_the_student_alone():
    student, teacher = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    loss = feature_loss(student, 2 * teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and teacher.grad is None
    torch.testing.assert_close(student.grad.float(), torch.full((1, 2), 2 * -1 / 8))
