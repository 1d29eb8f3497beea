"""Tiny models for BERTScore and factuality, whose tokens are words of one letter."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijkl", "."]
SIZES = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = SIZES | {"intermediate_size": 16, "max_position_embeddings": 18}


def save(model, folder):
    """Save a model with a tokenizer whose tokens are words of one letter."""
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def encoder(folder):
    """Save an encoder with random weights and return its path."""
    torch.manual_seed(0)
    return save(BertModel(BertConfig(**TINY, initializer_range=0.5)), folder)


def classifier(folder, **config):
    """Save a classifier of pairs with random weights and return its path."""
    torch.manual_seed(0)
    return save(BertForSequenceClassification(BertConfig(**TINY, initializer_range=0.5, **config)), folder)
