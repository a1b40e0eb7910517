"""SQuAD data in, a list of `Passage` with its questions out, every answer checked against the text that it claims to be.

Reads the official JSON of v1.1 (Rajpurkar et al. 2016, arXiv:1606.05250) and v2.0 (Rajpurkar et al. 2018,
arXiv:1806.03822) from a file, the hub's flat rows (`squad`, `squad_v2`), or the built-in data (`demo`, `demo_v2`):

    {"version": "v2.0", "data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [
        {"id": ..., "question": ..., "is_impossible": false, "answers": [{"text": ..., "answer_start": 515}]}]}]}]}

Offsets count Unicode code points, so a context is never stripped or normalised. Equal passages of one article become one
`Passage`, which is read once for all its questions. What is wrong with the data is counted by name in a `Summary` and never
hidden: such a question is left out of training, yet still predicted and scored, as the official rules want.
Used by: windows.py and encode.py (features), splits.py (parts of the data), metrics.py (gold answers).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qa.data.fields import Question, is_v2_version, read_question, replace_half_pairs
from qa.errors import UserError

Row = tuple[str, str, Question]  # of a file: an article's title, a context, a question about it
HUB_NAMES = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
DEMO_NAMES = ("demo", "demo_v2")
HALF_PAIR_REPLACED = "text with half a surrogate pair, which was replaced by U+FFFD"


@dataclass(frozen=True, slots=True)
class Answer:
    """A verified answer: `passage.text[start_char:end_char] == text`; `end_char` is exclusive."""

    text: str
    start_char: int

    @property
    def end_char(self) -> int:
        return self.start_char + len(self.text)


@dataclass(frozen=True, slots=True)
class Example:
    """One question about a passage."""

    id: str  # unique in its SquadData
    question: str
    answers: tuple[Answer, ...]  # located in the passage, in the file's order; the first one is the training label
    gold_texts: tuple[str, ...]  # every answer text just as the file has it: what scoring compares with
    is_impossible: bool  # v2.0 and no answer; always False in v1.1
    trainable: bool  # the first answer was located, or v2.0 says that there is none


@dataclass(eq=False, slots=True)
class Passage:
    """What is read once, and the questions about it. Told apart by identity: equal texts in two articles are two."""

    title: str
    text: str
    examples: list[Example]


@dataclass
class Summary:
    """What was found in the data: how often, with one question id (or place) as an example."""

    problems: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, problem: str, where: str) -> None:
        count, first = self.problems.get(problem, (0, where))
        self.problems[problem] = (count + 1, first)

    def lines(self) -> list[str]:
        return [f"{count} × {problem} (e.g. {where:.60})" for problem, (count, where) in self.problems.items()]

    def reasons(self) -> str:
        """The end of an error that says that nothing can be used."""
        return f". Found: {'; '.join(self.lines())}" if self.problems else ""


@dataclass
class SquadData:
    source: str
    passages: list[Passage]
    is_v2: bool
    has_answers: bool  # False: a file to predict, not to score
    summary: Summary
    repeated_ids: frozenset[str] = frozenset()  # ids that several questions of the file have; none is an Example's

    @property
    def examples(self) -> list[Example]:
        """All questions, in the passages' order; what belongs to a question is counted so everywhere."""
        return [example for passage in self.passages for example in passage.examples]

    def describe(self) -> str:
        """One line per finding, the totals first."""
        examples = self.examples
        num_trainable = sum(example.trainable for example in examples)
        head = (f"{self.source}: SQuAD {'v2.0' if self.is_v2 else 'v1.1'}, {len(examples):,} questions on "
                f"{len(self.passages):,} passages, {num_trainable:,} usable for training")
        return "\n".join([head, *("  " + line for line in self.summary.lines())])


def load_squad(source: str, split: str = "train") -> SquadData:
    """Load a data set by name.

    Args:
        source: a path of an official JSON file; `squad` or `squad_v2` (hub); `demo` or `demo_v2` (built in).
        split: "train" or "dev"; a file is its own split, so it is ignored there.

    Raises:
        UserError: no such file or hub, no JSON, JSON of another shape, or no question at all.
    """
    assert split in ("train", "dev"), split
    if source in DEMO_NAMES:
        from qa.data.demo import demo_squad

        document = demo_squad("train" if split == "train" else "held_out", v2=source == "demo_v2")
        return parse_squad(document, source)
    if source in HUB_NAMES:
        return parse_hub_rows(_download(source, split), source, is_v2=source == "squad_v2")
    return parse_squad(_read_json(Path(source)), source)


def parse_squad(document: object, source: str) -> SquadData:
    """Turn official SQuAD JSON, already parsed, into passages. `source` names it in messages."""
    articles = document.get("data") if isinstance(document, dict) else None
    if not isinstance(articles, list):
        raise UserError(f"{source}: not SQuAD JSON: expected an object with a list \"data\" of articles, "
                        f"found {_shape(document)}. See the README for the form")
    summary = Summary()
    rows = list(_questions(articles, source, summary))
    if not rows:
        raise UserError(f"{source}: no question in it (articles: {len(articles)}); expected data → paragraphs → qas"
                        + summary.reasons())
    is_v2 = is_v2_version(document.get("version")) or any(asked.is_impossible is not None for _, _, asked in rows)
    has_answers = any(asked.is_impossible or asked.answers() for _, _, asked in rows)
    rows = _without_repeats(rows, summary)
    ids, repeated_ids = _unique_ids(rows, summary)
    passages: dict[tuple[str, str], Passage] = {}
    for question_id, (title, context, asked) in zip(ids, rows, strict=True):
        passage = passages.setdefault((title, context), Passage(title, context, []))
        passage.examples.append(_example(question_id, context, asked, is_v2, has_answers, summary))
    return SquadData(source, list(passages.values()), is_v2, has_answers, summary, repeated_ids)


def parse_hub_rows(rows: Iterable[dict], source: str, is_v2: bool) -> SquadData:
    """The hub's flat rows, one question each, as a file with one passage per question, whose equal passages are then joined."""
    articles: dict[str, list[dict]] = {}
    for row in rows:
        question = {"id": row["id"], "question": row["question"], "answers": row["answers"]}
        articles.setdefault(row["title"], []).append({"context": row["context"], "qas": [question]})
    data = [{"title": title, "paragraphs": paragraphs} for title, paragraphs in articles.items()]
    return parse_squad({"version": "v2.0" if is_v2 else "1.1", "data": data}, source)


def find_answer(context: str, text: str, claimed_start: int | None) -> int | None:
    """The answer's start: the claimed one if the text stands there, else its only occurrence, else None."""
    if not text:
        return None
    if claimed_start is not None and claimed_start >= 0 and context.startswith(text, claimed_start):
        return claimed_start
    first = context.find(text)
    only_one = first >= 0 and context.find(text, first + 1) < 0
    return first if only_one else None


def _questions(articles: list, source: str, summary: Summary) -> Iterator[Row]:
    """(title, context, question) in file order; what lacks a field is counted and passed over."""
    for article_number, article in enumerate(articles):
        place = f"article {article_number}"
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            raise UserError(f"{source}: {place} has no list \"paragraphs\" (found {_shape(article)}); "
                            "expected data → paragraphs → qas, not one question per row")
        title = article.get("title")
        title = replace_half_pairs(str(title)) if title and isinstance(title, str | int | float) else place
        for paragraph in paragraphs:
            context = paragraph.get("context") if isinstance(paragraph, dict) else None
            qas = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(context, str) or not isinstance(qas, list):
                summary.add("passage without a text context and a list of qas, passed over", title)
                continue
            if (whole := replace_half_pairs(context)) != context:
                summary.add(HALF_PAIR_REPLACED, title)
            for qa in qas:
                if isinstance(qa, dict) and isinstance(qa.get("question"), str):
                    yield title, whole, read_question(qa)
                else:
                    summary.add("question without the field question, passed over", title)


def _without_repeats(rows: list[Row], summary: Summary) -> list[Row]:
    """A question that stands in the file twice, id and passage and all, is one question with the answers of both."""
    first: dict[tuple[str, str, str], Question] = {}
    kept = []
    for title, context, asked in rows:
        same = first.setdefault((asked.id, context, asked.text), asked) if asked.id else asked
        if same is asked:
            kept.append((title, context, asked))
        else:
            same.claims += [claim for claim in asked.claims if claim not in same.claims]
            same.faults += asked.faults
            summary.add("question that stands in the file before (same id, passage and text), joined with it", asked.id)
    return kept


def _unique_ids(rows: list[Row], summary: Summary) -> tuple[list[str], frozenset[str]]:
    """An id for every question, by which it is predicted and scored; and the ids of the file that several questions have.

    Ids that restart in every document: the question "0" of the article "Kolvik" is "Kolvik/0", a second one "Kolvik/0/2".
    """
    counts = Counter(asked.id for _, _, asked in rows)
    repeated = frozenset(question_id for question_id, count in counts.items() if count > 1 and question_id)
    taken, uses, ids = set(counts), Counter(), []
    for number, (title, _, asked) in enumerate(rows, start=1):
        question_id = asked.id
        if not asked.id or asked.id in repeated:
            wanted = f"{title}/{asked.id}" if asked.id else f"question-{number}"
            while question_id in taken:
                uses[wanted] += 1
                question_id = wanted if uses[wanted] == 1 else f"{wanted}/{uses[wanted]}"
            summary.add("id that several questions have, made unique with the article's title" if asked.id else
                        "question without an id, named by its number in the file", question_id)
        taken.add(question_id)
        ids.append(question_id)
    return ids, repeated


def _example(question_id: str, context: str, asked: Question, is_v2: bool, has_answers: bool, summary: Summary) -> Example:
    """Check one question; every reason to leave it out of training is counted."""
    faults, claims = list(asked.faults), asked.answers()
    if not asked.text.strip():
        faults.append("empty question")
    if not context.strip():
        faults.append("empty passage")
    if asked.has_half_pair:
        summary.add(HALF_PAIR_REPLACED, question_id)
    if len(claims) < len(asked.claims):
        summary.add("answer without a character, taken as no answer", question_id)
    if has_answers and not asked.faults:
        if asked.is_impossible is not None and asked.is_impossible == bool(claims):
            faults.append("is_impossible contradicts the answers")
        elif not is_v2 and not claims:
            faults.append("unanswerable question in v1.1 data")

    answers = []
    for number, (text, claimed_start) in enumerate(claims):
        start = find_answer(context, text, claimed_start)
        if start is None and number == 0:
            faults.append("answer not at its offset, nor at one other place alone")
        elif start is None:
            summary.add("further answer not at its offset, nor at one other place alone, used for scoring only", question_id)
        else:
            answers.append(Answer(text, start))
            if start != claimed_start:
                summary.add("answer moved to its only occurrence in the passage", question_id)
    for fault in faults:
        summary.add(f"{fault}, left out of training", question_id)
    gold_texts = tuple(text for text, _ in (claims if is_v2 else asked.claims))  # "" is no gold of v2.0's, but one of v1.1's
    is_impossible = is_v2 and has_answers and not claims and not asked.faults
    trainable = has_answers and not faults and bool(answers or is_impossible)
    return Example(question_id, asked.text, tuple(answers), gold_texts, is_impossible, trainable)


def _read_json(path: Path) -> object:
    try:
        content = path.read_bytes()  # bytes: no newline translation, which would shift the offsets behind a "\r"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a SQuAD JSON file, or one of "
                        f"{', '.join([*HUB_NAMES, *DEMO_NAMES])}") from None
    if not content.strip():
        raise UserError(f"{path}: the file is empty; expected SQuAD JSON")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); expected SQuAD JSON") from None


def _download(name: str, split: str) -> Iterable[dict]:
    """The hub's rows; imported here because `datasets` takes seconds to import and few runs need it."""
    import datasets

    datasets.disable_progress_bars()  # one would be drawn by every rank
    try:
        return datasets.load_dataset(HUB_NAMES[name], split="train" if split == "train" else "validation")
    except Exception as error:  # a missing hub shows itself in a dozen exception types
        raise UserError(f"{name}: the hub cannot be reached ({type(error).__name__}); give a SQuAD JSON file instead, "
                        "or demo / demo_v2, which need no hub") from None


def _shape(value: object) -> str:
    if isinstance(value, dict):
        return "an object with the keys " + (", ".join(map(str, list(value)[:6])) or "(none)")
    return f"a {type(value).__name__}"
