"""A document whose answer stands in one sentence, and a model whose decoder attends to the answer."""

import torch

from recurrent_bart.inference.summarizer import Summarizer
from summaries import HOW
from tiny import tiny_model

ANSWER = "zebra"
SENTENCES = [
    "ant bee cow. ",
    "dog elk fox.\n",
    f"gnu {ANSWER} hen. ",
    "koi owl pig. ",
    "ram ant dog. ",
    "elk owl bee. ",
    "予算は足りますか？",
    "「はい。」と市長が言った。",
    "🙂 cow ram fox. ",
    "pig hen koi.",
]
TEXT = "".join(SENTENCES)


@torch.no_grad()
def attend_to(model, id):
    """Build weights by hand so that the decoder attends to the positions of one token, wherever it stands."""
    for layer in model.model.encoder.layers:
        for part in (layer.self_attn.out_proj, layer.fc2):
            part.weight.zero_()
            part.bias.zero_()
    model.model.encoder.embed_positions.weight.zero_()
    ids = torch.tensor([[[0, id, 2]]])
    key_D = model.model.encode(ids, torch.ones_like(ids)).last_hidden_state[0, -2]
    for layer in model.model.decoder.layers:
        attention = layer.encoder_attn
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.fill_(1.0)
        attention.k_proj.weight.copy_(10_000 * key_D / key_D.norm() ** 2 * torch.ones_like(key_D).unsqueeze(1))
        attention.k_proj.bias.zero_()
    return model


def citing_summarizer(tokenizer, attends=True, settings=(), **changes):
    """Return a summarizer with citations, which attends to the answer, or to random positions."""
    torch.manual_seed(3)
    config = {"decoder_context": "all", "segment_size": 10, **changes}
    model = tiny_model(vocab_size=len(tokenizer), **config).double().eval().requires_grad_(False)
    others = {id for sentence in SENTENCES if ANSWER not in sentence for id in tokenizer(sentence)["input_ids"]}
    id = next(id for id in tokenizer(f"a {ANSWER}")["input_ids"] if id not in others)
    model = attend_to(model, id) if attends else model
    # bytes are no words, and a word written twice says little
    bytes_and_more = [id for token, id in tokenizer.get_vocab().items() if token.startswith("<")]
    how = HOW | {"suppress_tokens": [id for id in bytes_and_more if id != 2], "no_repeat_ngram_size": 1}
    return Summarizer(model, tokenizer, citations=True, **how, **dict(settings))
