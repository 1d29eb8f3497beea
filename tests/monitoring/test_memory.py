"""Measured memory contains live tensors only."""

import torch

from recurrent_bart.monitoring.memory import peak_bytes

CPU = torch.device("cpu")
KIB = 1024


def zeros(n_kib):
    return torch.zeros(n_kib * KIB // 4)


def test_freed_memory_is_not_added_to_later_allocations():
    def work():
        for _ in range(5):
            zeros(8)

    assert peak_bytes(work, CPU) == 8 * KIB


def test_tensors_alive_at_the_same_time_are_added():
    def work():
        first, second = zeros(8), zeros(4)
        view = first.view(2, -1)[0]
        return view, second

    assert peak_bytes(work, CPU) == 12 * KIB


def test_views_and_in_place_writes_take_no_memory():
    outside = zeros(8)
    assert peak_bytes(lambda: outside.view(2, -1).add_(1).t(), CPU) == 0


def test_memory_of_the_autograd_graph_is_counted():
    weight = zeros(8).requires_grad_()

    def work():
        hidden = weight
        for _ in range(10):
            hidden = hidden.exp()
        hidden.sum().backward()

    assert 10 * 8 * KIB <= peak_bytes(work, CPU) <= 13 * 8 * KIB
