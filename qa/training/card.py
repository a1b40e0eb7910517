"""The model card, README.md beside the weights: YAML for the Hugging Face hub, then base, data, recipe, threshold, scores.

Used by the train scripts, through training/product.py.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from qa.data.squad import HUB_NAMES
from qa.options import TrainOptions
from qa.training.precision import Precision
from qa.training.run import versions

TITLES = {"bert": "An encoder with a span head, for extractive question answering",
          "lora": "A LoRA adapter for extractive question answering"}


def model_card(options: TrainOptions, num_questions: int, precision: Precision, recipe: str, step: int,
               chosen: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The text of the card.

    recipe: what only this family has, such as the window length. chosen: see Product.save. metrics: a float is in percent.
    """
    metadata = {
        "base_model": options.model, "datasets": [HUB_NAMES[options.train_data]] if options.train_data in HUB_NAMES else [],
        "library_name": "peft" if options.kind == "lora" else "transformers", "license": "unknown",
        "metrics": ["exact_match", "f1"], "pipeline_tag": "question-answering"}
    length = f"{options.max_steps} steps" if options.max_steps else f"{options.epochs} epochs"
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in metadata.items()), "---",
             f"# {TITLES[options.kind]}", "",
             f"- base: {options.model}",
             f"- training data: {options.train_data}, {num_questions:,} questions trained on",
             f"- recipe: {length}, batch {options.batch_size}, AdamW, lr {options.lr:g}, warm-up "
             f"{options.warmup:g}, weight decay {options.weight_decay:g}, clip {options.clip:g}, seed {options.seed}, "
             f"data seed {options.data_seed}, {precision.name}; {recipe}",
             f"- machine: {torch.get_num_threads()} threads; "
             + ", ".join(f"{name} {version}" for name, version in versions().items()),
             f"- weights: those of step {step}"]
    if chosen.get("na_threshold") is not None:
        lines.append(f"- no answer where the no-answer score is above {chosen['na_threshold']:g}, chosen on held-out training "
                     "articles")
    if chosen.get("temperature") is not None:
        lines.append(f"- confidences: temperature {chosen['temperature']:.3g}, fitted on held-out training articles")
    lines += [f"- scores: official rules, on {options.dev_data}" if "f1" in metrics else "- not scored on development data",
              "- licence: that of the base model, and of the data, decide", ""]
    if metrics:
        lines += ["| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
                  for name, value in metrics.items()]
    return "\n".join(lines) + "\n"
