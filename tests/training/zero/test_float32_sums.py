import torch
from torch import nn

from recurrent_bart.training.zero.float32_sums import add_gradients


def test_a_parameter_without_a_gradient_in_a_pass_keeps_its_sum():
    passes = [[1.0, None, None], [None, 2.0, None], [256.0, None, None]]
    sums = [None, None, None]
    for gradients in passes:
        sums = add_gradients(sums, [None if g is None else torch.tensor([g]).bfloat16() for g in gradients])
    assert sums == [257.0, 2.0, None]
    assert {total.dtype for total in sums[:2]} == {torch.float32}


def test_a_gradient_is_not_changed_by_what_is_added_to_its_sum():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    (total,) = add_gradients([None], [weight.grad])
    add_gradients([total], [torch.ones(2)])
    assert weight.grad.tolist() == [1.0, 1.0]
