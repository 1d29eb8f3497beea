"""All attention back-ends give equal results or are refused.

Flash attention does not run on a CPU. A stand-in computes the function that its kernels document, from the arguments
that Hugging Face passes.
"""

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash
from transformers import modeling_utils

from recurrent_bart.recurrence.attention import without_cudnn
from tiny import random_ids

# cuDNN's backward pass gives NaN if there is a mask and the keys fill half of a tile of 128
BAD, GOOD = 64, 65
FIELDS = {
    "gated": {"prefix_attention": "gated"},
    "concat": {"prefix_attention": "concat"},
    "top": {"recurrence": "top", "prefix_projection": False},
    "static": {"recurrence": "none"},
    "no recurrence": {"pre_seq_len": 0},
    "gated memory": {"decoder_context": "memory"},
    "concat, all tokens": {"prefix_attention": "concat", "decoder_context": "all"},
    "wavefront": {"schedule": "wavefront"},
    "concat, wavefront": {"prefix_attention": "concat", "schedule": "wavefront"},
}


def kernel(query, key, value, dropout_p=0.0, softmax_scale=None, causal=False):
    """Compute `flash_attn_func` on `(B, L, H, K)`; a causal mask is aligned to the last query and the last key."""
    scores = torch.einsum("bqhk,bahk->bhqa", query, key) * softmax_scale
    if causal:
        n_queries, n_keys = scores.shape[-2:]
        is_future = torch.ones(n_queries, n_keys, dtype=torch.bool).triu(n_keys - n_queries + 1)
        scores = scores.masked_fill(is_future, float("-inf"))
    return torch.einsum("bhqa,bahk->bqhk", scores.softmax(-1), value)


def packed_kernel(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    """Compute `flash_attn_varlen_func` on `(total, H, K)`: concatenated rows with borders in `cu_seqlens`."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()) == (max_seqlen_q, max_seqlen_k)
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(query), len(key))
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    rows = zip(query[None].split(queries, 1), key[None].split(keys, 1), value[None].split(keys, 1), strict=True)
    return torch.cat([kernel(*row, dropout_p, softmax_scale, causal) for row in rows], dim=1).squeeze(0)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Patch the stand-ins in where Hugging Face imports the kernels; return a list of their calls."""
    calls = []

    def noting(function, name):
        def noted(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        # Hugging Face chooses the arguments by the signature
        noted.__signature__ = flash.inspect.signature(function)
        return noted

    kernels = noting(kernel, "even"), noting(packed_kernel, "packed"), None, flash._pad_input, flash._unpad_input
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: kernels)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: False)
    return calls


@pytest.fixture
def documents():
    """Return documents with padding tokens and absent segments."""
    mask = torch.ones(3, 3, 8, dtype=torch.long)
    mask[1, 1:] = 0
    mask[0, 2, 5:] = mask[1, 0, 3:] = 0
    return {"input_ids": random_ids(3, 3, 8), "attention_mask": mask}


def results(model, inputs, attention):
    model.set_attn_implementation(attention)
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return {"logits": output.logits, "loss": output.loss} | {n: p.grad.clone() for n, p in model.named_parameters()}


def check_equal(found, expected, tolerance):
    wrong = [
        name
        for name, tensor in expected.items()
        if (found[name] - tensor).abs().max() > tolerance * tensor.abs().max().clamp(min=1)
    ]
    assert not wrong


@pytest.mark.each_value
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("labels_shape", [(3, 5), (3, 3, 5)], ids=["per document", "per segment"])
def test_eager_and_sdpa_give_the_same_values_and_gradients(make_model, documents, fields, labels_shape):
    model, inputs = make_model(**fields).float(), documents | {"labels": random_ids(*labels_shape)}
    if len(labels_shape) == 3:
        inputs["labels"][1, 1:] = -100
    check_equal(results(model, inputs, "sdpa"), results(model, inputs, "eager"), tolerance=1e-5)


@pytest.mark.each_value
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("labels_shape", [(3, 5), (3, 3, 5)], ids=["per document", "per segment"])
def test_flash_attention_gives_the_values_and_gradients_of_eager(
    make_model, documents, kernel_calls, fields, labels_shape
):
    model, inputs = make_model(**fields), documents | {"labels": random_ids(*labels_shape)}
    if len(labels_shape) == 3:
        inputs["labels"][1, 1:] = -100
    check_equal(results(model, inputs, "flash_attention_2"), results(model, inputs, "eager"), tolerance=1e-10)
    assert set(kernel_calls) == {"even", "packed"}


def test_flash_attention_is_right_where_target_and_context_have_one_length(make_model, kernel_calls):
    """Hugging Face would apply the context's padding mask to the queries."""
    model = make_model(pre_seq_len=0)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 2:] = 0
    inputs = {"input_ids": random_ids(2, 6), "attention_mask": mask, "labels": random_ids(2, 6)}
    check_equal(results(model, inputs, "flash_attention_2"), results(model, inputs, "eager"), tolerance=1e-10)


@pytest.mark.parametrize("fields", [{"prefix_attention": "gated"}, {}], ids=["gated", "concat"])
@pytest.mark.parametrize("how", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_flash_attention_generates_the_same_ids(make_model, documents, kernel_calls, fields, how):
    model = make_model(**fields)
    ids = []
    for attention in ("eager", "flash_attention_2"):
        model.set_attn_implementation(attention)
        ids.append(model.generate(**documents, **how, max_new_tokens=8))
    assert torch.equal(*ids)
    assert "packed" in kernel_calls


def test_flex_attention_is_refused(make_model):
    with pytest.raises(ValueError, match=r"does not support.*flex"):
        make_model().set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"does not support.*flex"):
        make_model(attn_implementation="flex_attention")


@pytest.fixture
def cudnn_calls(monkeypatch):
    """Record for each call of PyTorch's attention: number of keys, presence of a mask, and if cuDNN is enabled."""
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **kwargs):
        calls.append((key.shape[2], attn_mask is not None, torch.backends.cuda.cudnn_sdp_enabled()))
        return attention(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    yield calls
    assert torch.backends.cuda.cudnn_sdp_enabled()


ENCODERS = {"gated": {"prefix_attention": "gated"}, "no recurrence": {"pre_seq_len": 0}}


@pytest.mark.parametrize("n_tokens", [BAD, GOOD])
@pytest.mark.parametrize("fields", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_the_encoders_is_not_cudnns_where_gradients_could_be_nan(
    make_model, cudnn_calls, checkpointing, fields, n_tokens
):
    model = make_model(segment_size=n_tokens, max_position_embeddings=70, **fields).train()
    model.set_gradient_checkpointing(checkpointing)
    mask = torch.ones(2, 2, n_tokens, dtype=torch.long)
    mask[0, :, 5:] = 0
    model.model.encode(random_ids(2, 2, n_tokens), mask).last_hidden_state.sum().backward()
    at_risk = [is_enabled for n_keys, has_mask, is_enabled in cudnn_calls if has_mask and n_keys % 128 == BAD]
    assert bool(at_risk) == (n_tokens == BAD)
    assert not any(at_risk)
    # cuDNN stays enabled elsewhere
    assert all(is_enabled for n_keys, _, is_enabled in cudnn_calls if n_keys % 128 != BAD)


@pytest.mark.parametrize("fields", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_the_decoders_is_never_cudnns_which_plans_for_each_shape(make_model, cudnn_calls, checkpointing, fields):
    model = make_model(**fields).train()
    model.set_gradient_checkpointing(checkpointing)
    read = model.model.encode(random_ids(2, 2, 8))
    cudnn_calls.clear()
    model(encoder_outputs=read, labels=random_ids(2, 5)).loss.backward()
    # per layer: self-attention, cross-attention, and cross-attention to memory if gated; twice under checkpointing
    of_layer = 3 if "prefix_attention" in fields else 2
    n_calls = model.config.decoder_layers * of_layer * (2 if checkpointing == "layer" else 1)
    # the encoder's recomputed calls are not counted
    assert [is_enabled for *_, is_enabled in cudnn_calls][: n_calls // 2] == [False] * (n_calls // 2)
    assert sum(not is_enabled for *_, is_enabled in cudnn_calls) == n_calls


def test_two_threads_put_cudnn_back():
    first, second = without_cudnn(), without_cudnn()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.cuda.cudnn_sdp_enabled()
