"""Exact search, step by step: the most probable answer, with a proof, without looking at all of them.

    python docs/learn/6_exact_search.py

The passage is "The tower of 1889". Its candidates are kept as a tree of prefixes, one word a token: a row for each word at
which they begin. Here the "model" is a table: for a prefix, the probability of each next word and of the end. The search is
that of qa/llama/search.py, which takes any function as its model. `evaluate.py --decode exact --trace ID` shows the same
search with a real model.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qa.llama.candidates import Row, Trie  # noqa: E402
from qa.llama.search import best_first  # noqa: E402
from qa.llama.units import SMALL_UNITS, cut  # noqa: E402

WORDS = ["The", "tower", "of", "1889"]
MODEL = {  # prefix: (probabilities of the next word, probability of the end)
    "": ({"The": 0.5, "tower": 0.1, "of": 0.0, "1889": 0.4}, 0.0),
    "The": ({"tower": 0.8}, 0.1),
    "The tower": ({"of": 0.1}, 0.9),
    "1889": ({}, 0.5),
}


def main() -> None:
    numbers = list(range(len(WORDS)))  # a token's id is its word's number; a candidate ends after each
    rows = [Row(tokens=numbers[first:], first=first, lasts=numbers[first:]) for first in numbers]
    trie = Trie(rows, cut(" ".join(WORDS), SMALL_UNITS))

    def text(tokens: list[int]) -> str:
        return " ".join(WORDS[token] for token in tokens)

    def log_probs(prefix: list[int]) -> tuple[dict[int, float], float]:
        following, end = MODEL[text(prefix)]  # a KeyError would say that the search ran a prefix that it need not run
        logs = {WORDS.index(word): math.log(p) if p else -math.inf for word, p in following.items()}
        return logs, math.log(end) if end else -math.inf

    best, steps, left_open = best_first(trie, log_probs)

    print(f"{trie.num_nodes() - 1} prefixes, each of them a candidate. The search runs the most probable open one:\n")
    print(f"{'prefix':<12} {'P(prefix)':>9}  {'P(prefix, end)':>14}")
    record = 0.0
    for step in steps[1:]:  # the first is the empty prefix
        whole = math.exp(step.answer_log_prob)
        note = "  <- the best answer so far" if whole > record else ""
        record = max(record, whole)
        print(f"{text(trie.prefix(step.node)):<12} {math.exp(step.log_prob):9.2f}  {whole:14.2f}{note}")
    print("\nnever run:")
    for log_prob, node in left_open:
        print(f"{text(trie.prefix(node)):<16} {math.exp(log_prob):5.2f}  at most {record:.2f}, like all that begins with it")
    print(f"\nthe answer: {text(trie.prefix(best[0].node))!r}, probability {math.exp(best[0].answer_log_prob):.2f}; "
          f"{len(steps) - 1} of {trie.num_nodes() - 1} prefixes were run")


if __name__ == "__main__":
    main()
