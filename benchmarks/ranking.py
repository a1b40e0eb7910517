"""Which number ranks the answers of different passages best?

    python benchmarks/ranking.py --ckpt runs/bert-v2 --data dev-v1.1.json [--questions 200] [--passages 50]

Each question is put to its own passage among others of other articles. Every passage gives its best answer; the first of them
by each ranking is looked at: whether it comes from the question's own passage, and its EM and F1 (official rules).

    in-passage softmax    the share among the spans of the passage: what the question-answering pipelines call score
    with no answer        the same with the null score in the sum (LLaMA: P(answer), which is both)
    score                 start + end score (LLaMA: log P)
    evidence              score - null score (LLaMA: log P(answer) - log P(refusal)): what qa.ask uses if the model may refuse

The questions and the other passages are drawn from --seed. Another passage may also answer the question: such a first answer
counts for EM, but not for the passage.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qa.data.squad import load_squad  # noqa: E402
from qa.evaluation.metrics import question_scores  # noqa: E402
from qa.reader import open_reader  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--passages", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--cache-mb", type=int, default=0, help="for a LLaMA: 4000 or so")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    data = load_squad(options.data, "dev")
    everything = [(passage, example) for passage in data.passages for example in passage.examples if not example.is_impossible]
    asked = draw.sample(everything, options.questions)
    pairs = []  # (question, passage), the own passage of each question first
    for passage, example in asked:
        others = [other for other in data.passages if other.title != passage.title]
        pairs += [(example.question, one.text) for one in [passage, *draw.sample(others, options.passages - 1)]]

    more = {"cache_mb": options.cache_mb} if options.cache_mb else {}
    reader = open_reader(options.ckpt, precision=options.precision, **more)
    begin = time.perf_counter()
    rank = rank_by_search if hasattr(reader, "template") else rank_by_scores
    rankings = rank(reader, pairs, options.passages)
    print(f"{options.ckpt}: {len(asked)} questions, {options.passages} passages each, seed {options.seed}; "
          f"{time.perf_counter() - begin:.0f} s")
    examples = [example for _, example in asked]
    print(f"{'ranking':<20} right passage      EM      F1")
    for name, first in rankings.items():
        answers = {example.id: text for example, (_, text) in zip(examples, first, strict=True)}
        exact, f1 = question_scores(examples, answers, is_v2=False)
        right = sum(passage == 0 for passage, _ in first) / len(first)
        print(f"{name:<20} {100 * right:>13.1f} {100 * exact.mean():>7.1f} {100 * f1.mean():>7.1f}")


def rank_by_scores(reader, pairs: list[tuple[str, str]], num_passages: int) -> dict[str, list[tuple[int, str]]]:
    """BERT: ranking -> for each question the number of the first passage, and its answer."""
    replies = reader.ask([question for question, _ in pairs], [text for _, text in pairs], num_best=1, may_refuse=True)
    columns = zip(*((reply.answers[0].score, reply.null_score, reply.answers[0].confidence, reply.no_answer_confidence)
                    for reply in replies), strict=True)
    score, null, confidence, refusal = (np.array(values).reshape(-1, num_passages) for values in columns)
    values = {"in-passage softmax": confidence / np.maximum(1 - refusal, 1e-300), "with no answer": confidence, "score": score,
              "evidence": score - null}
    found = {name: [(int(best), replies[row * num_passages + best].answers[0].text)
                    for row, best in enumerate(value.argmax(axis=1))] for name, value in values.items()}
    own = [(0, replies[row * num_passages].answers[0].text) for row in range(len(score))]
    return found | {"its own passage only": own}


def rank_by_search(reader, pairs: list[tuple[str, str]], num_passages: int) -> dict[str, list[tuple[int, str]]]:
    """LLaMA: one search over all passages for each ranking, since full searches in all of them would take hours."""
    found = {"score": [], "evidence": [], "its own passage only": []}
    for begin in range(0, len(pairs), num_passages):
        question, texts = pairs[begin][0], [text for _, text in pairs[begin:begin + num_passages]]
        for name, may_refuse in (("score", False), ("evidence", True)):
            (best,) = reader.find(question, texts, num_best=1, may_refuse=may_refuse)
            found[name].append((best.passage, best.answer.text))
        found["its own passage only"].append((0, reader.ask(question, texts[0], num_best=1).answers[0].text))
    return found


if __name__ == "__main__":
    main()
