"""Words, generation settings and a model for tests that generate texts."""

from tiny import tiny_model

WORDS = [f"the {word} of list_{number}" for number, word in enumerate(dir(str) * 2)]
# generate no special token
HOW = {"max_new_tokens": 12, "min_new_tokens": 12, "suppress_tokens": [0, 1, 3, 4]}


def writing_model(tokenizer, **changes):
    """Return a tiny model in float64 whose texts differ from document to document.

    With the usual initialization a random model repeats one word: the word of the largest embedding.
    """
    model = tiny_model(vocab_size=len(tokenizer), init_std=1.0, **changes).double().eval().requires_grad_(False)
    model.model.shared.weight /= model.model.shared.weight.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return model
