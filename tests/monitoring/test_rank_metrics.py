"""Reduction of the metrics of all ranks to one log line."""

import math

import pytest
import torch

from processes import run_in_processes
from recurrent_bart.monitoring import rank_metrics as module
from recurrent_bart.monitoring.rank_metrics import RankMetrics, RankTopology, summarise

PLACES = RankTopology(hosts=["alpha", "alpha", "beta"], nodes=[0, 0, 1], peaks=[1e6, 1e6, 2e6])
RANKS = [
    RankMetrics(
        loss=20.0,
        n_targets=10,
        n_tokens=100,
        n_documents=2,
        n_segments=5,
        n_flops=1e6,
        data_seconds=0.1,
        forward_seconds=0.5,
        backward_seconds=2.0,
        optimizer_seconds=0.25,
        seconds=4.0,
        allocated_bytes=1000,
        reserved_bytes=5000,
        n_retries=1,
        backbone_square=9.0,
        recurrence_square=1.0,
    ),
    RankMetrics(
        loss=90.0,
        n_targets=30,
        n_tokens=200,
        n_documents=2,
        n_segments=7,
        n_flops=2e6,
        data_seconds=0.8,
        forward_seconds=0.6,
        backward_seconds=1.0,
        optimizer_seconds=0.35,
        seconds=4.5,
        allocated_bytes=3000,
        reserved_bytes=4000,
        n_retries=0,
        backbone_square=16.0,
        recurrence_square=3.0,
    ),
    RankMetrics(backbone_square=0.0, recurrence_square=0.0, data_seconds=0.3, forward_seconds=0.1),
]


def test_every_metric_has_its_value():
    assert summarise(RANKS, PLACES, n_steps=2) == pytest.approx(
        {
            "loss": 110 / 40,
            "loss_max": 3.0,
            "gradient_norm_backbone": 5.0,
            "gradient_norm_recurrence": 2.0,
            "tokens_per_second": 75.0,
            "tokens_per_second_per_device": 25.0,
            "model_flops_share": 3e6 / 4.0 / 4e6,
            "step_seconds": 2.0,
            "data_seconds": 0.2,
            "forward_seconds": 0.2,
            "backward_seconds": 0.5,
            "optimizer_seconds": 0.1,
            "slowest_rank": 1,
            "slowest_host": "alpha",
            "slowest_seconds": 0.7,
            "fastest_rank": 2,
            "fastest_host": "beta",
            "fastest_seconds": 0.2,
            "rank_seconds": pytest.approx([0.3, 0.7, 0.2]),
            "memory_allocated_bytes": 3000,
            "memory_reserved_bytes": 5000,
            "memory_retries": 1,
            "segments_per_document": 3.0,
        }
    )


def test_skipped_steps_alone_have_no_loss():
    record = summarise([RankMetrics(seconds=1.0)], RankTopology(["alpha"], [0], [1.0]), n_steps=1)
    assert all(math.isnan(record[name]) for name in ("loss", "loss_max", "gradient_norm_backbone"))


def test_a_share_above_the_peak_is_left_out():
    figures = [RankMetrics(loss=1.0, n_targets=1.0, seconds=2.0, n_flops=6.0)]
    shares = [
        summarise(figures, RankTopology(["a"], [0], [peak]), n_steps=1)["model_flops_share"] for peak in (4.0, 3.0, 2.9)
    ]
    assert shares[:2] == [0.75, 1.0]
    assert math.isnan(shares[2])


def test_memory_on_a_cpu_is_that_of_the_process():
    figures = RankMetrics()
    figures.read_memory(torch.device("cpu"))
    assert 50e6 < figures.allocated_bytes < 1e12


def test_memory_on_a_gpu_is_the_allocator_peak_since_the_last_read(monkeypatch):
    forgotten = []
    cuda = module.torch.cuda
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: 10)
    monkeypatch.setattr(cuda, "max_memory_reserved", lambda device: 20)
    monkeypatch.setattr(cuda, "memory_stats", lambda device: {"num_alloc_retries": 3})
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", forgotten.append)
    figures = RankMetrics()
    figures.read_memory(torch.device("cuda"))
    assert (figures.allocated_bytes, figures.reserved_bytes, figures.n_retries) == (10, 20, 3)
    assert forgotten == [torch.device("cuda")]


def test_hosts_are_numbered_by_their_first_rank(monkeypatch):
    # Two nodes may have the same host name.
    found = [("n", 0, 1.0), ("n", 1, 1.0), ("n", 0, 2.0), ("n", 1, 2.0)]
    monkeypatch.setattr(module, "gather_objects", lambda item: found)
    places = RankTopology.gather(local_rank=0, peak=1.0)
    assert places == RankTopology(["n"] * 4, [0, 0, 1, 1], [1.0, 1.0, 2.0, 2.0])
    assert places.n_nodes == 2
    monkeypatch.setattr(module, "rank", lambda: 3)
    assert places.node == 1


@pytest.mark.distributed
def test_every_rank_gets_all_metrics_in_rank_order(tmp_path):
    def gather(rank):
        figures = RANKS[rank].of_all_ranks(torch.device("cpu"))
        return figures == RANKS, RankTopology.gather(local_rank=0, peak=float(rank)).peaks

    assert run_in_processes(gather, 3, tmp_path) == [(True, [0.0, 1.0, 2.0])] * 3
