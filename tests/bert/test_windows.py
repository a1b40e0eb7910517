"""Windows: token for token what transformers makes of the same texts, with labels that recover the answers.

Oracles: transformers' own tokenisation with overflow, and for the labels a search over all tokens.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qa import weights
from qa.bert.windows import NO_ANSWER, NUM_SPECIAL, Windows, make_windows, max_question_tokens
from qa.data.squad import Answer, Example, Passage, parse_squad
from qa.errors import UserError

WORDS = ("the bridge Calford opened in 1846 painters-and town's Élise Tordale 東京 naïve [SEP] x\u0301 \x07 U.S. 3,000 "
         "unbelievablylongwordthatisunknown — “quoted” 𝟙𝟚 ﬁne \u200b Åse (was) £5m").split(" ")
DROPPED = " \r\n\t\u00a0\u200b\x07\u0301"  # what a BERT tokenizer makes no token of
BLANKS = [" "] * 8 + ["  ", "\n", "\r\n", "\t", "\u00a0", ""]


@pytest.fixture(scope="module")
def tokenizer(tiny_bert_folder):
    return weights.load_tokenizer(tiny_bert_folder)


@pytest.fixture
def reference(tiny_bert_folder):
    """transformers' tokenizer, an object of its own: calling it changes its truncation."""
    return AutoTokenizer.from_pretrained(tiny_bert_folder)


def random_text(rng: random.Random, num_words: int) -> str:
    return rng.choice(["", " ", "\r\n "]) + "".join(rng.choice(WORDS) + rng.choice(BLANKS) for _ in range(num_words))


def random_passages(seed: int, num_passages: int, longest: int) -> list[Passage]:
    """Passages with 1 to 4 questions each; any characters may be the answer, and a fifth has none."""
    rng = random.Random(seed)
    passages = []
    for passage in range(num_passages):
        context, examples = random_text(rng, rng.randint(1, longest)), []
        for number in range(rng.randint(1, 4)):
            answers = ()
            if rng.random() < 0.8:
                start = rng.randrange(len(context))
                start -= start > 0 and context[start] == "\u0301"  # an answer does not begin within a character
                answers = (Answer(context[start:start + rng.randint(1, 25)], start),)
            question = random_text(rng, rng.randint(0, 5))
            examples.append(Example(f"{passage}-{number}", question, answers, (), not answers, True))
        passages.append(Passage("title", context, examples))
    return passages


def passage_about(context: str, *questions: str, answer: Answer | None = None) -> Passage:
    """With questions named 0, 1, ... that all have this answer."""
    answers = (answer,) if answer else ()
    return Passage("title", context, [Example(str(number), question, answers, (), False, True)
                                      for number, question in enumerate(questions)])


def with_contexts(passages: list[Passage]) -> list[tuple[Example, str]]:
    return [(example, passage.text) for passage in passages for example in passage.examples]


def rows_of(windows: Windows, index: int) -> np.ndarray:
    return np.flatnonzero(windows.example_index == index)


def tokens_of(windows: Windows, row: int) -> np.ndarray:
    return windows.tokens[windows.bounds[row]:windows.bounds[row + 1]]


def offsets_of(windows: Windows, row: int) -> np.ndarray:
    return windows.offsets[windows.bounds[row]:windows.bounds[row + 1]]


@pytest.mark.parametrize("max_length, overlap", [(24, 0), (32, 7), (40, 1), (64, 32), (128, 63)])
def test_windows_equal_transformers_overflowing_tokens(max_length, overlap, tokenizer, reference):
    passages = random_passages(max_length, num_passages=15, longest=80)
    windows = make_windows(passages, tokenizer, max_length, overlap)
    assert windows.example_index.tolist() == sorted(windows.example_index.tolist())
    num_compared = 0
    for index, (example, context) in enumerate(with_contexts(passages)):
        rows = rows_of(windows, index)
        if len(reference(example.question, add_special_tokens=False)["input_ids"]) > max_question_tokens(max_length, overlap):
            continue  # transformers would cut the passage to nothing, or fail
        expected = reference(example.question, context, truncation="only_second", max_length=max_length,
                             stride=overlap, return_overflowing_tokens=True, return_offsets_mapping=True)
        assert len(rows) == len(expected["input_ids"]), example
        batch = windows.batch(rows, "cpu")
        for number, row in enumerate(rows):
            ids, length = expected["input_ids"][number], len(expected["input_ids"][number])
            assert tokens_of(windows, row).tolist() == ids
            padding = batch["input_ids"].shape[1] - length
            assert batch["input_ids"][number].tolist() == ids + [0] * padding
            assert batch["attention_mask"][number].tolist() == [True] * length + [False] * padding
            assert batch["token_type_ids"][number].tolist() == expected["token_type_ids"][number] + [0] * padding
            in_passage = [place == 1 for place in expected.sequence_ids(number)]
            first, past = windows.passage_range[row]
            assert in_passage == [first <= column < past for column in range(length)]
            offsets = [(start, end + (context[end:end + 1] == "\u0301")) if inside else (0, 0)  # the one mark in WORDS
                       for (start, end), inside in zip(expected["offset_mapping"][number], in_passage, strict=True)]
            assert [tuple(pair) for pair in offsets_of(windows, row).tolist()] == offsets
            num_compared += 1
    assert num_compared > 15


@pytest.mark.parametrize("max_length, overlap", [(24, 0), (32, 7), (50, 20), (128, 63)])
def test_window_labels_recover_answer_text(max_length, overlap, tokenizer):
    """The labels are the tokens that have a character of the answer; null unless all of them are in the window."""
    passages = random_passages(1000 + max_length, num_passages=60, longest=80)
    windows = make_windows(passages, tokenizer, max_length, overlap)
    num_labelled = num_null = 0
    for index, (example, context) in enumerate(with_contexts(passages)):
        every_token = {tuple(pair) for row in rows_of(windows, index) for pair in offsets_of(windows, row).tolist()}
        answer = example.answers[0] if example.answers else Answer("", 0)
        wanted = {(s, e) for s, e in every_token if s < answer.end_char and e > answer.start_char}
        for row in rows_of(windows, index):
            offsets = [tuple(pair) for pair in offsets_of(windows, row).tolist()]
            start, end = int(windows.start_token[row]), int(windows.end_token[row])
            if wanted and wanted <= set(offsets):
                assert set(offsets[start:end + 1]) == wanted
                text = context[offsets[start][0]:offsets[end][1]]
                assert answer.text.strip(DROPPED) in text
                num_labelled += 1
            else:
                assert start == end == NO_ANSWER
                num_null += 1
    assert num_labelled > 50 and num_null > 50


@pytest.mark.parametrize("answer", [
    "Be\u0301de\u0301", "Béde\u0323\u0301", "دِمَشْقَ", "दिल्ली", "मुंबई", "שָׁלוֹם", "กรุงเก่า่",
    "❤\ufe0f", "1\ufe0f\u20e3", "👍🏽", "👩\u200d🔬", "1846", "3,000"])
@pytest.mark.parametrize("after", ["", " was", ". The"])
def test_an_answer_keeps_the_marks_at_its_end(answer, after, tokenizer):
    """What a perfect span head answers: the characters of the labelled tokens."""
    passage = passage_about(f"the {answer}{after}", "who", answer=Answer(answer, 4))
    windows = make_windows([passage], tokenizer, 32, 4)
    start, end = offsets_of(windows, 0)[[windows.start_token[0], windows.end_token[0]]]
    assert passage.text[start[0]:end[1]] == answer


def test_an_answer_cut_by_a_window_is_labelled_in_the_window_that_holds_it_whole(tokenizer):
    context = "the bridge opened in 1846 the bridge opened in 1846"
    answer = Answer("opened in 1846", context.index("opened"))
    windows = make_windows([passage_about(context, "the", answer=answer)], tokenizer, 12, 4)
    found = []
    for row in range(len(windows)):
        offsets = offsets_of(windows, row)
        start, end = windows.start_token[row], windows.end_token[row]
        found.append(context[offsets[start, 0]:offsets[end, 1]] if start else None)
        columns = slice(*windows.passage_range[row])
        whole = answer.start_char >= offsets[columns][0, 0] and answer.end_char <= offsets[columns][-1, 1]
        assert (found[-1] == answer.text) == whole
    assert answer.text in found and None in found


def test_token_that_is_longer_than_the_answer_is_the_nearest_label(tokenizer):
    windows = make_windows([passage_about("opened 1846", "the", answer=Answer("open", 0))], tokenizer, 32, 4)
    start, end = offsets_of(windows, 0)[[windows.start_token[0], windows.end_token[0]]]
    assert start[0] == 0 and end[1] >= 4


def test_answer_of_dropped_characters_is_labelled_absent_and_counted(tokenizer):
    context = "the \x07\x07 bridge"
    windows = make_windows([passage_about(context, "the", answer=Answer("\x07\x07", 4))], tokenizer, 32, 4)
    assert windows.start_token.tolist() == windows.end_token.tolist() == [0]
    assert list(windows.summary.problems.items()) == [
        ("answer made of characters that the tokenizer drops, labelled as absent", (1, "0"))]


def test_long_question_is_truncated_and_counted(tokenizer, reference):
    question = "when was the bridge opened in Tordale " * 5
    ids = reference(question, add_special_tokens=False)["input_ids"]
    context = "the bridge opened in 1846 " * 30
    passages = [passage_about(context, "when?", question, question * 2, answer=Answer("1846", 21))]
    for max_length, overlap in ((32, 8), (32, 25), (128, 32)):
        most = max_question_tokens(max_length, overlap)
        windows = make_windows(passages, tokenizer, max_length, overlap)
        problem = f"question longer than {most} tokens, truncated"
        expected = {problem: (2, "1")} if len(ids) > most else {problem: (1, "2")}
        assert windows.summary.problems == expected
        assert windows.lengths.max() == max_length
        for row in rows_of(windows, 1):
            size = min(most, len(ids))
            assert tokens_of(windows, row)[:size + 2].tolist() == [2, *ids[:size], 3]  # [CLS] question [SEP]
            assert windows.passage_range[row, 0] == size + 2


def test_every_overlap_is_used_or_refused_with_one_that_works(tokenizer):
    """Whatever the question's length, windows advance, share exactly `overlap` tokens, and cover the passage."""
    context, question = "the bridge opened in 1846 " * 8, "when was it opened " * 9
    passages = [passage_about(context, question, "when", "")]
    num_tokens = len(tokenizer.backend_tokenizer.encode(context, add_special_tokens=False).ids)
    for max_length in (8, 9, 16, 31):
        for overlap in range(max_length + 2):
            try:
                windows = make_windows(passages, tokenizer, max_length, overlap)
            except UserError as error:
                assert overlap >= max_length - NUM_SPECIAL - 1  # no room for one question token and one new passage token
                assert f"--overlap {overlap}" in str(error) and "\n" not in str(error)
                max_question_tokens(max_length, int(str(error).split()[-1]))  # the overlap that the message advises
                continue
            for index in range(3):
                sizes = np.diff(windows.passage_range[rows_of(windows, index)])[:, 0]
                assert sizes.sum() - overlap * (len(sizes) - 1) == num_tokens
                assert (sizes[:-1] == sizes.max()).all() and windows.lengths.max() <= max_length
                assert len(sizes) == 1 or sizes[-1] > overlap  # the last window brings something new


@pytest.mark.parametrize("context", ["", " ", "\r\n", "\x07"])
def test_passage_without_tokens_gives_one_window_without_passage(context, tokenizer):
    passages = [passage_about(context, "when"), passage_about("the bridge", "when")]
    windows = make_windows(passages, tokenizer, 32, 4)
    assert windows.example_index.tolist() == [0, 1]
    first, past = windows.passage_range[0]
    assert first == past == windows.lengths[0] - 1
    assert tokens_of(windows, 0)[0] == 2 and tokens_of(windows, 0)[-2:].tolist() == [3, 3]
    assert windows.start_token.tolist() == windows.end_token.tolist() == [0, 0]
    batch = windows.batch(np.array([0, 1]), "cpu")
    assert batch["token_type_ids"][0].sum() == 1  # the last [SEP]


def test_sharing_a_passage_changes_nothing(tokenizer):
    """Tokenised once for its questions, or once for each of them: the same windows."""
    passages = random_passages(7, num_passages=30, longest=60)
    copies = [Passage("title", context, [example]) for example, context in with_contexts(passages)]
    shared, separate = make_windows(passages, tokenizer, 40, 10), make_windows(copies, tokenizer, 40, 10)
    for name in {field.name for field in dataclasses.fields(Windows)} - {"summary"}:  # which counts passages, too
        assert np.array_equal(getattr(shared, name), getattr(separate, name)), name


def test_passages_are_tokenised_in_chunks_without_a_trace(tokenizer, monkeypatch):
    passages = random_passages(8, num_passages=30, longest=20)
    whole = make_windows(passages, tokenizer, 40, 10)
    monkeypatch.setattr("qa.bert.windows.CHUNK", 7)
    chunked = make_windows(passages, tokenizer, 40, 10)
    for field in dataclasses.fields(Windows):
        assert np.array_equal(getattr(whole, field.name), getattr(chunked, field.name)), field.name


def test_truncation_and_padding_of_a_tokenizer_file_do_not_cut(tiny_bert_folder, tokenizer, tmp_path):
    """As all-MiniLM-L6-v2's tokenizer.json asks for: 128 tokens of both."""
    folder = tmp_path / "cutting"
    shutil.copytree(tiny_bert_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "[PAD]"}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert len(AutoTokenizer.from_pretrained(folder).backend_tokenizer.encode("the " * 30).ids) == 12  # it does cut
    passages = random_passages(9, num_passages=10, longest=60)
    expected, found = (make_windows(passages, each, 64, 16) for each in (tokenizer, weights.load_tokenizer(folder)))
    assert np.array_equal(found.tokens, expected.tokens) and np.array_equal(found.offsets, expected.offsets)
    saved = tmp_path / "saved"
    weights.load_tokenizer(folder).save_pretrained(saved)
    content = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["truncation"] is None and content["padding"] is None  # nor does the product inherit it


def test_batch_takes_rows_in_any_order_and_pads_to_the_longest_of_them(small_squad, tokenizer):
    passages = parse_squad(small_squad, "small").passages
    windows = make_windows(passages, tokenizer, 64, 16)
    rows = np.array([5, 0, 17, 5])
    batch = windows.batch(rows, "cpu")
    longest = windows.lengths[rows].max()
    for number, row in enumerate(rows):
        padding = longest - windows.lengths[row]
        assert batch["input_ids"][number].tolist() == tokens_of(windows, row).tolist() + [0] * padding
        assert batch["attention_mask"][number].tolist() == [True] * windows.lengths[row] + [False] * padding
        assert batch["start_token"][number] == windows.start_token[row]
        assert batch["end_token"][number] == windows.end_token[row]
    assert {name: str(tensor.dtype) for name, tensor in batch.items()} == {
        "input_ids": "torch.int64", "attention_mask": "torch.bool", "token_type_ids": "torch.int64",
        "start_token": "torch.int64", "end_token": "torch.int64"}


def test_a_passage_of_unknown_tokens_is_told_with_a_word_of_it():
    """An uncased vocabulary whose tokenizer keeps capitals: "London" and "Thames" are [UNK], 2 of 4 tokens."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "london", "lies", "on", "thames"]
    for lowercase, expected in ((False, ["'London'"]), (True, [])):
        backend = Tokenizer(models.WordPiece({token: id for id, token in enumerate(vocabulary)}, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                                            pad_token="[PAD]")
        example = Example("1", "on?", (), (), False, False)
        windows = make_windows([Passage("t", "London lies on Thames", [example])], tokenizer, 32, 4)
        assert [word for problem, (_, word) in windows.summary.problems.items() if "[UNK]" in problem] == expected
