"""The product of a BERT run: a folder that transformers loads, with its tokenizer, our settings and a model card.

    AutoModelForQuestionAnswering.from_pretrained("runs/x/model")      AutoTokenizer.from_pretrained("runs/x/model")

    config.json, model.safetensors    as transformers' own save_pretrained writes them
    tokenizer.json, ...               without MiniLM's truncation and padding
    qa.json                           what prediction needs: window, overlap, no-answer threshold
    README.md                         the model card: base, data and size, recipe, scores

`BertProduct` is what train_bert.py hands to evaluator.py.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from qa.bert.model import BertSpanModel
from qa.data.squad import SquadData
from qa.evaluation.results import model_card, read_settings
from qa.options import BertOptions
from qa.predict import Prediction, predict_bert
from qa.training.checkpoint import write_json
from qa.training.distributed import Runtime, barrier, default_micro_tokens
from qa.training.precision import Precision


class BertProduct:
    """Predicts with the model in training, and saves it."""

    def __init__(self, model: BertSpanModel, forward: nn.Module, tokenizer, train_data: SquadData, options: BertOptions,
                 precision: Precision, runtime: Runtime) -> None:
        self.model, self.forward, self.tokenizer = model, forward, tokenizer  # `forward` may be the compiled model
        self.train_data, self.options, self.precision, self.runtime = train_data, options, precision, runtime
        self.folder = Path(options.out) / "model"
        finish_replacing(self.folder, runtime)

    def predict(self, data: SquadData) -> list[Prediction]:
        options = self.options
        predictions, _ = predict_bert(
            self.forward, self.tokenizer, data.examples, max_length=options.max_length, overlap=options.overlap,
            max_answer_length=options.max_answer_length, num_best=1, is_v2=data.is_v2, precision=self.precision,
            micro_tokens=default_micro_tokens(options.micro_tokens, self.runtime.device), runtime=self.runtime)
        return predictions

    def save(self, step: int, na_threshold: float | None, metrics: dict[str, Any]) -> None:
        if self.runtime.is_main:
            options = self.options
            settings = {"max_length": options.max_length, "overlap": options.overlap,
                        "max_answer_length": options.max_answer_length, "na_threshold": na_threshold,
                        "is_v2": self.train_data.is_v2, "step": step}
            recipe = f"windows of {options.max_length} tokens, overlap {options.overlap}"
            card = model_card("BERT for extractive question answering", options, self.train_data, self.precision.name,
                              recipe, step, metrics)
            save_bert(self.model, self.tokenizer, self.folder, settings, card)
        barrier(self.runtime)

    def restore(self) -> tuple[int, float | None]:
        self.model.load_state_dict(load_file(self.folder / "model.safetensors"))
        settings = read_settings(self.folder)
        return settings["step"], settings["na_threshold"]


def save_bert(model: BertSpanModel, tokenizer, folder: Path, settings: dict[str, Any], card: str) -> None:
    """Write the folder under a hidden name, then put it in the place of an earlier one."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = copy.deepcopy(model.config)
    config.architectures = ["BertForQuestionAnswering"]
    config.num_labels = 2
    config.dtype = "float32"
    config.save_pretrained(temporary)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    (temporary / "model.safetensors").chmod(0o644)  # safetensors' own mode is for the owner only
    tokenizer.save_pretrained(temporary)
    write_json(temporary / "qa.json", settings)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    replace_folder(temporary, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`. A folder cannot be renamed onto another, so the old one steps aside first."""
    aside = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(aside)
    new.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def finish_replacing(folder: Path, runtime: Runtime) -> None:
    """Put the old folder back if `replace_folder` was killed between its two renames; delete it if after them."""
    aside = folder.with_name(f".{folder.name}.old")
    if runtime.is_main and aside.exists():
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)
    barrier(runtime)
