"""The tiny model of the tests."""

import torch
from transformers import BartConfig, BartForConditionalGeneration, MBartConfig, MBartForConditionalGeneration

from recurrent_bart import RecurrentBartConfig, RecurrentBartForConditionalGeneration
from recurrent_bart.recurrence.segmentation import pad_segments

# large weights, so that the model is far from linear and errors show
TINY = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "dropout": 0.0,
    "hidden_dropout_prob": 0.0,
}
# the same sizes without the recurrence's fields
PLAIN = {name: value for name, value in TINY.items() if name != "hidden_dropout_prob"}
# gradient elements per reduction bucket. DeepSpeed's default takes 2 GB of addresses per engine, which a process does
# not get back; after several engines it could not fork any more
BUCKET = {"reduce_bucket_size": 1_000_000}
PLAIN_CLASSES = {
    "bart": (BartForConditionalGeneration, BartConfig),
    "mbart": (MBartForConditionalGeneration, MBartConfig),
}
# fields of layers with BART's and with MBart's order of norms
NORM_ORDERS = {"post-norm": {}, "pre-norm": {"normalize_before": True}}
RECURRENT = {"pre_seq_len": 3, "segment_size": 8, "prefix_hidden_size": 10, "bptt_depth": -1}

# fields that change the computation of diagonals
DIAGONALS = {
    "gated": {"prefix_attention": "gated"},
    "concat": {"prefix_attention": "concat"},
    "own projection": {"prefix_projection": False, "update_gate": False},
    "windows": {"bptt_depth": 1},
    "memory": {"decoder_context": "memory", "bptt_depth": 1},
    "pre-norm": {"normalize_before": True, "prefix_attention": "gated"},
}


@torch.no_grad()
def open_gates(model):
    """Set zero-initialized parameters to random values, so that tests do not run half of the model at zero."""
    for name, parameter in model.named_parameters():
        if "gate" in name or name.endswith("bias"):
            parameter.normal_(0.0, 0.5)


@torch.no_grad()
def plain_model(family="bart", **changes):
    """Return a tiny plain BART or MBart in evaluation mode, with random norms; extra arguments change fields."""
    kind, config = PLAIN_CLASSES[family]
    model = kind(config(**{**PLAIN, **changes})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def multilingual_tokenizer(kind, texts=("a b c d e", "der Text, the text"), **languages):
    """Return a tiny tokenizer of class MBartTokenizer or MBart50Tokenizer; `languages` are src_lang and tgt_lang."""
    pieces = ["▁", *sorted({character for text in texts for character in text if not character.isspace()})]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    codes = list(kind().lang_code_to_id)
    vocabulary = [(token, 0.0) for token in special] + [(piece, -2.0) for piece in pieces]
    vocabulary += [(code, 0.0) for code in [*codes, "<mask>"]]
    return kind(vocab=vocabulary, **languages)


def random_ids(*shape, vocab_size=60):
    """Return ids without special tokens."""
    return torch.randint(4, vocab_size, shape)


def batch_of(lengths):
    """Return ids of documents with segments of these lengths, as lists and as one padded batch with its mask."""
    documents = [[random_ids(n).tolist() for n in segments] for segments in lengths]
    input_ids = pad_segments(documents, padding=-1)
    return documents, input_ids.clamp(min=1), (input_ids >= 0).long()


def tiny_model(**changes):
    """Return a tiny model with open gates; extra arguments change fields."""
    model = RecurrentBartForConditionalGeneration(RecurrentBartConfig(**{**TINY, **RECURRENT, **changes}))
    open_gates(model)
    return model


def two_steps(model, lengths, task):
    """Return losses and gradients of two steps; documents and weights change between the steps."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        _, input_ids, mask = batch_of(lengths)
        labels = random_ids(*input_ids.shape[:2], 4).masked_fill(~mask.bool()[:, :, :1], -100)
        model.zero_grad()
        labels = labels if task == "sections" else labels[:, 0]
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        found += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 0.9)
    return found
