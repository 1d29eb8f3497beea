"""Generation by CUDA graphs: ids, synchronization, memory and speed on a GPU; run with `pytest -m gpu -s`."""

import time

import pytest
import torch

from generation_options import count_loops, documents, generate, random_case
from recurrent_bart.benchmarks.generation.cases import GenerationCase
from recurrent_bart.benchmarks.generation.measure import GenerationModels
from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkSetting
from recurrent_bart.execution.graph_guards import graph_store
from recurrent_bart.model.decoding import latent_layer, session, session_store
from recurrent_bart.model.decoding.cached_decoder import CachedDecoder
from recurrent_bart.model.decoding.cached_layer import CacheShape, Visible
from recurrent_bart.model.decoding.search import draw_unchecked
from tiny import tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Compute float32 products without TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def on_gpu(inputs):
    return {name: part.cuda() if torch.is_tensor(part) else part for name, part in inputs.items()}


@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize("first", range(0, 200, 25))
def test_ids_are_hugging_faces(monkeypatch, first):
    calls = count_loops(monkeypatch)
    for seed in range(first, first + 25):
        model, inputs, how = random_case(seed, 1 + seed % 12)
        model, inputs, how = model.cuda(), on_gpu(inputs), on_gpu(how)
        found = generate(model, inputs, how)
        assert not calls, how
        sessions = graph_store(model).graphs[session_store.SessionStore][1].sessions
        assert sessions
        assert all(session.decoder.is_fused for session in sessions.values())
        expected = generate(model, inputs, how, fast=False)
        assert found.shape == expected.shape, how
        assert torch.equal(found, expected), how
        calls.clear()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "no_repeat_ngram_size": 2}], ids=["greedy", "beams"])
def test_gpu_and_cpu_write_the_same_ids(how):
    texts = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = tiny_model().eval().to(device)
        inputs = {name: part.to(device) for name, part in documents(0, 5).items()}
        texts.append(generate(model, inputs, how | {"max_new_tokens": 20}).cpu())
    assert torch.equal(*texts)


def test_trained_weights_are_used_without_a_new_capture():
    model, how = tiny_model().eval().cuda(), {"max_new_tokens": 12, "num_beams": 2}
    inputs, captured = on_gpu(documents(0, 3)), []
    for _ in range(3):
        assert torch.equal(generate(model, inputs, how), generate(model, inputs, how, fast=False))
        (only,) = graph_store(model).graphs[session_store.SessionStore][1].sessions.values()
        captured.append(only)
        for parameter in model.parameters():
            parameter.data.mul_(0.9)
    assert captured[0] is captured[1] is captured[2]


@pytest.mark.parametrize("how", [{}, {"num_beams": 4, "no_repeat_ngram_size": 3}], ids=["greedy", "beams"])
def test_a_step_does_not_synchronize(monkeypatch, how):
    model, inputs = tiny_model().eval().cuda(), on_gpu(documents(0, 3))
    how = how | {"max_new_tokens": 30, "repetition_penalty": 1.2, "min_new_tokens": 3, "forced_bos_token_id": 7}
    generate(model, inputs, how)
    step, n_steps = session.DecodeSession._step, []

    def checked(self, n_ids):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(self, n_ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        n_steps.append(n_ids)

    monkeypatch.setattr(session.DecodeSession, "_step", checked)
    generate(model, inputs, how)
    assert n_steps


def test_unchecked_draws_are_pytorchs():
    probabilities = torch.rand(16, 50_265, device="cuda").softmax(-1)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = torch.multinomial(probabilities, 1).squeeze(1)
        torch.manual_seed(seed)
        assert torch.equal(draw_unchecked(probabilities), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("d_model", "n_heads", "n_texts"), [(512, 8, 1), (768, 12, 2), (1024, 16, 1)])
@torch.no_grad()
def test_encoder_outputs_give_the_scores_of_keys_and_values(monkeypatch, dtype, d_model, n_heads, n_texts):
    heads = {"encoder_attention_heads": n_heads, "decoder_attention_heads": n_heads}
    model = tiny_model(d_model=d_model, prefix_attention="gated", init_std=0.05, **heads).eval().cuda().to(dtype)
    context = torch.randn(3, 900, d_model, device="cuda", dtype=dtype)
    mask = torch.arange(900, device="cuda") < torch.tensor([[900], [20], [431]], device="cuda")
    # three positions are state
    shape, scores = CacheShape(3, n_texts, 1, 8, 960, True, 3), []
    for share in (1.0, 0.0):
        monkeypatch.setattr(latent_layer, "MEMORY_SHARE", share)
        decoder = CachedDecoder(model, shape, context[:1, :1])
        assert decoder.is_fused
        assert decoder.reads_latents == (share == 0.0)
        decoder.load(context, mask)
        for here in range(2):
            tokens, position = torch.arange(3 * n_texts, device="cuda") + here, torch.tensor([here], device="cuda")
            scores.append(decoder.step(tokens, Visible(position, 8, None, None)))
    for expected, found in zip(scores[:2], scores[2:], strict=True):
        tolerance = {torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))


def test_bfloat16_differs_only_where_the_best_scores_are_within_rounding():
    models = GenerationModels(BenchmarkSetting("base", 512, torch.device("cuda"), torch.bfloat16))
    case = GenerationCase("ours", 1, 16, 512, 64)
    found, expected = models.generator(case)(), models.generator(GenerationCase("eager", 1, 16, 512, 64))()
    for row, other in zip(found.tolist(), expected.tolist(), strict=True):
        first = next((place for place, pair in enumerate(zip(row, other, strict=True)) if pair[0] != pair[1]), None)
        if first is None:
            continue
        # the same text so far: the score of both next tokens in float32
        context = models.context(case)[found.tolist().index(row)]
        model = models.ours.float()
        encoded = (context.float().unsqueeze(0),)
        logits = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([row[:first]]).cuda()).logits[0, -1]
        assert (logits[row[first]] - logits[other[first]]).abs() < 0.02 * logits.abs().max()
        models.ours.to(torch.bfloat16)


def test_a_full_gpu_says_what_to_lower():
    model = GenerationModels(BenchmarkSetting("small", 512, torch.device("cuda"), torch.bfloat16))
    free = torch.cuda.mem_get_info()[0]
    # a context whose keys and values do not fit, although the context does
    n_context = free // (64 * 256 * 2 * 5)
    with pytest.raises(torch.OutOfMemoryError, match="lower the batch size"):
        model.generator(GenerationCase("ours", 1, 64, n_context, 8))()
    torch.cuda.empty_cache()
    assert model.generator(GenerationCase("ours", 1, 2, 64, 8))().shape == (2, 9)


def test_few_bytes_stay_allocated():
    models = GenerationModels(BenchmarkSetting("small", 512, torch.device("cuda"), torch.bfloat16))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for n_context in range(512, 8192, 512):
        models.generator(GenerationCase("ours", 1, 32, n_context, 8))()
    # the caches of the kept sessions, and the memory of their graphs
    assert torch.cuda.memory_allocated() - before < 1.25 * session_store.most_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "least"), [(1, 5.0), (16, 4.0), (32, 4.0), (128, 3.0)])
def test_greedy_search_is_several_times_as_fast_as_hugging_faces(batch_size, least):
    models = GenerationModels(BenchmarkSetting("large", 512, torch.device("cuda"), torch.bfloat16))
    seconds = {}
    for loop in ("ours", "eager", "ours", "eager"):
        call = models.generator(GenerationCase(loop, 1, batch_size, 512, 64))
        call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds[loop] = min(seconds.get(loop, 1e9), time.perf_counter() - started)
    speed = batch_size * 64 / seconds["ours"]
    print(f"batch {batch_size}: {speed:,.0f} tokens/s, {seconds['eager'] / seconds['ours']:.1f} x")
    assert seconds["eager"] / seconds["ours"] > least
