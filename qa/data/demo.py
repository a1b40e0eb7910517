"""The built-in data, for machines that cannot reach the hub: an encyclopedia of an invented world, in SQuAD form.

demo_train.json and demo_held_out.json are official v2.0 files. No name and no phrasing is in both, so a model can learn how to
read, but no answers. Without its unanswerable questions, v2.0 is v1.1. tests/data/encyclopedia.py wrote the files.
Used by: squad.py, for the data sets `demo` and `demo_v2`.
"""

from __future__ import annotations

import json
from pathlib import Path


def demo_squad(split: str, v2: bool = False) -> dict:
    """Official SQuAD JSON. split: "train" or "held_out"."""
    document = json.loads(Path(__file__).with_name(f"demo_{split}.json").read_text(encoding="utf-8"))
    if v2:
        return document
    for article in document["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [qa for qa in paragraph["qas"] if not qa.pop("is_impossible")]
    return document | {"version": "1.1"}
