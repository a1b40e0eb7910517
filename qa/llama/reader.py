"""LLaMA as a reader: a data set's questions in, spans of their passages out, by one of two decoders.

    greedy   the model writes an answer (greedy.py), which is then replaced by a span of the passage (grounding.py)
    exact    the most probable spans of the passage are searched, and proven (search.py)

Each rank reads its share of the *passages*, so that all pieces of a passage are on one rank. Afterwards every rank has all
predictions. Used by: train_llama.py, qa/reader.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from qa.asking import Asked
from qa.data.squad import SquadData
from qa.errors import UserError
from qa.llama.candidates import describe_reachability
from qa.llama.encode import Prompt, encode_passages, max_question_tokens
from qa.llama.extract import extract
from qa.llama.greedy import Generation, best_pieces, generate
from qa.llama.grounding import ground
from qa.llama.memory import PassageMemory
from qa.llama.prompt import PromptTemplate
from qa.llama.rivals import Rivals, log_odds
from qa.llama.search import Extraction, describe_work, join_pieces
from qa.llama.trace import trace_search
from qa.prediction import Answered, Candidate, Prediction
from qa.settings import ReadSettings
from qa.training.distributed import Runtime, gather_objects
from qa.training.precision import Precision
from qa.training.sharding import in_step


@dataclass
class LlamaReader(Asked):
    model: Any  # LlamaForCausalLM
    template: PromptTemplate
    settings: ReadSettings
    precision: Precision
    runtime: Runtime
    micro_tokens: int  # tokens read at a time
    memory: PassageMemory | None = None  # of passages that were asked about, in exact decoding
    rivals: Rivals | None = None  # one question to many passages, of which the best answers are wanted

    def with_each_prompt(self) -> dict[str, LlamaReader]:
        """The same model with the plain and with the engineered prompt; the keys are what a demo prints."""
        tokenizer, is_v2 = self.template.tokenizer, self.template.is_v2
        return {f"before training, {kind} prompt": replace(self, template=PromptTemplate(tokenizer, kind, is_v2))
                for kind in ("plain", "engineered")}

    def check(self, *data: SquadData | None) -> None:
        """Raise a UserError if a passage, a question and an answer do not fit: before training, not after an epoch."""
        for part in filter(None, data):
            self._encode(part)

    @torch.inference_mode()
    def answer(self, data: SquadData) -> Answered:
        """Predict every question of `data`."""
        settings, is_exact, work = self.settings, self.settings.decode == "exact", []
        template, prompts, notes = self._encode(data)
        notes += _scored_demonstrations(template, data)
        was_training = self.model.training
        self.model.eval()
        with self.precision.autocast(), in_step(self.model, self.runtime):
            found = self._decode(template, _share(prompts, data, self.runtime))
        self.model.train(was_training)
        mine = [(one, _extracted(one) if is_exact else _grounded(one, template.refusal)) for one in found]
        everything = [pair for part in gather_objects(mine, self.runtime) for pair in part]
        everything.sort(key=lambda pair: pair[0].prompt.example_index)
        if is_exact:
            work.append(describe_work([extraction for extraction, _ in everything]))
            work += describe_reachability(template, data.examples, prompts, settings.max_answer_length)
        return Answered([prediction for _, prediction in everything], notes, work, {"prompt": template.settings()})

    def for_asking(self, num_best: int, decode: str, may_refuse: bool | None) -> LlamaReader:
        is_v2 = self.settings.is_v2 if may_refuse is None else may_refuse
        return replace(self, settings=replace(self.settings, num_best=num_best, decode=decode, is_v2=bool(is_v2)))

    def for_finding(self, num_best: int) -> LlamaReader:
        return replace(self, rivals=Rivals(num_best, self.settings.na_threshold or 0.0))

    def count_question(self, question: str) -> tuple[int, int]:
        return len(self.template.question_ids(question)), max_question_tokens(self.settings.max_length)

    @torch.inference_mode()
    def trace(self, data: SquadData, question_id: str) -> str:
        """The exact search for one question, as a table to print."""
        template, prompts, _ = self._encode(data)
        prompts = [prompt for prompt in prompts if prompt.id == question_id]
        if not prompts:
            raise UserError(f"--trace {question_id}: no question of {data.source} has this id; expected one such as "
                            f"{data.examples[0].id}")
        lines = []
        with self.precision.autocast():
            for number, prompt in enumerate(prompts, start=1):
                if len(prompts) > 1:
                    lines.append(f"piece {number} of {len(prompts)} of the passage, from character {prompt.piece.start_char}")
                lines += trace_search(self.model, template, prompt, self.settings.max_answer_length, self.settings.num_best)
        return "\n".join(lines)

    def _encode(self, data: SquadData) -> tuple[PromptTemplate, list[Prompt], list[str]]:
        """The questions as prompts, the template that they are made with, and what was cut, to print."""
        settings, template = self.settings, self.template.for_data(self.settings.may_refuse(data))
        return template, *encode_passages(template, data.passages, settings.max_length, settings.overlap,
                                          settings.max_answer_length)

    def _decode(self, template: PromptTemplate, prompts: list[Prompt]) -> list[Generation] | list[Extraction]:
        """What the decoder found for each example."""
        settings = self.settings
        if settings.decode == "greedy":
            generations = generate(self.model, template, prompts, settings.max_answer_length, self.micro_tokens)
            return best_pieces(generations, template.refusal)
        if self.memory:
            self.memory.begin(template.instruction_ids, [prompt.piece for prompt in prompts])
        return join_pieces(extract(self.model, template, prompts, settings.max_answer_length, self.micro_tokens,
                                   settings.num_best, settings.max_expansions or math.inf, self.memory,
                                   self.rivals))


def _scored_demonstrations(template: PromptTemplate, data: SquadData) -> list[str]:
    scored = {(passage.text, example.question.strip()) for passage in data.passages for example in passage.examples}
    number = sum((shot.passage, shot.question) in scored for shot in template.demonstrations)
    return [f"warning: {number} demonstration(s) are questions of the data that is scored"] if number else []


def _share(prompts: list[Prompt], data: SquadData, runtime: Runtime) -> list[Prompt]:
    """This rank's prompts: every num_ranks-th passage, with all its pieces, since one rank must choose among the pieces."""
    numbers: dict[str, int] = {}  # of each text
    passages = [numbers.setdefault(passage.text, len(numbers)) for passage in data.passages for _ in passage.examples]
    return [prompt for prompt in prompts if passages[prompt.example_index] % runtime.num_ranks == runtime.rank]


def _extracted(extraction: Extraction) -> Prediction:
    """The spans as they are. A confidence is the model's own probability; over all texts that exist it adds up to 1."""
    candidates = [Candidate(*span, math.exp(span.log_prob)) for span in extraction.spans]
    text = candidates[0].text if candidates else ""
    return Prediction(extraction.prompt.id, text, candidates, *_refusal_scores(extraction.refusal_log_prob))


def _grounded(generation: Generation, refusal: str | None) -> Prediction:
    """The generated text as a span of the piece of passage that it was read from."""
    question_id, piece = generation.prompt.id, generation.prompt.piece
    scores = _refusal_scores(generation.refusal_log_prob)
    if refusal is not None and generation.text == refusal:
        return Prediction(question_id, "", [], *scores, generation.text, "refused")
    grounded = ground(generation.text, piece.text)
    candidates = []
    if grounded.start_char is not None:
        candidates = [Candidate(grounded.text, grounded.start_char + piece.start_char, grounded.end_char + piece.start_char,
                                generation.log_prob, math.exp(generation.log_prob))]
    return Prediction(question_id, grounded.text, candidates, *scores, generation.text, grounded.kind)


def _refusal_scores(log_prob: float | None) -> tuple[float | None, float | None, float | None]:
    """Of the refusal: the no-answer score, its log-odds; its log P; and its probability."""
    return (None, None, None) if log_prob is None else (log_odds(log_prob), log_prob, math.exp(log_prob))
