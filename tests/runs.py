"""Short runs: documents of a few words, flags for a training of one or two seconds, and a folder with a model."""

import json
import random
import shutil

import torch

from recurrent_bart.data.tokenizer import save_tokenizer, train_tokenizer
from recurrent_bart.run_folder import RunFolder
from tiny import tiny_model

WORDS = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen", "koi", "owl", "pig", "ram")


def write_documents(folder):
    """Write `train.jsonl` and `validation.jsonl`, which both tasks can read; their content is fixed."""
    choice = random.Random(0)
    for split, n_documents in (("train", 24), ("validation", 5)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(n_documents):
                n_words = [choice.randint(8, 30) for _ in range(choice.randint(1, 3))]
                sections = [" ".join(choice.choices(WORDS, k=count)) for count in n_words]
                summaries = [" and ".join(section.split()[: choice.randint(1, 3)]) for section in sections]
                record = {"id": f"{split}-{number}", "sections": sections, "summaries": summaries}
                file.write(json.dumps(record) + "\n")
    return folder


def flags(documents, output_dir, **changes):
    """Return the command line of a run on the documents of a folder; extra arguments add or change flags."""
    values = {
        "train_file": documents / "train.jsonl",
        "validation_file": documents / "validation.jsonl",
        "cache_dir": documents / "cache",
        "output_dir": output_dir,
        "vocab_size": 320,
        "segment_size": 16,
        "pre_seq_len": 3,
        "max_target_length": 8,
        "max_steps": 6,
        "warmup_steps": 2,
        "eval_every": 2,
        "log_every": 1,
        "eval_documents": 3,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0,
        "timeout_minutes": 2,
        "wandb_mode": "disabled",
        **changes,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def cut_off(run, copy):
    """Copy a run that saved its last model after step 4, as if it had been cut off after the checkpoint of step 2."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000004")


def write_run_with_model(path, texts, arguments, **changes):
    """Write the folder of a run with these arguments: a tiny model and a tokenizer trained on `texts`."""
    torch.manual_seed(0)
    folder = RunFolder(path)
    folder.create()
    tokenizer = train_tokenizer(texts, vocab_size=320)
    tiny_model(vocab_size=len(tokenizer), **changes).save_pretrained(folder.model)
    save_tokenizer(tokenizer, folder.model)
    folder.write_config(arguments=arguments)
    return folder
