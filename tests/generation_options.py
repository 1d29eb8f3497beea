"""Random models, documents and options of `generate`, for comparisons of the fast loop with Hugging Face's."""

import random

import torch
from transformers import GenerationMixin

from tiny import tiny_model

FIELDS = [
    {"prefix_attention": "gated"},
    {"prefix_attention": "concat"},
    {"decoder_context": "memory", "prefix_attention": "gated"},
    {"decoder_context": "all"},
    {"pre_seq_len": 0},
    {"normalize_before": True, "prefix_attention": "gated"},
    {"scale_embedding": True, "tie_word_embeddings": False},
    {"decoder_attention_heads": 2, "activation_function": "relu", "decoder_layers": 1},
]


def documents(seed, n_documents):
    """Return a ragged batch: ids and mask of documents of one to three segments."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(n_documents, 3, 8, dtype=torch.long)
    for row in range(n_documents):
        n_segments, n_tokens = (int(torch.randint(1, most, (), generator=generator)) for most in (4, 9))
        mask[row, n_segments:] = mask[row, n_segments - 1, n_tokens:] = 0
    ids = torch.randint(4, 60, mask.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def options(seed):
    """Return random options of `generate`; all kinds of search and all processors occur."""
    draw = random.Random(seed)
    found = {"max_new_tokens": draw.choice([1, 5, 12, 30])}
    kind = draw.choice(["greedy", "greedy", "beams", "beams", "beams", "sampling"])
    if kind == "beams":
        found["num_beams"] = draw.choice([2, 3, 4])
        found["length_penalty"] = draw.choice([0.0, 0.5, 1.0, 2.0, -1.0])
        found["early_stopping"] = draw.choice([True, False, "never"])
        found["num_return_sequences"] = draw.randint(1, found["num_beams"])
    if kind == "sampling" or (kind == "beams" and draw.random() < 0.2):
        found["do_sample"] = True
        found["num_return_sequences"] = draw.randint(1, found.get("num_beams", 3))
        samplers = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9}
        samplers |= {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01}
        found |= dict(draw.sample(sorted(samplers.items()), 2))
    processors = {
        "no_repeat_ngram_size": draw.choice([1, 2, 3]),
        "repetition_penalty": draw.choice([0.8, 1.3]),
        "min_new_tokens": draw.randint(1, 4),
        "min_length": draw.randint(1, 4),
        "forced_bos_token_id": draw.randint(4, 59),
        "forced_eos_token_id": draw.choice([None, 2, [2, 9]]),
        "eos_token_id": draw.choice([None, 2, [2, 5, 11], [4, 77]]),
        "suppress_tokens": draw.sample(range(60), 9),
        "begin_suppress_tokens": draw.sample(range(60), 9),
        "bad_words_ids": [[draw.randint(4, 59)], [7, 8]],
        "exponential_decay_length_penalty": (3, 1.2),
        "renormalize_logits": True,
        "remove_invalid_values": True,
        "pad_token_id": draw.choice([0, 3]),
    }
    found |= dict(draw.sample(sorted(processors.items(), key=lambda item: item[0]), draw.randint(0, 5)))
    if found.get("eos_token_id", 2) is None:
        found = {name: value for name, value in found.items() if not name.startswith(("min_", "exponential"))}
        found.pop("bad_words_ids", None)
    # Hugging Face refuses to suppress a forced token
    forced = {2, 9, found.get("forced_bos_token_id")}
    for name in {"suppress_tokens", "begin_suppress_tokens"} & found.keys():
        found[name] = [token for token in found[name] if token not in forced]
    if draw.random() < 0.15:
        found["decoder_input_ids"] = torch.tensor([[2, *draw.sample(range(4, 60), draw.randint(1, 4))]])
    return found


def random_case(seed, n_documents):
    """Return a random model, documents and options."""
    torch.manual_seed(seed)
    model = tiny_model(**FIELDS[seed % len(FIELDS)], forced_eos_token_id=[None, 2][seed % 3 == 0]).eval()
    with torch.no_grad():
        model.final_logits_bias.normal_(0.0, 0.3)
    how = options(seed)
    if "decoder_input_ids" in how:
        how["decoder_input_ids"] = how["decoder_input_ids"].expand(n_documents, -1)
    return model, documents(seed, n_documents), how


def generate(model, inputs, how, **extra):
    """Return ids generated with a fixed seed."""
    torch.manual_seed(5)
    return model.generate(**inputs, **how, **extra)


def count_loops(monkeypatch):
    """Return a growing list of the calls of Hugging Face's loops over tokens."""
    calls = []
    for name in ("_sample", "_beam_search"):
        loop = getattr(GenerationMixin, name)

        def counted(*args, loop=loop, **kwargs):
            calls.append(loop.__name__)
            return loop(*args, **kwargs)

        monkeypatch.setattr(GenerationMixin, name, counted)
    return calls
