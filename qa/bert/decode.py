"""One question's scores in, its best answers out: the simple version, to read and to test decode_fast.py with.

The span head gives every token a start score and an end score. A span is worth the sum of two of them (Devlin et al. 2019,
arXiv:1810.04805, section 4.2):

    score(s, e) = start[s] + end[e]        legal: s <= e < s + max_answer_length, all of it in the passage of one window,
                                           and the score is not -inf (bert/reader.py gives it to blanks)

    token      Ann   met   Bob           score(s, e), with answers of at most 2 tokens
    start       3     0     2               e = Ann   met   Bob
    end         1     0     2         s = Ann     4     3     .
                                          met     .     0     2
                                          Bob     .     .     4
    best first: "Ann" 4, "Bob" 4, "Ann met" 3, "met Bob" 2, "met" 0      (of equal scores: the earlier window, start, end)

A softmax over all legal spans of all windows turns scores into probabilities. In v2.0 "no answer" takes part in it:

    confidence(s, e) = exp(score(s, e)) / Z      Z = sum of exp(score) over all legal spans, in v2.0 plus exp(null score)
    null score       = start[CLS] + end[CLS]     of the window where this is smallest

The smallest, as in Google's run_squad.py: if one window has the answer, and says so by a low null score, that is enough.
Windows overlap, so the same characters are found more than once. They make one candidate, with the largest of their
confidences, not the sum: an answer shall not gain by lying where two windows overlap.

Input: bert/reader.py's scores of the windows. Used by: the tests; `make_prediction` by decode_fast.py.
Letters: P passage tokens of a window, M legal spans of all windows.
"""

from __future__ import annotations

import numpy as np

from qa.bert.windows import NO_ANSWER, Windows
from qa.data.squad import Example, Passage
from qa.prediction import Candidate, Prediction


def decode_question(start: np.ndarray, end: np.ndarray, windows: Windows, example_index: int, passage: Passage,
                    example: Example, num_best: int, max_answer_length: int, use_null: bool) -> Prediction:
    """start, end: scores of every token of all windows; use_null: v2.0, where "no answer" has a score too."""
    scores, spans, null_scores = [], [], []
    for row in np.flatnonzero(windows.example_index == example_index):
        cls_token, (first, past) = windows.bounds[row] + NO_ANSWER, windows.bounds[row] + windows.passage_range[row]
        null_scores.append(start[cls_token] + end[cls_token])
        pair_scores = start[first:past, None] + end[None, first:past]  # [P, P] score(s, e)
        token = np.arange(past - first)
        distance = token[None, :] - token[:, None]  # [P, P] e - s
        is_legal = (0 <= distance) & (distance < max_answer_length) & (pair_scores > -np.inf)
        s, e = np.nonzero(is_legal)  # by start, then by end
        scores.append(pair_scores[s, e])
        spans.append(np.stack([windows.offsets[first + s, 0], windows.offsets[first + e, 1]], axis=1))  # characters
    scores, spans = np.concatenate(scores), np.concatenate(spans)  # [M], [M, 2]
    null_score = min(null_scores)
    log_z = np.logaddexp.reduce([*scores, null_score] if use_null else scores, dtype=np.float64)
    best: dict[tuple[int, int], float] = {}
    for place in np.argsort(-scores, kind="stable"):  # best first: of equal characters setdefault keeps the best
        best.setdefault(tuple(spans[place].tolist()), float(scores[place]))
    candidates = [Candidate(passage.text[start_char:end_char], start_char, end_char, score, float(np.exp(score - log_z)))
                  for (start_char, end_char), score in list(best.items())[:num_best]]
    return make_prediction(example.id, candidates, float(null_score),
                           float(np.exp(null_score - log_z)) if use_null else None)


def make_prediction(question_id: str, candidates: list[Candidate], null_score: float,
                    null_confidence: float | None) -> Prediction:
    """The best candidate is the answer. In v2.0 the no-answer score says by how much "no answer" is better than it.

    null_confidence: None in v1.1. The null score still tells how well the passage fits the question (qa/asking.py).
    """
    if not candidates:  # a passage without a token
        return Prediction(question_id, "", [], None, null_score, null_confidence)
    no_answer_score = None if null_confidence is None else null_score - candidates[0].score
    return Prediction(question_id, candidates[0].text, candidates, no_answer_score, null_score, null_confidence)
