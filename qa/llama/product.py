"""The product of a LLaMA run: a peft adapter with its tokenizer, our settings and a model card.

    peft.PeftModel.from_pretrained(base, "runs/x/model")

    adapter_config.json, adapter_model.safetensors    as peft writes them
    qa_lora.json                                      base fingerprint, prompt: what prediction needs (adapter.py)
    qa.json, README.md                                no-answer threshold and lengths; the model card

`LlamaProduct` is what train_llama.py hands to evaluator.py.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qa.bert.product import finish_replacing, replace_folder
from qa.data.squad import SquadData
from qa.evaluation.results import model_card, read_settings
from qa.llama.adapter import read_adapter, read_tensors, save_adapter
from qa.llama.lora import load_lora_state_dict
from qa.llama.prompt import PromptTemplate
from qa.llama.targets import LoraSpec
from qa.options import LlamaOptions
from qa.predict import Prediction, predict_llama
from qa.training.checkpoint import write_json
from qa.training.distributed import Runtime, barrier, default_micro_tokens
from qa.training.precision import Precision


class LlamaProduct:
    """Predicts with the model in training, and saves its adapter."""

    def __init__(self, model, template: PromptTemplate, max_length: int, spec: LoraSpec, fingerprint: dict[str, str],
                 train_data: SquadData, options: LlamaOptions, precision: Precision, runtime: Runtime) -> None:
        self.model, self.template, self.max_length, self.spec = model, template, max_length, spec
        self.fingerprint, self.train_data, self.options = fingerprint, train_data, options
        self.precision, self.runtime = precision, runtime
        self.folder = Path(options.out) / "model"
        finish_replacing(self.folder, runtime)

    def predict(self, data: SquadData) -> list[Prediction]:
        options = self.options
        predictions, _ = predict_llama(
            self.model, self.template.for_data(data.is_v2), data.examples, max_length=self.max_length, overlap=options.overlap,
            max_answer_length=options.max_answer_length, precision=self.precision, runtime=self.runtime, decode=options.decode,
            micro_tokens=default_micro_tokens(options.micro_tokens, self.runtime.device))
        return predictions

    @contextlib.contextmanager
    def prompted(self, kind: str) -> Iterator[None]:
        """Predict with another prompt for a while."""
        own = self.template
        self.template = PromptTemplate(own.tokenizer, kind, own.is_v2)
        try:
            yield
        finally:
            self.template = own

    def save(self, step: int, na_threshold: float | None, metrics: dict[str, Any]) -> None:
        if self.runtime.is_main:
            options = self.options
            temporary = self.folder.with_name(f".{self.folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            settings = {"max_length": self.max_length, "overlap": options.overlap,
                        "max_answer_length": options.max_answer_length, "na_threshold": na_threshold,
                        "is_v2": self.train_data.is_v2, "step": step}
            targets = self.spec.targets if isinstance(self.spec.targets, str) else ", ".join(self.spec.targets)
            recipe = (f"LoRA on {targets}, r {self.spec.rank}, alpha {self.spec.alpha:g}; "
                      f"{options.prompt} prompt")
            save_adapter(self.model, self.spec, temporary, options.model, self.fingerprint,
                         {"prompt": self.template.settings()})
            self.template.tokenizer.save_pretrained(temporary)
            write_json(temporary / "qa.json", settings)
            card = model_card("LLaMA with LoRA for extractive question answering", options, self.train_data,
                              self.precision.name, recipe, step, metrics)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            replace_folder(temporary, self.folder)
        barrier(self.runtime)

    def restore(self) -> tuple[int, float | None]:
        load_lora_state_dict(self.model, read_tensors(read_adapter(self.folder).folder), str(self.folder))
        settings = read_settings(self.folder)
        return settings["step"], settings["na_threshold"]
