"""SQuAD data in, `Passage`s with their questions out. fields.py reads a question object (`Question`; `Claim`: an answer as the
file claims it); this file checks every answer against its passage.

This reads the official JSON of v1.1 (Rajpurkar et al. 2016, arXiv:1606.05250) and v2.0 (Rajpurkar et al. 2018,
arXiv:1806.03822) from a file, the rows of the hub (`squad`, `squad_v2`), or the built-in data (`demo`, `demo_v2`):

    {"version": "v2.0", "data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [
        {"id": ..., "question": ..., "is_impossible": false, "answers": [{"text": ..., "answer_start": 515}]}]}]}]}

An `answer_start` counts Unicode code points, so we never strip or normalise a context. Equal passages of one article become
one `Passage`, which is tokenised once for all its questions. What is wrong with the data is counted by name in a `Summary`.
A question whose answer cannot be trusted is left out of training, but still predicted and scored, as the official rules want.
Used by: the three scripts and qa/reader.py (`load_squad`), which hand the passages to splits.py, bert/windows.py and
llama/encode.py, and the examples to evaluation/metrics.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qa.data.demo import demo_squad
from qa.data.fields import Question, is_v2_version, read_question, replace_half_pairs
from qa.errors import UserError
from qa.files import read_json

Row = tuple[str, str, Question]  # of a file: the title of an article, a context, a question about it
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
    answers: tuple[Answer, ...]  # those found in the passage, in the order of the file; the first one is the training label
    gold_texts: tuple[str, ...]  # every answer text, exactly as in the file: scoring compares with these
    is_impossible: bool  # v2.0 and no answer; always False in v1.1
    trainable: bool  # the first answer was found, or v2.0 says that there is none


@dataclass(eq=False, slots=True)
class Passage:
    """A text and the questions about it. Two articles may have passages with the same text: these are two objects."""

    title: str
    text: str
    examples: list[Example]


@dataclass
class Summary:
    """What is wrong with the data: how often, and the id (or place) of the first case."""

    problems: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, problem: str, where: str) -> None:
        count, first = self.problems.get(problem, (0, where))
        self.problems[problem] = (count + 1, first)

    def lines(self) -> list[str]:
        return [f"{count} × {problem} (e.g. {where:.60})" for problem, (count, where) in self.problems.items()]

    def reasons(self) -> str:
        """The end of an error message that says that nothing can be used."""
        return f". Found: {'; '.join(self.lines())}" if self.problems else ""


@dataclass
class SquadData:
    source: str
    passages: list[Passage]
    is_v2: bool
    has_answers: bool  # False: a file to predict, not to score
    summary: Summary
    repeated_ids: frozenset[str] = frozenset()  # ids that several questions of the file share: their Examples have new ones

    @property
    def examples(self) -> list[Example]:
        """All questions, passage by passage. An example_index counts them in this order everywhere."""
        return [example for passage in self.passages for example in passage.examples]

    @property
    def titles(self) -> list[str]:
        """The title of each example's article."""
        return [passage.title for passage in self.passages for _ in passage.examples]

    def describe(self) -> str:
        """The totals, then one line for each problem."""
        num_trainable = sum(example.trainable for example in self.examples)
        usable = f"{num_trainable:,} usable for training" if self.has_answers else "without answers"
        head = (f"{self.source}: SQuAD {'v2.0' if self.is_v2 else 'v1.1'}, {counted(len(self.examples), 'question')} on "
                f"{counted(len(self.passages), 'passage')}, {usable}")
        return "\n".join([head, *("  " + line for line in self.summary.lines())])


def counted(number: int, noun: str) -> str:
    """ "1 question", "1,495 questions"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def load_squad(source: str, split: str = "train") -> SquadData:
    """Load a data set by its name or path; `split` is "train" or "dev", and ignored for a file.

    No such file, no hub, not JSON, JSON of another shape, or no question at all is a UserError.
    """
    assert split in ("train", "dev"), split
    if source in DEMO_NAMES:
        return parse_squad(demo_squad("train" if split == "train" else "held_out", v2=source == "demo_v2"), source)
    if source in HUB_NAMES:
        return parse_hub_rows(_download(source, split), source, is_v2=source == "squad_v2")
    return parse_squad(read_json(Path(source), f"SQuAD JSON, or one of {', '.join([*HUB_NAMES, *DEMO_NAMES])}"), source)


def parse_squad(document: object, source: str) -> SquadData:
    """Official SQuAD JSON, already parsed, as passages. `source`: its name in messages."""
    articles = document.get("data") if isinstance(document, dict) else None
    if not isinstance(articles, list):
        raise UserError(f"{source}: not SQuAD JSON: expected an object with a list \"data\" of articles, "
                        f"found {_shape(document)}. The README shows the form")
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
    """The hub gives one row for each question, with its passage. `parse_squad` joins the equal passages."""
    data = [{"title": row["title"], "paragraphs": [{"context": row["context"], "qas": [row]}]} for row in rows]
    return parse_squad({"version": "v2.0" if is_v2 else "1.1", "data": data}, source)


def find_answer(context: str, text: str, claimed_start: int | None) -> int | None:
    """Where the answer starts: at the claimed place if the text is there, else at its only occurrence, else None."""
    if claimed_start is not None and claimed_start >= 0 and context.startswith(text, claimed_start):
        return claimed_start
    first, last = context.find(text), context.rfind(text)
    return first if first == last >= 0 else None


def _questions(articles: list, source: str, summary: Summary) -> Iterator[Row]:
    """(title, context, question) in the order of the file. What lacks a field is counted and skipped."""
    for article_number, article in enumerate(articles):
        place = f"article {article_number}"
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            raise UserError(f"{source}: {place} has no list \"paragraphs\" (found {_shape(article)}); "
                            "expected data → paragraphs → qas, not one question per row" + summary.reasons())
        title = article.get("title")
        title = replace_half_pairs(str(title)) if title and isinstance(title, str | int | float) else place
        for paragraph in paragraphs:
            context, qas = (paragraph.get(name) if isinstance(paragraph, dict) else None for name in ("context", "qas"))
            if not isinstance(context, str) or not isinstance(qas, list):
                summary.add("passage without a text context and a list of qas, skipped", title)
                continue
            if (whole := replace_half_pairs(context)) != context:
                summary.add(HALF_PAIR_REPLACED, title)
            for qa in qas:
                if isinstance(qa, dict) and isinstance(qa.get("question"), str):
                    yield title, whole, read_question(qa)
                else:
                    summary.add("question without the field question, skipped", title)


def _without_repeats(rows: list[Row], summary: Summary) -> list[Row]:
    """A question that the file has twice (same id, passage and text) becomes one question with the answers of both."""
    first: dict[tuple[str, str, str], Question] = {}
    kept = []
    for title, context, asked in rows:
        same = first.setdefault((asked.id, context, asked.text), asked) if asked.id else asked
        if same is asked:
            kept.append((title, context, asked))
        else:
            same.claims += [claim for claim in asked.claims if claim not in same.claims]
            same.faults += asked.faults
            summary.add("repeated question (same id, passage and text), joined with the first", asked.id)
    return kept


def _unique_ids(rows: list[Row], summary: Summary) -> tuple[list[str], frozenset[str]]:
    """An id for every question, by which it is predicted and scored; and the ids of the file that several questions have.

    For example, the ids may restart in every document: the question "0" of the article "Kolvik" becomes "Kolvik/0", and
    another "0" of it "Kolvik/0/2".
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
    """Check one question, and count every reason to leave it out of training."""
    faults, claims = list(asked.faults), asked.answers()
    if not asked.text.strip():
        faults.append("empty question")
    if not context.strip():
        faults.append("empty passage")
    if asked.has_half_pair:
        summary.add(HALF_PAIR_REPLACED, question_id)
    if len(claims) < len(asked.claims):
        summary.add("empty answer, taken as no answer", question_id)
    if has_answers and not asked.faults:
        if asked.is_impossible is not None and asked.is_impossible == bool(claims):
            faults.append("is_impossible contradicts the answers")
        elif not is_v2 and not claims:
            faults.append("unanswerable question in v1.1 data")

    answers = []
    for number, (text, claimed_start) in enumerate(claims):
        start = find_answer(context, text, claimed_start)
        if start is None and number == 0:
            faults.append("answer not at its offset, and not at exactly one other place")
        elif start is None:
            summary.add("further answer not at its offset, and not at exactly one other place, only scored", question_id)
        else:
            answers.append(Answer(text, start))
            if start != claimed_start:
                summary.add("answer moved to its only occurrence in the passage", question_id)
    for fault in faults:
        summary.add(f"{fault}, left out of training", question_id)
    gold_texts = tuple(text for text, _ in (claims if is_v2 else asked.claims))  # "" is a gold in v1.1 only
    is_impossible = is_v2 and has_answers and not claims and not asked.faults
    trainable = has_answers and not faults and bool(answers or is_impossible)
    return Example(question_id, asked.text, tuple(answers), gold_texts, is_impossible, trainable)


def _download(name: str, split: str) -> Iterable[dict]:
    """The rows of the hub."""
    import datasets  # here, because it takes seconds and few runs need it

    datasets.disable_progress_bars()  # every rank would draw one
    try:
        return datasets.load_dataset(HUB_NAMES[name], split="train" if split == "train" else "validation")
    except Exception as error:  # a hub that cannot be reached raises any of a dozen types
        raise UserError(f"{name}: the hub cannot be reached ({type(error).__name__}); give a SQuAD JSON file instead, "
                        "or demo / demo_v2, which need no hub") from None


def _shape(value: object) -> str:
    if isinstance(value, dict):
        return "an object with the keys " + (", ".join(map(str, list(value)[:6])) or "(none)")
    return f"a {type(value).__name__}"
