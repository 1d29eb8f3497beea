"""Tests that Hugging Face's Seq2SeqTrainer trains the model and logs the right loss."""

import os

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify

from processes import run_in_processes
from tiny import random_ids, tiny_model

N_DOCUMENTS, RATE = 8, 0.1


@pytest.fixture
def documents():
    """Return flat documents of one to four segments with targets of different lengths."""
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
    """Run one step over all documents; the loss weights every target token equally."""
    torch.manual_seed(0)
    model = tiny_model().train()
    loss = model(**collate(documents)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return float(loss.detach()), model.state_dict()


@pytest.mark.slow
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
    # the trainer rounds logged values
    assert loss == pytest.approx(expected_loss, abs=1e-3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "fields",
    [{}, {"pre_seq_len": 0}, {"decoder_context": "all"}, {"recurrence": "none"}],
    ids=["state", "no recurrence", "all", "static"],
)
def test_predictions_and_metrics_are_of_logits_as_bart_gives_them(documents, tmp_path, fields):
    """Evaluate without `predict_with_generate`: the trainer collects all outputs that are not ignored."""
    seen = []

    def compute_metrics(predictions):
        seen.append(predictions.predictions)
        return {}

    model = tiny_model(**fields)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=3, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Seq2SeqTrainer(model, arguments, data_collator=collate, compute_metrics=compute_metrics)
    logits, encoded = trainer.predict(documents).predictions
    assert len(seen) == 1
    expected = model.eval()(**collate(documents[:3])).logits.detach()
    found = torch.tensor(logits[:3, : expected.shape[1]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(encoded) == len(logits) == N_DOCUMENTS


@pytest.mark.parametrize("fields", [{}, {"decoder_context": "all"}], ids=["last", "all"])
def test_states_of_batches_can_be_put_together(documents, fields):
    model = tiny_model(**fields).eval()
    first, second = (nested_detach(model(**collate(documents[part])).state) for part in (slice(3), slice(3, 8)))
    whole = nested_concat(first, second, padding_index=0)
    assert torch.equal(whole.memory, torch.cat([first.memory, second.memory]))
    assert {len(tensor) for tensor in whole.values()} == {N_DOCUMENTS}
    assert torch.equal(torch.tensor(nested_numpify(first).memory), first.memory)


@pytest.mark.distributed
def test_states_are_gathered_over_processes(tmp_path):
    def work(rank):
        # accelerate looks at what a launcher would have set
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        PartialState._reset_state()
        assert PartialState(cpu=True).num_processes == 2
        torch.manual_seed(0)
        model, ids = tiny_model(decoder_context="all").eval(), random_ids(4, 30)
        with torch.no_grad():
            whole = model(ids, labels=ids[:, :4]).state
            own = model(ids[2 * rank : 2 * rank + 2], labels=ids[:2, :4]).state
        gathered = gather(pad_across_processes(own, dim=1))
        return all(torch.allclose(gathered[name], tensor, atol=1e-5) for name, tensor in whole.tensors().items())

    assert run_in_processes(work, 2, tmp_path) == [True, True]
