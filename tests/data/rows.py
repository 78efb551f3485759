"""Rows and files for the tests of this folder."""

import json

import dataset_utils
from config.hyperparameters import DatasetSubset, DataSource

WHOLE = [DatasetSubset(ratio=1.0)]
USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}


def load_sft_dataset(name, shares, seed, **source):
    sources = [
        DataSource(name, s.subset, ratio=s.ratio, number_of_samples=s.number_of_samples, **source) for s in shares
    ]
    return dataset_utils.load_sft_dataset(sources, seed)


def load_dpo_dataset(sources, seed):
    sources = [DataSource(source) if isinstance(source, str) else source for source in sources]
    return dataset_utils.load_dpo_dataset(sources, seed)


def says(content):
    return {"role": "assistant", "content": content}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def pairs(count, tag=""):
    return [{"prompt": f"{tag}{n}", "chosen": "good", "rejected": "bad"} for n in range(count)]
