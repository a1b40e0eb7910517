"""Decoding side by side: qa.bert.decode_fast, and the usual loop over the 20 best starts and the 20 best ends.

    python benchmarks/decoding.py [--questions 10000] [--rounds 3] [--threads 1]

Both begin with a model's scores, in the form in which their evaluation loops hold them, and end with 20 best texts and
confidences for every question. The loop follows transformers' examples/pytorch/question-answering/utils_qa.py
(`postprocess_qa_predictions`) step by step: scores padded to 384 columns; for each window two argsorts and 400 pairs,
each tested and, if legal, kept as a dict; then sort, cut, text, and a softmax over the 20. It is timed twice: with the
features in a `datasets.Dataset`, as run_qa.py has them, and with everything in Python lists, so without what the
Dataset costs.

Data, from seed 0: five questions to a passage; passages of lognormal length with median 145 tokens, questions of about
12; windows of at most 384 tokens that overlap by 128, 173 tokens in the mean. Scores imitate those of a trained BERT: a
floor of noise, and six places of different height where an answer may start or end. Of the 400 pairs of a window 112
are legal in the mean (118 with a MiniLM fine-tuned on SQuAD). The rounds alternate; the ratios are those of the best
times. `--threads` is for torch, which can use several cores; the loop cannot.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qa.bert.decode_fast import FlatCandidates, find_candidates  # noqa: E402
from qa.bert.windows import Windows  # noqa: E402
from qa.data.squad import Summary  # noqa: E402

MAX_LENGTH, OVERLAP, NUM_BEST, MAX_ANSWER_LENGTH = 384, 128, 20, 30
QUESTIONS_PER_PASSAGE = 5
FLOOR = -6.0  # scores outside the passage
WITH_TEXTS = "qa.bert.decode_fast, with all texts"


@dataclass
class Questions:
    """Start and end scores of every token of the windows, and the passage of every question."""

    start: np.ndarray
    end: np.ndarray
    windows: Windows  # without token ids and labels, which decoding does not read
    contexts: list[str]


def make_questions(num_questions: int, rng: np.random.Generator) -> Questions:
    start_scores, end_scores, offsets, lengths, ranges, indices, contexts = [], [], [], [], [], [], []
    for index in range(num_questions):
        if index % QUESTIONS_PER_PASSAGE == 0:
            context, tokens = make_passage(rng)
        contexts.append(context)
        start, end = make_scores(len(tokens), rng)
        before = 2 + int(np.clip(rng.normal(12, 4), 4, 30))  # [CLS] question [SEP]
        capacity = MAX_LENGTH - before - 1
        last_begin = max(0, len(tokens) - capacity)
        for begin in range(0, last_begin + capacity - OVERLAP if last_begin else 1, capacity - OVERLAP):
            part = slice(begin, begin + capacity)
            length = before + len(tokens[part]) + 1
            for scores, source in ((start_scores, start), (end_scores, end)):
                padded = np.pad(source[part], (before, 1), constant_values=FLOOR)
                scores.append(padded + rng.normal(0, 0.3, length))
            offsets.append(np.pad(tokens[part], ((before, 1), (0, 0))))
            lengths.append(length)
            ranges.append((before, length - 1))
            indices.append(index)
    none = np.zeros(0, np.int32)
    windows = Windows(none, np.concatenate(offsets).astype(np.int32), np.cumsum([0, *lengths]), np.array(ranges, np.int32),
                      np.array(indices, np.int32), none, none, 0, Summary())
    return Questions(np.concatenate(start_scores).astype(np.float32), np.concatenate(end_scores).astype(np.float32), windows,
                     contexts)


def make_passage(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Letters, and tokens of 2 to 8 of them, four of five after a gap of one: [tokens, 2]."""
    num_tokens = int(np.clip(rng.lognormal(np.log(145), 0.4), 25, 900))
    gap, size = rng.random(num_tokens) < 0.8, rng.integers(2, 9, num_tokens)
    end = np.cumsum(gap + size)
    return "".join(map(chr, rng.integers(97, 123, end[-1]))), np.stack([end - size, end], axis=1)


def make_scores(num_tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One clear answer and five weaker ones, each lifting its neighbours as well, on a floor of noise."""
    start, end = rng.normal(FLOOR + 1, 1, (2, num_tokens))
    token = np.arange(num_tokens)
    for height in (9, *rng.uniform(2, 7, 5)):
        first = rng.integers(num_tokens)
        last = min(first + rng.geometric(0.3) - 1, num_tokens - 1)
        start += height * np.exp(-np.abs(token - first) / 1.5)
        end += height * np.exp(-np.abs(token - last) / 1.5)
    return start, end


def loop_input(data: Questions) -> dict[str, Any]:
    """What run_qa.py holds after its evaluation: padded scores, features with offsets or None, examples."""
    windows = data.windows
    all_scores = np.full((2, len(windows), MAX_LENGTH), -100, np.float32)
    features = []
    for row, (first, past) in enumerate(windows.passage_range.tolist()):
        cells = slice(windows.bounds[row], windows.bounds[row + 1])
        length = cells.stop - cells.start
        all_scores[:, row, :length] = data.start[cells], data.end[cells]
        pairs = windows.offsets[cells].tolist()
        offsets = [tuple(pairs[token]) if first <= token < past else None for token in range(length)]
        features.append({"example_id": str(windows.example_index[row]), "offset_mapping": offsets})
    examples = [{"id": str(index), "context": context} for index, context in enumerate(data.contexts)]
    return {"all_start": all_scores[0], "all_end": all_scores[1], "features": features, "examples": examples}


def as_dataset(features: list[dict[str, Any]]) -> datasets.Dataset:
    """The same features with all the columns that run_qa.py's tokenisation leaves, padded to 384."""
    ids = np.zeros((len(features), MAX_LENGTH), np.int32)
    offsets = [feature["offset_mapping"] for feature in features]
    return datasets.Dataset.from_dict({
        "example_id": [feature["example_id"] for feature in features],
        "offset_mapping": [pairs + [None] * (MAX_LENGTH - len(pairs)) for pairs in offsets],
        "input_ids": ids, "token_type_ids": ids, "attention_mask": ids})


def loop_decode(all_start, all_end, features, examples) -> dict[str, list[dict[str, Any]]]:
    """The usual loop, for v1.1 data -> the n best of every example."""
    windows_of: dict[str, list[int]] = {}
    for window, feature in enumerate(features):
        windows_of.setdefault(feature["example_id"], []).append(window)
    all_best, all_nbest = {}, {}
    for example in examples:
        null, found = None, []
        for window in windows_of[example["id"]]:
            start, end = all_start[window], all_end[window]
            offsets = features[window]["offset_mapping"]
            max_context = features[window].get("token_is_max_context", None)
            null_score = start[0] + end[0]
            if null is None or null["score"] > null_score:
                null = {"offsets": (0, 0), "score": null_score, "start_logit": start[0], "end_logit": end[0]}
            best_starts = np.argsort(start)[-1:-NUM_BEST - 1:-1].tolist()
            best_ends = np.argsort(end)[-1:-NUM_BEST - 1:-1].tolist()
            for s in best_starts:
                for e in best_ends:
                    if s >= len(offsets) or e >= len(offsets) or offsets[s] is None or offsets[e] is None:
                        continue
                    if e < s or e - s + 1 > MAX_ANSWER_LENGTH:
                        continue
                    if max_context is not None and not max_context.get(str(s), False):
                        continue
                    found.append({"offsets": (offsets[s][0], offsets[e][1]), "score": start[s] + end[e],
                                  "start_logit": start[s], "end_logit": end[e]})
        best = sorted(found, key=lambda span: span["score"], reverse=True)[:NUM_BEST]
        for span in best:
            first, last = span.pop("offsets")
            span["text"] = example["context"][first:last]
        if not best:
            best = [{"text": "empty", "start_logit": 0.0, "end_logit": 0.0, "score": 0.0}]
        scores = np.array([span.pop("score") for span in best])
        weights = np.exp(scores - scores.max())
        for span, share in zip(best, weights / weights.sum(), strict=True):
            span["probability"] = share
        all_best[example["id"]] = best[0]["text"]
        all_nbest[example["id"]] = [{name: float(value) if isinstance(value, np.floating) else value
                                     for name, value in span.items()} for span in best]
    return all_nbest


def all_texts(found: FlatCandidates, contexts: list[str]) -> list[str]:
    """The text of every candidate."""
    contexts = chain.from_iterable(map(repeat, contexts, np.diff(found.bounds).tolist()))
    spans = zip(contexts, found.start_char.tolist(), found.end_char.tolist(), strict=True)
    return [context[start:end] for context, start, end in spans]


def compare(ours: FlatCandidates, all_ours: list[str], theirs: dict[str, list[dict[str, Any]]], num_windows: np.ndarray) -> str:
    """On how many questions the answers differ, and why."""
    best = missed = repeated = 0
    for first, past, spans, several in zip(ours.bounds[:-1], ours.bounds[1:], theirs.values(), num_windows > 1, strict=True):
        texts = all_ours[first:past]
        best += texts[0] != spans[0]["text"]
        if texts != [span["text"] for span in spans]:
            repeated += several
            missed += not several
    return (f"the best answers differ on {best:,} of {len(theirs):,} questions, the 20 best on {missed + repeated:,}:\n"
            f"  {missed:,} of one window: the loop lacks a span whose start or end is not among its 20 best\n"
            f"  {repeated:,} of several windows: it also repeats the texts that two windows share")


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    data = make_questions(args.questions, np.random.default_rng(0))
    num_windows = np.bincount(data.windows.example_index)
    lists = loop_input(data)
    arrow = {**lists, "features": as_dataset(lists["features"])}
    start, end = torch.from_numpy(data.start), torch.from_numpy(data.end)

    def decode(with_texts: bool) -> tuple[FlatCandidates, list[str]]:
        found = find_candidates(start, end, data.windows, NUM_BEST, MAX_ANSWER_LENGTH, use_null=False)
        return found, all_texts(found, data.contexts) if with_texts else []

    runs = {
        WITH_TEXTS: lambda: decode(True),
        "qa.bert.decode_fast, characters only": lambda: decode(False),
        "the loop, everything in lists": lambda: loop_decode(**lists),
        "the loop, features in a Dataset": lambda: loop_decode(**arrow),
    }
    gc.collect()
    gc.freeze()  # the garbage collector is not to visit the loop's million input objects in anybody's time

    best_seconds, results = dict.fromkeys(runs, float("inf")), {}
    for _ in range(args.rounds):
        for name, run in runs.items():
            results.pop(name, None)
            taken, results[name] = seconds(run)
            best_seconds[name] = min(best_seconds[name], taken)
    (ours, texts), theirs = results[WITH_TEXTS], results["the loop, everything in lists"]

    print(f"{args.questions:,} questions, {len(data.windows):,} windows of {data.windows.lengths.mean():.0f} "
          f"tokens, {len(ours.score):,} candidates; torch on {args.threads} threads; best of {args.rounds} rounds")
    for name, taken in best_seconds.items():
        print(f"{name:36} {taken:7.3f} s {1e6 * taken / args.questions:8.1f} µs a question "
              f"{taken / best_seconds[WITH_TEXTS]:7.1f} ×")
    print(compare(ours, texts, theirs, num_windows))


if __name__ == "__main__":
    main()
