"""Hugging Face's own Seq2SeqTrainer trains the model and reports the right loss."""

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from tiny import random_ids, tiny_model

N_DOCUMENTS, RATE = 8, 0.1


@pytest.fixture
def documents():
    """Flat documents of one to four segments; targets of different lengths."""
    return [
        {"input_ids": random_ids(8 * (number % 4) + 5), "labels": random_ids(3 + number % 3)}
        for number in range(N_DOCUMENTS)
    ]


def collate(rows):
    def pad(name, value):
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    input_ids = pad("input_ids", 1)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 1).long(), "labels": pad("labels", -100)}


def by_hand(documents):
    """One step over all documents: the loss of every target token counts the same."""
    torch.manual_seed(0)
    model = tiny_model().train()
    loss = model(**collate(documents)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return float(loss.detach()), model.state_dict()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_loss_and_weights_are_those_of_plain_pytorch_whatever_the_accumulation(documents, tmp_path, accumulation):
    expected_loss, expected = by_hand(documents)
    torch.manual_seed(0)
    model = tiny_model()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=N_DOCUMENTS // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=documents, data_collator=collate)
    trainer.train()
    (loss,) = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    # the trainer rounds what it logs
    assert loss == pytest.approx(expected_loss, abs=1e-3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5, msg=name)
