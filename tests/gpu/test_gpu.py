"""A GPU gives the CPU's results in every training precision; run with `pytest -m gpu`."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from launching import deepspeed
from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkSetting
from recurrent_bart.benchmarks.models.cases import Case
from recurrent_bart.benchmarks.models.measure import Measurement, measure
from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import BatchOrder, Collator, SegmentSizes, plan_documents
from recurrent_bart.execution import grid
from recurrent_bart.model import decoder_context
from recurrent_bart.model.scheduled_sampling import Oracle
from recurrent_bart.recurrence.attention import attend
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.preparation import Documents
from recurrent_bart.training.run_arguments import RunArguments
from recurrent_bart.training.training_batches import TrainingBatches
from recurrent_bart.training.zero.deepspeed_patches import shorten_accelerator_calls
from runs import flags
from tiny import random_ids, tiny_model

pytestmark = pytest.mark.gpu

VARIANTS = {
    "gated": {"prefix_attention": "gated"},
    "concat": {"prefix_attention": "concat"},
    "own projection": {"prefix_projection": False},
    "windows": {"bptt_depth": 1},
    "pre-norm": {"normalize_before": True, "prefix_attention": "gated"},
    "top": {"recurrence": "top"},
    "memory": {"decoder_context": "memory"},
    "section": {"decoder_context": "section", "context_segments": 2},
    "packed section": {"decoder_context": "section"},
    "packed, all": {"decoder_context": "all"},
    "packed, all static": {"decoder_context": "all", "recurrence": "none"},
    "no state": {"decoder_context": "all", "pre_seq_len": 0},
}
CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.fixture(autouse=True)
def packed_contexts(monkeypatch):
    """Pack contexts of target segments even if packing saves little."""
    monkeypatch.setattr(decoder_context, "LEAST_SAVING", 0)


def ragged(task):
    """Return ragged documents with padding inside a segment and after one, and sections of 1 and of 3 segments."""
    mask = torch.ones(3, 4, 8, dtype=torch.long)
    mask[1, 3], mask[1, 2, 5:], mask[2, 1:] = 0, 0, 0
    labels = random_ids(3, 4, 6)
    labels[~mask.bool().any(-1)] = -100
    if task == "sections":
        labels[0, 1:3] = -100
    return {
        "input_ids": random_ids(3, 4, 8),
        "attention_mask": mask,
        "labels": labels if task == "sections" else labels[:, 0],
    }


def run(device, dtype, inputs, grain="none", **fields):
    """Return loss and gradients of a model with the same weights on every device."""
    torch.manual_seed(0)
    model = tiny_model(**fields).to(device, dtype).train()
    model.set_gradient_checkpointing(grain)
    torch.manual_seed(1)
    loss = model(**{name: value.to(device) for name, value in inputs.items()}).loss
    loss.backward()
    return loss.detach().cpu().double(), {name: p.grad.cpu().double() for name, p in model.named_parameters()}


def relative(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))


@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_float32_is_the_processors_float64(fields, task):
    inputs = ragged(task)
    expected_loss, expected = run("cpu", torch.float64, inputs, **fields)
    loss, gradients = run("cuda", torch.float32, inputs, **fields)
    assert relative(loss, expected_loss) < 1e-5
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in gradients.items():
        # the true gradient of k_proj's bias is 0, so a relative error is undefined
        assert float((gradient - expected[name]).norm()) < 1e-4 * float(expected[name].norm()) + 1e-6 * scale, name


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_bfloat16_is_near_the_processors_float64(fields):
    inputs = ragged("sections")
    fields = {**fields, "init_std": 0.05}
    expected_loss, expected = run("cpu", torch.float64, inputs, **fields)
    loss, gradients = run("cuda", torch.bfloat16, inputs, **fields)
    assert relative(loss, expected_loss) < 2e-2
    whole = torch.cat([gradients[name].flatten() for name in expected])
    reference = torch.cat([gradient.flatten() for gradient in expected.values()])
    assert torch.nn.functional.cosine_similarity(whole, reference, dim=0) > 0.99


@pytest.mark.parametrize("grain", ["layer", "segment"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_checkpointing_draws_the_same_dropout_again(fields, grain):
    inputs = ragged("sections")
    fields = {**fields, "dropout": 0.3, "attention_dropout": 0.3, "hidden_dropout_prob": 0.3}
    expected_loss, expected = run("cuda", torch.float32, inputs, **fields)
    loss, gradients = run("cuda", torch.float32, inputs, grain, **fields)
    assert loss == expected_loss
    for name, gradient in gradients.items():
        # the summation order of an embedding's gradient differs from run to run
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_generate_gives_the_processors_ids():
    inputs = ragged("document")
    inputs.pop("labels")
    texts = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = tiny_model().to(device).eval()
        on_device = {name: value.to(device) for name, value in inputs.items()}
        texts.append(model.generate(**on_device, num_beams=3, max_new_tokens=12).cpu())
    assert torch.equal(*texts)


def test_peak_memory_is_that_of_one_window():
    setting = BenchmarkSetting("small", 128, torch.device("cuda"), torch.bfloat16)
    found = {n: Measurement() for n in (4, 32)}
    for n, measurement in found.items():
        case = Case("ours", n, "passes", batch_size=2, task="sections", bptt_depth=1, schedule="auto")
        measure(case, setting, measurement, n_warmup=1, n_passes=0)
    assert found[32].step_bytes < 1.02 * found[4].step_bytes


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.json")))
def test_the_missions_command_trains_in_bfloat16(tmp_path, documents, config):
    arguments = flags(documents, tmp_path / "run", deepspeed=f"ds_configs/{config}", task="sections", max_steps=20)
    code, output = deepspeed("launch/train.py", *arguments, timeout=280)
    assert code == 0, output
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["deepspeed"]["bf16"]["enabled"]


@pytest.mark.parametrize("most_tokens", [1, 10_000])
def test_segments_without_a_state_are_one_batch_of_any_size(monkeypatch, most_tokens):
    """Eight of twelve segments have text, and the number of rows is the next multiple of three documents."""
    monkeypatch.setattr(grid, "MOST_TOKENS", most_tokens)
    model, seen = tiny_model(**VARIANTS["no state"]).to("cuda").train(), []
    model.model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(**{name: value.to("cuda") for name, value in ragged("document").items()})
    assert [tuple(stream.shape[:2]) for stream in seen] == [(9, 8)]


@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
@pytest.mark.parametrize("fields", [{}, VARIANTS["no state"], VARIANTS["packed, all static"]], ids=str)
def test_a_training_step_waits_for_nothing(fields, schedule, task):
    inputs = ragged(task)
    model = tiny_model(schedule=schedule, **fields).to("cuda").train()
    inputs["input_ids"] = inputs["input_ids"].to("cuda")
    model(**inputs).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("oracle", [None, Oracle("word", gold_probability=0.5)], ids=["no oracle", "oracle"])
@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_what_the_host_knows_is_copied_from_pinned_memory(fields, task, oracle):
    """A copy from pageable memory may wait, and PyTorch's sync debug mode does not detect it."""
    inputs = ragged(task)
    inputs["input_ids"] = inputs["input_ids"].to("cuda")
    model = tiny_model(**fields).to("cuda").train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(**inputs, oracle=oracle).loss.backward()
        torch.cuda.synchronize()
    copies = {event.name for event in profile.events() if "HtoD" in event.name}
    assert any("Pinned" in name for name in copies)
    assert not any("Pageable" in name for name in copies)


@pytest.mark.parametrize("n_processes", [0, 2])
def test_batches_of_a_run_are_pinned_and_copied_while_the_host_goes_on(n_processes):
    sizes = SegmentSizes(6, 6, -1)
    corpus = [{"sections": [[7] * n], "summaries": [[8]]} for n in (3, 9, 5, 20)]
    plan = plan_documents([[len(row["sections"][0])] for row in corpus], [[1]] * 4, sizes, n_special=2)
    batches = TrainingBatches(
        Documents(corpus, plan, Collator("document", sizes, [0], [2], 1, 8)),
        BatchOrder(plan.n_segments, global_batch=2, seed=0),
        RunArguments(dataloader_num_workers=n_processes),
        Environment(0, 0, 1, torch.device("cuda")),
        TrainerState(),
    )
    batch = next(batches)
    assert all(tensor.is_pinned() for tensor in (batch.input_ids, batch.attention_mask, batch.labels))
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device = batch.model_inputs(torch.device("cuda"))["input_ids"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_device.cpu(), batch.input_ids)
    batches.close()


@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_a_recorded_training_step_is_the_step_itself(schedule, task):
    torch.manual_seed(0)
    model = tiny_model(schedule=schedule).to("cuda").train()
    ids, labels = random_ids(2, 4, 8).cuda(), random_ids(2, 4, 6).cuda()
    labels = labels if task == "sections" else labels[:, 0].contiguous()

    def step():
        loss = model(ids, labels=labels).loss
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
            model.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    # documents that differ from the captured ones
    ids.copy_(random_ids(*ids.shape))
    labels.copy_(random_ids(*labels.shape))
    for parameter in model.parameters():
        parameter.grad.zero_()
    graph.replay()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    found_loss = float(loss)
    model.zero_grad(set_to_none=True)
    assert float(step()) == pytest.approx(found_loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("n_keys", [64, 192, 448])
def test_gradients_are_finite_where_all_scores_are_far_below_zero(n_keys):
    """Gradients of cuDNN are NaN with a mask and half a tile of keys.

    See https://github.com/pytorch/pytorch/issues/196678.
    """
    torch.manual_seed(0)
    attention = tiny_model(d_model=256, encoder_attention_heads=4).model.encoder.layers[0].self_attn.eval()
    query, key, value = (0.1 * torch.randn(1, 4, n_keys, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    query[..., 0], key[..., 0] = 1.0, -120 / attention.scaling
    parts = [part.requires_grad_() for part in (query, key, value)]
    mask = torch.ones(1, 1, n_keys, n_keys, dtype=torch.bool, device="cuda").tril()
    read, _ = attend(attention, query, (key, value), mask)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(read.square().sum(), parts))


def test_deepspeeds_streams_are_pytorchs():
    """Nested streams, exceptions and `None` behave as in `torch.cuda.stream`."""
    shorten_accelerator_calls()
    accelerator, before = get_accelerator(), torch.cuda.current_stream()
    outer, inner = torch.cuda.Stream(), torch.cuda.Stream()

    def is_current(stream):
        # torch.accelerator returns a torch.Stream, which never equals a torch.cuda.Stream
        return torch.cuda.current_stream() == stream and accelerator.current_stream().stream_id == stream.stream_id

    def fail():
        with accelerator.stream(outer):
            with accelerator.stream(inner), accelerator.stream(None), accelerator.stream(inner):
                assert is_current(inner)
            assert is_current(outer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert is_current(before)
