"""Questions to passages, from Python: what BertReader and LlamaReader share beside `answer`.

    reader = open_reader("runs/bert")
    reply = reader.ask("When was it lit?", "The lighthouse was lit in 1844 and automated in 1982.")
    reply.answers[0].text                 "1844", with start_char, end_char and confidence
    reply.no_answer                       True where the model has learnt to give no answer, and gives none here

To compare answers in *different* passages take `Reply.evidence`, not the confidence. A confidence is a share within one
passage. Something gets the largest share even where nothing answers the question; over 50 passages, some such shares are high.
The evidence compares a span with giving no answer, in the same passage, before any share is made:

    BERT    start score + end score - null score of the passage         (decode.py)
    LLaMA   log P(answer) - log P(refusal)

BERT's null score is there after training on v1.1 too, where it may not win: [CLS] is the label of windows that lack the answer,
and it tells passages apart. A LLaMA that has not learnt to refuse has nothing to compare with: its evidence is log P(answer).

Devlin et al. 2019 (arXiv:1810.04805, section 4.3) decide by this difference whether a passage has an answer at all; Clark &
Gardner 2018 (arXiv:1710.10723) show why shares cannot rank passages. docs/results.md has what we measured.

Used by: bert/reader.py, llama/reader.py, qa/ask.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qa.data.squad import Example, Passage, SquadData, Summary
from qa.errors import UserError
from qa.evaluation.calibration import calibrate
from qa.evaluation.metrics import is_refused
from qa.prediction import Answered, Candidate, Prediction
from qa.settings import ReadSettings


@dataclass
class Reply:
    """What a reader says to one question about one passage."""

    question: str
    answers: list[Candidate]  # best first, with text, start_char, end_char (exclusive), score and confidence
    no_answer: bool  # "no answer" won; `answers` are then what would have come next
    no_answer_confidence: float | None  # None: the model may not refuse, as after training on v1.1
    null_score: float | None  # on the scale of the answers' scores; None: a LLaMA that may not refuse

    def evidence(self, answer: Candidate) -> float:
        """What ranks one of the answers among those of other passages; more is better."""
        return answer.score - (self.null_score or 0.0)


class Found(NamedTuple):
    """An answer among those of many passages."""

    passage: int  # its number
    answer: Candidate
    evidence: float
    no_answer: bool  # no passage has an answer, says the model; this is the nearest to one


def rank_answers(replies: list[Reply], num_best: int) -> list[Found]:
    """The best answers to one question over many passages, by evidence; none overlaps a better one of its passage.

    Passages that the model refuses to answer from are left out, unless it refuses all.
    """
    answering = [number for number, reply in enumerate(replies) if not reply.no_answer]
    found = [Found(number, answer, replies[number].evidence(answer), not answering)
             for number in answering or range(len(replies)) for answer in replies[number].answers]
    best: list[Found] = []
    for one in sorted(found, key=lambda one: -one.evidence):
        start, end = one.answer.start_char, one.answer.end_char
        if not any(one.passage == other.passage and start < other.answer.end_char and other.answer.start_char < end
                   for other in best):
            best.append(one)
        if len(best) == num_best:
            break
    return best


class Asked:
    """A reader that can be asked. The classes of the two families derive from this one."""

    settings: ReadSettings

    def answer(self, data: SquadData) -> Answered:
        raise NotImplementedError

    def for_asking(self, num_best: int, decode: str, may_refuse: bool | None) -> Asked:
        """The same reader with settings for `ask`."""
        raise NotImplementedError

    def for_finding(self, num_best: int) -> Asked:
        """The same reader, which need not answer well where `num_best` other passages have better answers."""
        return self

    def count_question(self, question: str) -> tuple[int, int]:
        """The tokens of a question, and how many it may have."""
        raise NotImplementedError

    def ask(self, question: str | Sequence[str], passage: str | Sequence[str], num_best: int = 3, decode: str = "exact",
            may_refuse: bool | None = None) -> Reply | list[Reply]:
        """Answer a question about a passage, or many at once, in batches. Questions about the same passage are read with it.

        Args:
            question, passage: two strings; or a list of each, of equal length; or one string and a list: it goes with each.
            num_best: how many answers, best first.
            decode: LLaMA. "exact": the most probable spans; "greedy": one span, made from the text that the model writes.
            may_refuse: whether "no answer" may win. None: if the model was trained to.

        Returns:
            A `Reply`, or a list of them if a list was given.

        Raises:
            UserError (a ValueError): an empty question or passage, a question too long for the model, lists of unequal length,
                num_best below 1.
        """
        pairs = _pairs(question, passage)
        self._check(pairs, num_best)
        replies = _replies(self.for_asking(num_best, decode, may_refuse), pairs)
        return replies if isinstance(question, list | tuple) or isinstance(passage, list | tuple) else replies[0]

    def find(self, question: str, passages: Sequence[str], num_best: int = 3, decode: str = "exact",
             may_refuse: bool | None = None) -> list[Found]:
        """The best answers to a question over many passages, by evidence; none overlaps a better one of its passage.

        The arguments and errors are those of `ask`. LLaMA does not search where no such answer can be (llama/rivals.py).
        """
        pairs = _pairs(question, [passages] if isinstance(passages, str) else list(passages))
        self._check(pairs, num_best)
        reader = self.for_asking(max(num_best, self.settings.num_best), decode, may_refuse).for_finding(num_best)
        return rank_answers(_replies(reader, pairs), num_best)

    def _check(self, pairs: list[tuple[str, str]], num_best: int) -> None:
        if num_best < 1:
            raise UserError(f"num_best {num_best}: expected at least 1")
        for text in dict.fromkeys(text for text, _ in pairs):
            tokens, most = self.count_question(text)
            if tokens > most:
                raise UserError(f"the question {text[:40]!r}...: {tokens} tokens, expected at most {most} with windows or "
                                "prompts of this length; ask it shorter, or give a larger --max-length")


def _replies(reader: Asked, pairs: list[tuple[str, str]]) -> list[Reply]:
    if not pairs:
        return []
    data = _as_data(pairs, bool(reader.settings.is_v2))
    answered = reader.answer(data)
    for note in answered.notes:
        warnings.warn(note, stacklevel=3)  # Python shows each text once
    threshold = (reader.settings.na_threshold or 0.0) if reader.settings.is_v2 else None
    predictions = calibrate(answered.predictions, threshold, reader.settings.temperature)
    found = {(example.question, passage.text): _reply(example.question, prediction, threshold)
             for (passage, example), prediction in zip(_examples(data), predictions, strict=True)}
    return [found[pair] for pair in pairs]


def _pairs(question: str | Sequence[str], passage: str | Sequence[str]) -> list[tuple[str, str]]:
    questions = list(question) if isinstance(question, list | tuple) else [question]
    passages = list(passage) if isinstance(passage, list | tuple) else [passage]
    if isinstance(passage, list | tuple) and not isinstance(question, list | tuple):
        questions *= len(passages)
    elif not isinstance(passage, list | tuple):
        passages *= len(questions)
    if len(questions) != len(passages):
        raise UserError(f"{len(questions)} questions and {len(passages)} passages; expected as many of each, or one of either")
    for name, texts in (("question", questions), ("passage", passages)):
        if wrong := [text for text in texts if not isinstance(text, str) or not text.strip()]:
            raise UserError(f"a {name} is {wrong[0]!r}; expected a text that is not empty")
    return list(zip(questions, passages, strict=True))


def _as_data(pairs: list[tuple[str, str]], is_v2: bool) -> SquadData:
    """The questions as a data set without answers: each passage once, with each of its questions once."""
    passages: dict[str, Passage] = {}
    for number, (question, text) in enumerate(dict.fromkeys(pairs)):
        passage = passages.setdefault(text, Passage("", text, []))
        passage.examples.append(Example(str(number), question, (), (), False, False))
    return SquadData("the passages", list(passages.values()), is_v2, has_answers=False, summary=Summary())


def _examples(data: SquadData) -> list[tuple[Passage, Example]]:
    return [(passage, example) for passage in data.passages for example in passage.examples]


def _reply(question: str, prediction: Prediction, threshold: float | None) -> Reply:
    score = prediction.no_answer_score
    refused = not prediction.candidates or (threshold is not None and score is not None and is_refused(score, threshold))
    return Reply(question, prediction.candidates, refused, prediction.null_confidence, prediction.null_score)
