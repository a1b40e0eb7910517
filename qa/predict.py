"""A model and a list of examples in, one `Prediction` per question out: the only evaluation loops.

BERT: windows are scored longest first, so that neighbours in a batch are alike in length and little is padded; the scores
go back to their places in flat arrays, so the order leaves no trace. LLaMA: passages are read once for all their questions;
answers are generated and grounded, or the most probable spans searched. Each rank does its share, and every rank holds all
predictions afterwards. Used by the train scripts (held-out and final scores) and evaluate.py.

T tokens of all windows together
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qa.bert.decode import Candidate, Decoded, NonFiniteScores, decode_flat
from qa.bert.model import BertSpanModel
from qa.bert.windows import Windows, make_windows
from qa.data.batches import cut
from qa.data.squad import Example, SquadData
from qa.errors import UserError
from qa.evaluation.metrics import question_scores, score_v1, score_v2
from qa.llama.candidates import describe_reachability
from qa.llama.encode import Passage, encode_examples, passages_and_lengths
from qa.llama.extract import extract
from qa.llama.generate import Generation, best_pieces, generate, log_odds
from qa.llama.grounding import ground
from qa.llama.prompt import PromptTemplate
from qa.llama.search import Extraction, Work, best_spans, describe_work
from qa.training.distributed import Runtime, gather_objects, sum_over_ranks
from qa.training.precision import Precision


@dataclass(slots=True)
class Prediction:
    """What a model says to one question."""

    id: str
    text: str  # the best span; "" if the passage has none. The no-answer threshold is applied later, by `answers`
    candidates: list[Candidate]  # distinct spans, best first
    no_answer_score: float | None  # v2.0: larger means "no answer"
    no_answer_confidence: float | None
    raw_text: str | None = None  # LLaMA, greedy: what it wrote, before grounding
    grounding: str | None = None  # LLaMA, greedy: exact, normalised, repaired, empty, or refused (v2.0)
    refusal_log_prob: float | None = None  # LLaMA, v2.0: its log-probability of writing the refusal


def predict_bert(model: BertSpanModel, tokenizer, examples: list[Example], *, max_length: int, overlap: int,
                 max_answer_length: int, num_best: int, is_v2: bool, micro_tokens: int, precision: Precision,
                 runtime: Runtime) -> tuple[list[Prediction], Windows]:
    """Predict all examples, in their order. Also returns the windows: their summary, and their count.

    Raises:
        UserError: the model's scores are not finite; names the questions.
    """
    windows = make_windows(examples, tokenizer, max_length, overlap)
    start, end = window_scores(model, windows, micro_tokens, precision, runtime)
    try:
        decoded = decode_flat(
            start, end, bounds=windows.bounds, passage=windows.passage, offsets=windows.offsets,
            question=windows.question, contexts=[example.context for example in examples], num_best=num_best,
            max_answer_length=max_answer_length, use_null=is_v2, null_token=windows.null_token)
    except NonFiniteScores as error:
        ids = [examples[index].id for index in error.questions]
        raise UserError(f"the model's scores are NaN or infinite for {len(ids)} questions, the first being {ids[0]!r}; "
                        "try --precision fp32, and check the checkpoint's training log") from None
    return [_prediction(example, found) for example, found in zip(examples, decoded, strict=True)], windows


@torch.inference_mode()
def window_scores(model: BertSpanModel, windows: Windows, micro_tokens: int, precision: Precision,
                  runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Start and end score of every token, in at least fp32: two tensors [T] on the runtime's device."""
    was_training = model.training
    model.eval()
    lengths = windows.lengths
    longest_first = np.argsort(-lengths, kind="stable")
    micro_batches = cut(longest_first, lengths, micro_tokens)
    dtype = torch.float64 if precision.name == "fp64" else torch.float32
    flat = torch.zeros(2, len(windows.tokens), dtype=dtype, device=runtime.device)
    for rows in micro_batches[runtime.rank::runtime.num_ranks]:
        batch = windows.batch(rows, runtime.device)
        with precision.autocast():
            start, end = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])  # [B, L]
        column = torch.arange(start.shape[1], device=runtime.device)
        first = torch.from_numpy(windows.bounds[rows]).to(runtime.device)
        places = (first[:, None] + column)[batch["attention_mask"]]  # [tokens of the batch]
        flat[0, places] = start[batch["attention_mask"]].to(dtype)
        flat[1, places] = end[batch["attention_mask"]].to(dtype)
    model.train(was_training)
    return tuple(sum_over_ranks(flat, runtime))  # every place was filled by one rank and is 0 on the others


@torch.inference_mode()
def predict_llama(model, template: PromptTemplate, examples: list[Example], *, max_length: int, overlap: int,
                  max_answer_length: int, micro_tokens: int, precision: Precision, runtime: Runtime, decode: str = "greedy",
                  num_best: int = 1, max_expansions: int = 0) -> tuple[list[Prediction], list[str]]:
    """Answer every example, in their order: write and ground an answer, or (`decode` "exact") search the best spans.

    Args:
        num_best, max_expansions: of the search.

    Returns:
        The predictions, and a line for each kind of cut, and on the search.
    """
    was_training = model.training
    model.eval()
    prompts, notes = encode_examples(template, examples, max_length, overlap, max_answer_length)
    passage, _ = passages_and_lengths(prompts)
    mine = [prompt for prompt, number in zip(prompts, passage, strict=True)
            if number % runtime.num_ranks == runtime.rank]
    work: list[Work] = []
    with precision.autocast():
        if decode == "exact":
            texts = {prompt.passage: _piece_text(examples[prompt.index], prompt.passage) for prompt in mine}
            extractions = best_spans(extract(model, template, mine, texts, max_answer_length, micro_tokens, num_best,
                                             max_expansions))
            found = {extraction.prompt.index: _extracted(examples[extraction.prompt.index], extraction)
                     for extraction in extractions}
            work = [extraction.work for extraction in extractions]
        else:
            generations = best_pieces(generate(model, template, mine, max_answer_length, micro_tokens), template.refusal)
            found = {generation.prompt.index: _grounded(examples[generation.prompt.index], generation, template)
                     for generation in generations}
    model.train(was_training)
    everything = {index: prediction for part in gather_objects(found, runtime) for index, prediction in part.items()}
    if decode == "exact":
        notes += describe_work([of_question for part in gather_objects(work, runtime) for of_question in part])
        notes += describe_reachability(template, examples, prompts, max_answer_length)
    return [everything[index] for index in range(len(examples))], notes


def _piece_text(example: Example, passage: Passage) -> str:
    return example.context[passage.start_char:passage.end_char]


def _extracted(example: Example, extraction: Extraction) -> Prediction:
    """The spans as they are. A confidence is the model's own probability; those of all texts there are add up to 1."""
    assert all(example.context[span.start_char:span.end_char] == span.text for span in extraction.spans)
    candidates = [Candidate(*span, math.exp(span.log_prob)) for span in extraction.spans]
    return Prediction(example.id, candidates[0].text if candidates else "", candidates,
                      *_refusal_scores(extraction.refusal_log_prob), refusal_log_prob=extraction.refusal_log_prob)


def _grounded(example: Example, generation: Generation, template: PromptTemplate) -> Prediction:
    """The generated text as a span of the piece of passage that it was read from."""
    scores = _refusal_scores(generation.refusal_log_prob)
    if template.refusal is not None and generation.text == template.refusal:
        return Prediction(example.id, "", [], *scores, generation.text, "refused", generation.refusal_log_prob)
    piece = generation.prompt.passage
    grounded = ground(generation.text, _piece_text(example, piece))
    candidates = []
    if grounded.start_char is not None:
        candidates = [Candidate(grounded.text, grounded.start_char + piece.start_char, grounded.end_char + piece.start_char,
                                generation.log_prob, math.exp(generation.log_prob))]
    return Prediction(example.id, grounded.text, candidates, *scores, generation.text, grounded.kind,
                      generation.refusal_log_prob)


def _refusal_scores(log_prob: float | None) -> tuple[float | None, float | None]:
    """The no-answer score, log-odds of the refusal; and its probability."""
    return (None, None) if log_prob is None else (log_odds(log_prob), math.exp(log_prob))


def answers(predictions: list[Prediction], na_threshold: float | None) -> dict[str, str]:
    """{id: text}, the official form; "" where the no-answer score is above the threshold (v2.0)."""
    return {prediction.id: "" if na_threshold is not None and prediction.no_answer_score is not None
            and prediction.no_answer_score > na_threshold else prediction.text for prediction in predictions}


def score(data: SquadData, predictions: list[Prediction], na_threshold: float | None) -> dict[str, float]:
    """The official figures of `predictions` on `data`."""
    texts = answers(predictions, None)
    if not data.is_v2:
        return score_v1(data.examples, texts) | raw_scores(data, predictions)
    na_scores = {prediction.id: prediction.no_answer_score for prediction in predictions
                 if prediction.no_answer_score is not None}
    metrics = score_v2(data.examples, texts, na_scores, 0.0 if na_threshold is None else na_threshold)
    return metrics | raw_scores(data, predictions)


def raw_scores(data: SquadData, predictions: list[Prediction]) -> dict[str, float]:
    """LLaMA's greedy decoding only: EM and F1 of the texts as generated, and how many were grounded in which way."""
    if not predictions or predictions[0].raw_text is None:
        return {}
    texts = {prediction.id: "" if prediction.grounding == "refused" else prediction.raw_text for prediction in predictions}
    exact, f1 = question_scores(data.examples, texts, data.is_v2)
    kinds = Counter(prediction.grounding for prediction in predictions)
    return {"raw_exact": 100 * float(exact.mean()), "raw_f1": 100 * float(f1.mean()),
            **{f"num_{kind}": kinds[kind] for kind in ("exact", "normalised", "repaired", "empty", "refused")}}


def _prediction(example: Example, found: Decoded) -> Prediction:
    candidates = found.candidates
    return Prediction(example.id, candidates[0].text if candidates else "", candidates, found.no_answer_score,
                      found.null_confidence)
