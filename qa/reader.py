"""Any model as a reader: the only file that knows both families, and what a user imports.

    from qa.reader import open_reader
    reader = open_reader("runs/bert")                        # all that --ckpt takes
    reply = reader.ask("When was it lit?", "It was lit in 1844.")   # asking.py
    answered = reader.answer(load_squad("questions.json"))   # an `Answered` (prediction.py)

The reader is a BertReader (bert/reader.py) or a LlamaReader (llama/reader.py). Its predictions go to evaluation/scoring.py.
Used by: evaluate.py, qa/ask.py, and users. A train script makes its own reader from the model that it trains.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import replace
from pathlib import Path

from qa import weights
from qa.bert.model import load_bert
from qa.bert.reader import BertReader
from qa.data.splits import questions_that
from qa.data.squad import load_squad
from qa.errors import UserError
from qa.flags import check, unused_options
from qa.llama.adapter import Adapter, load_adapter, read_adapter
from qa.llama.demonstrations import choose_demonstrations
from qa.llama.memory import PassageMemory
from qa.llama.model import context_length, load_llama
from qa.llama.prompt import PromptTemplate
from qa.llama.reader import LlamaReader
from qa.options import ReadingOptions
from qa.settings import ReadSettings, read_settings, resolve
from qa.training import distributed
from qa.training.distributed import Runtime
from qa.training.precision import base_dtype, choose_precision
from qa.training.product import inspect


def open_reader(ckpt: str, **given) -> BertReader | LlamaReader:
    """Open a model on this machine, as one process.

    Args:
        ckpt: a run, a folder of transformers or peft, a hub id, a .gguf file, or pypi:PACKAGE.
        given: any option of `ReadingOptions` (options.py), such as max_length=256 or precision="fp32".

    Raises:
        UserError: there is no such model, it is damaged, or we do not support its family.
    """
    known = {field.name for field in dataclasses.fields(ReadingOptions)} - {"ckpt"}
    if unknown := given.keys() - known:
        raise UserError(f"open_reader: no option {min(unknown)!r} for reading; expected one of {', '.join(sorted(known))}")
    options = ReadingOptions(ckpt=ckpt, **given)
    check(options)
    reader, notes = load_reader(options, set(given), distributed.start())
    for line in notes:
        print(line, file=sys.stderr)
    return reader


def load_reader(options: ReadingOptions, typed: set[str], runtime: Runtime,
                is_v2: bool = False) -> tuple[BertReader | LlamaReader, list[str]]:
    """The model that `options.ckpt` names, as a reader, and lines to tell the user.

    If `is_v2`, the data has questions without an answer, so a prompt that the user typed must allow a refusal.
    """
    with distributed.first_of_each_node(runtime):
        path = weights.locate(options.ckpt, "--ckpt")
    model_type, kind = weights.family(path), weights.reader_family(path)
    values = {name: getattr(options, name) for name in typed if name != "prompt"}
    if kind == "llama":
        values["decode"] = options.decode
    settings, sources = resolve(kind, values, read_settings(path))
    adapter = read_adapter(path) if model_type == "adapter" else None
    parts = {kind: True, "exact": settings.decode == "exact", "adapter": adapter is not None, "shots": bool(options.shots)}
    model = f"{options.ckpt} ({model_type}" + (f", --decode {settings.decode})" if kind == "llama" else ")")
    notes = [f"warning: {line}" for line in unused_options(options, typed, {part for part in parts if parts[part]}, model)]
    shown = ["max_length", "overlap", "max_answer_length", *(["decode"] if kind == "llama" else [])]
    if saved := [f"{name} {getattr(settings, name)}" for name in sources if name in shown and sources[name] == "saved"]:
        notes.append(f"from the checkpoint: {', '.join(saved)}")
    if kind == "llama":
        reader, more = _open_llama(path, adapter, settings, options, runtime, is_v2)
    else:
        reader, more = _open_bert(path, settings, options, runtime)
    return reader, [*inspect(path), *notes, *more, reader.precision.reason]


def _open_bert(path: Path, settings: ReadSettings, options: ReadingOptions, runtime: Runtime) -> tuple[BertReader, list[str]]:
    """A question-answering model, or a plain encoder, which gets a random span head."""
    distributed.reseed(options.seed, 0, 0)
    model, head_is_trained = load_bert(path, settings.max_length)
    precision = choose_precision(options.precision, runtime, *model.widths)
    model.to(runtime.device, precision.parameter_dtype)
    tokenizer = weights.load_tokenizer(path)
    notes = weights.tokenizer_warnings(tokenizer)
    if not head_is_trained:
        notes.append(f"{options.ckpt} is an encoder without a trained span head; its head is random (--seed {options.seed}), "
                     "so its scores are a baseline")
    micro_tokens = distributed.choose_micro_tokens(options.micro_tokens, runtime.device)
    return BertReader(model, tokenizer, settings, precision, runtime, micro_tokens), notes


def _open_llama(path: Path, adapter: Adapter | None, settings: ReadSettings, options: ReadingOptions, runtime: Runtime,
                is_v2: bool) -> tuple[LlamaReader, list[str]]:
    """A LLaMA as it is, or with a LoRA adapter."""
    base_name = options.base or (adapter and adapter.base_name) or ""
    if adapter and not base_name:
        raise UserError(f"{path}: the adapter does not say which base model it is for; give it by --base")
    dtype = base_dtype("auto", options.precision, runtime.device)
    with distributed.first_of_each_node(runtime):
        base_path = weights.locate(base_name, "--base") if adapter else path
    model, tokenizer = load_llama(base_path, dtype, runtime if getattr(options, "shard", False) else None)
    precision = choose_precision(options.precision, runtime, model.config.hidden_size, model.config.intermediate_size)
    notes = load_adapter(model, adapter, base_name) if adapter else []
    model.to(runtime.device)
    own_prompt = settings.prompt or (adapter.extra.get("prompt") if adapter else None)  # older runs: in qa_lora.json
    if own_prompt and not options.prompt:
        template = PromptTemplate.from_settings(tokenizer, own_prompt)
    else:
        template = PromptTemplate(tokenizer, options.prompt or "plain", is_v2, _demonstrations(options, is_v2))
    settings = replace(settings, max_length=context_length(model, settings.max_length), prompt=template.settings())
    micro_tokens = distributed.choose_micro_tokens(options.micro_tokens, runtime.device)
    memory = PassageMemory(options.cache_mb * 1_000_000) if options.cache_mb else None
    return LlamaReader(model, template, settings, precision, runtime, micro_tokens, memory), notes


def _demonstrations(options: ReadingOptions, is_v2: bool) -> tuple:
    """The solved examples of --shots."""
    if not options.shots:
        return ()
    passages = load_squad(options.train_data or "squad").passages
    if not is_v2:  # a prompt that does not allow a refusal cannot show one
        passages = questions_that(lambda example: not example.is_impossible, passages)
    return choose_demonstrations(passages, options.shots, options.data_seed)
