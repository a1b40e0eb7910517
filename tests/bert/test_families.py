"""Every family of encoders: windows, scores, training, the way to transformers and back, against transformers' own classes.

One worked case. For "Who?" and "Ann met Bob." RoBERTa's window is <s> Who ? </s> </s> Ann met Bob . </s>: two separators.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForQuestionAnswering, AutoTokenizer

import train_bert
from qa import weights
from qa.bert.model import load_bert, save_bert, span_loss
from qa.bert.windows import make_windows, max_question_tokens, num_special_tokens
from qa.data.squad import Answer, Example, Passage, parse_squad
from qa.errors import Stopped, UserError
from qa.families import FAMILIES
from qa.reader import open_reader

# model_type -> the start of its classes' names, its tokenizer ("wordpiece": BERT's)
ENCODERS = {"bert": ("Bert", "wordpiece"), "roberta": ("Roberta", "bytes"), "xlm-roberta": ("XLMRoberta", "unigram"),
            "camembert": ("Camembert", "unigram"), "distilbert": ("DistilBert", "wordpiece"),
            "electra": ("Electra", "wordpiece")}
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0 to 4
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.1)
DISTILBERT = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64, initializer_range=0.1)
BLANKS = " \t\r\n\u00a0\u3000"
WORDS = "the bridge Calford opened in 1846 painters-and town's Élise naïve 東京 x\u0301 (1846) U.S. 3,000 — ﬁne".split()


def train_tokenizer(model, pre_tokenizer, trainer, texts: list[str]) -> dict:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())["model"]


def make_tokenizer(family: str, texts: list[str]):
    """The family's own class of transformers, with a vocabulary learnt from `texts`."""
    if ENCODERS[family][1] == "bytes":
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        learnt = train_tokenizer(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainer, texts)
        return transformers.RobertaTokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]])
    splits = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    learnt = train_tokenizer(models.Unigram(), splits, trainer, texts)
    return getattr(transformers, f"{ENCODERS[family][0]}Tokenizer")(vocab=[tuple(pair) for pair in learnt["vocab"]])


@pytest.fixture(scope="module")
def tokenizers(tiny_bert_folder, _documents) -> dict:
    texts = [paragraph["context"] for article in _documents[False]["data"] for paragraph in article["paragraphs"]]
    return {family: AutoTokenizer.from_pretrained(tiny_bert_folder) if kind == "wordpiece" else make_tokenizer(family, texts)
            for family, (_, kind) in ENCODERS.items()}


@pytest.fixture(params=ENCODERS)
def family(request) -> str:
    return request.param


@pytest.fixture
def save(family, tokenizers, tmp_path):
    """save(AutoModelForQuestionAnswering) -> a folder with random weights; 64 tokens have a position."""
    def make(cls: type = AutoModel, **more) -> Path:
        settings = DISTILBERT if family == "distilbert" else SIZES
        settings = settings | {"embedding_size": 16} if family == "electra" else settings
        tokenizer = tokenizers[family]
        first = 2 if FAMILIES[family].counts_from_pad else 0
        config = getattr(transformers, f"{ENCODERS[family][0]}Config")(
            vocab_size=len(tokenizer), max_position_embeddings=64 + first, pad_token_id=tokenizer.pad_token_id,
            **({"type_vocab_size": 1} if first else {}), **settings, **more)
        folder = tmp_path / cls.__name__
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            cls.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder
    return make


def random_text(rng: random.Random, num_words: int) -> str:
    """It may begin and end with blanks, also with several."""
    parts = [rng.choice(["", *BLANKS, "  ", "\r\n "])]
    for _ in range(num_words):
        parts += [rng.choice(WORDS), rng.choice([" "] * 8 + ["  ", "\n\n", " \t ", "\u00a0", ""])]
    return "".join(parts)


def random_passages(seed: int, num_passages: int = 12) -> list[Passage]:
    rng, passages = random.Random(seed), []
    for passage in range(num_passages):
        context, examples = "the " + random_text(rng, rng.randint(1, 60)) if passage else " \n ", []
        for number in range(3):
            words = [place for place in range(len(context)) if context[place] not in BLANKS + "\u0301"]
            start = rng.choice(words) if words else 0
            answer = context[start:start + rng.randint(1, 20)].rstrip(BLANKS)
            answers = (Answer(answer, start),) if answer.strip() else ()
            examples.append(Example(f"{passage}-{number}", random_text(rng, rng.randint(0, 4)), answers, (), False, True))
        passages.append(Passage("title", context, examples))
    return passages


def batch_of(folder: Path, document: dict, count: int = 8) -> dict[str, torch.Tensor]:
    windows = make_windows(parse_squad(document, "small").passages, weights.load_tokenizer(folder), 64, 16)
    return windows.batch(np.linspace(0, len(windows) - 1, count).astype(int), "cpu")


def scores(model, batch) -> torch.Tensor:
    return torch.stack(model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]))  # [2, B, L]


def transformers_scores(model, batch, family: str) -> torch.Tensor:
    segments = {"token_type_ids": batch["token_type_ids"]} if FAMILIES[family].has_segments else {}
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"].long(), **segments)
    return torch.stack([output.start_logits, output.end_logits])


def assert_same_scores(found: torch.Tensor, expected: torch.Tensor, batch) -> None:
    real = batch["attention_mask"]
    assert (found - expected)[:, real].abs().max() <= 1e-5 * expected[:, real].abs().max()


def test_worked_case(tokenizers):
    passage = Passage("t", "Ann met Bob.", [Example("1", "Who?", (), (), False, True)])
    windows = make_windows([passage], tokenizers["roberta"], 64, 16)
    tokens = tokenizers["roberta"].convert_ids_to_tokens(windows.tokens.tolist())
    first, past = windows.passage_range[0]
    assert tokens[0] == "<s>" and tokens[first - 2:first] == ["</s>", "</s>"] and tokens[past:] == ["</s>"]
    assert passage.text[windows.offsets[first, 0]:windows.offsets[past - 1, 1]] == passage.text


def assert_windows_equal_transformers(family: str, folder: Path, max_length: int, overlap: int) -> None:
    """Offsets: theirs, without blanks at the edges."""
    tokenizer, reference = weights.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    passages = random_passages(max_length)
    windows = make_windows(passages, tokenizer, max_length, overlap)
    blanks = set(windows.blanks.tolist())
    most, num_compared, questions = max_question_tokens(max_length, overlap, num_special_tokens(tokenizer)), 0, 0
    pairs = [(passage, example) for passage in passages for example in passage.examples]
    for index, (passage, example) in enumerate(pairs):
        if len(reference(example.question, add_special_tokens=False)["input_ids"]) > most:
            continue  # transformers would cut the passage to nothing
        expected = reference(example.question, passage.text, truncation="only_second", max_length=max_length, stride=overlap,
                             return_overflowing_tokens=True, return_offsets_mapping=True)
        rows = np.flatnonzero(windows.example_index == index)
        assert len(rows) == len(expected["input_ids"])
        batch = windows.batch(rows, "cpu")
        for number, row in enumerate(rows):
            begin, end = windows.bounds[row:row + 2]
            assert windows.tokens[begin:end].tolist() == expected["input_ids"][number]
            if FAMILIES[family].has_segments:
                assert batch["token_type_ids"][number, :end - begin].tolist() == expected["token_type_ids"][number]
            in_passage = [place == 1 for place in expected.sequence_ids(number)]
            first, past = windows.passage_range[row]
            assert in_passage == [first <= place < past for place in range(end - begin)]
            for place in range(begin, end):
                theirs, ours = expected["offset_mapping"][number][place - begin], windows.offsets[place]
                text = passage.text[slice(*theirs)] if in_passage[place - begin] else ""
                assert (place in blanks) == (in_passage[place - begin] and not text.strip())
                if text.strip():
                    end_char = ours[1] - (passage.text[ours[1] - 1] == "\u0301" and not text.endswith("\u0301"))
                    assert passage.text[ours[0]:end_char] == text.strip()
            num_compared += 1
        questions += 1
    assert num_compared > questions > 10


@pytest.mark.parametrize("max_length, overlap", [(24, 3), (64, 30)])
def test_windows_equal_transformers_own_encoding_of_the_pair(max_length, overlap, family, save):
    """Also of texts that begin with blanks."""
    assert_windows_equal_transformers(family, save(), max_length, overlap)


@pytest.mark.parametrize("family", ["roberta"], indirect=True)
@pytest.mark.parametrize("add_prefix_space, trim_offsets", [(True, True), (True, False), (False, False)])
def test_windows_where_a_token_has_the_space_before_its_word(add_prefix_space, trim_offsets, family, save):
    folder = save()
    path = folder / "tokenizer_config.json"
    settings = {"add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    loaded = weights.load_tokenizer(folder)
    assert loaded.backend_tokenizer.encode("Ann met", add_special_tokens=False).offsets[-1][1] == 7
    assert (loaded.tokenize("Ann")[0][0] == "Ġ") == add_prefix_space
    assert_windows_equal_transformers(family, folder, 40, 9)


def test_labels_recover_the_answers(family, save):
    windows = make_windows(passages := random_passages(5), weights.load_tokenizer(save()), 64, 24)
    examples = [(passage.text, example) for passage in passages for example in passage.examples]
    blanks, num_labelled = set(windows.blanks.tolist()), 0
    for row in np.flatnonzero(windows.start_token):
        text, example = examples[windows.example_index[row]]
        first, last = windows.bounds[row] + [windows.start_token[row], windows.end_token[row]]
        start_char, end_char = windows.offsets[first, 0], windows.offsets[last, 1]
        [answer] = example.answers
        assert start_char <= answer.start_char and answer.end_char <= end_char and not {first, last} & blanks
        assert text[start_char:end_char] == text[start_char:end_char].strip()
        num_labelled += 1
    assert num_labelled > 10


def test_scores_equal_transformers_own_class_and_theirs_equal_ours(family, save, small_squad, tmp_path):
    """Their checkpoint in ours, the product of ours in theirs."""
    folder = save(AutoModelForQuestionAnswering)
    batch = batch_of(folder, small_squad)
    assert not batch["attention_mask"].all()
    model, head_is_trained = load_bert(folder, 64)
    assert head_is_trained and {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    with torch.no_grad():
        expected = transformers_scores(AutoModelForQuestionAnswering.from_pretrained(folder).eval(), batch, family)
        assert_same_scores(scores(model.eval(), batch), expected, batch)
        plain, head_is_trained = load_bert(save(AutoModel), 64)
        assert not head_is_trained
        save_bert(plain, weights.load_tokenizer(folder), tmp_path / "ours")
        theirs, info = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info.values()), info
        assert theirs.config.architectures == [type(theirs).__name__] == [f"{ENCODERS[family][0]}ForQuestionAnswering"]
        assert_same_scores(scores(plain.eval(), batch), transformers_scores(theirs.eval(), batch, family), batch)
    tokens = [AutoTokenizer.from_pretrained(place)("Who met Ann?")["input_ids"] for place in (folder, tmp_path / "ours")]
    assert tokens[0] == tokens[1]


def test_gradients_equal_transformers_in_fp64(family, save, small_squad):
    """In training mode, where attention takes its own path; on windows without padding."""
    folder = save(AutoModelForQuestionAnswering)
    batch = batch_of(folder, small_squad, count=3)
    batch = {name: tensor[:, :20] if tensor.ndim == 2 else tensor.clamp(max=19) for name, tensor in batch.items()}
    assert batch["attention_mask"].all()
    model = load_bert(folder, 64, dropout=0.0)[0].double()
    (span_loss(*scores(model, batch), batch) / 3).backward()
    theirs = AutoModelForQuestionAnswering.from_pretrained(folder, attn_implementation="eager").double().eval()
    segments = {"token_type_ids": batch["token_type_ids"]} if FAMILIES[family].has_segments else {}
    labels = {"start_positions": batch["start_token"], "end_positions": batch["end_token"]}
    theirs(batch["input_ids"], **labels, **segments).loss.backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert expected.keys() == dict(model.named_parameters()).keys()
    norm = sum(gradient.square().sum() for gradient in expected.values() if gradient is not None).sqrt()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None or expected[name] is not None:
            assert (parameter.grad - expected[name]).norm() <= 1e-10 * norm, name


def test_pretraining_heads_are_left_behind_and_nothing_else(family, save):
    folder = save(AutoModelForMaskedLM)
    expected = load_file(folder / "model.safetensors")
    prefix = f"{FAMILIES[family].encoder}."
    old = {prefix + "embeddings.position_ids": torch.arange(8)[None], prefix + "pooler.dense.bias": torch.zeros(32)}
    save_file(expected | old, folder / "model.safetensors", metadata={"format": "pt"})
    model, head_is_trained = load_bert(folder, 64)
    assert not head_is_trained
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items() if name.startswith(prefix))
    save_file(expected | {prefix + "more.weight": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="without a place.*more.weight"):
        load_bert(folder, 64)


def test_no_more_tokens_than_positions(family, save):
    """RoBERTa's first two positions are never used: of 66 are 64."""
    folder = save()
    with pytest.raises(UserError, match="--max-length 65: .* has positions for 64 tokens"):
        load_bert(folder, 65)
    model, _ = load_bert(folder, 64)
    ids = torch.full((1, 64), 7)
    assert scores(model, {"input_ids": ids, "attention_mask": ids > 0, "token_type_ids": 0 * ids}).isfinite().all()


def test_dropout_is_the_given_one(family, save):
    model, _ = load_bert(save(), 64, dropout=0.3)
    found = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(found) >= 5 and {module.p for module in found} == {0.3} and model.dropout == 0.3 and model.widths == (32, 64)


def test_no_answer_begins_or_ends_with_a_blank(family, save):
    """A new head ranks the spans by chance; all of them are asked for."""
    reader = open_reader(str(save()), max_length=64, overlap=16, num_best=500, max_answer_length=5, precision="fp32")
    text = " \n The  tower\n\nwas opened   (1846). "
    answers = reader.ask("  Who?", text, num_best=500).answers
    assert len(answers) > 20 and all(answer.text == answer.text.strip() != "" for answer in answers)
    assert {"The", "tower", "The  tower"} <= {answer.text for answer in answers} or family in ("bert", "distilbert", "electra")


@pytest.mark.parametrize("family", ["roberta"], indirect=True)
def test_a_roberta_with_berts_tokenizer_gets_berts_windows(family, save, tokenizers):
    """As Korean ones have: it says which tokens are the passage's, but the model has no such weights."""
    folder = save(AutoModelForQuestionAnswering)
    tokenizers["bert"].save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert config["type_vocab_size"] == 1
    tokenizer, reference = weights.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    windows = make_windows([Passage("t", "Ann met Bob.", [Example("1", "Who?", (), (), False, True)])], tokenizer, 64, 16)
    assert windows.tokens.tolist() == reference("Who?", "Ann met Bob.")["input_ids"]
    assert scores(load_bert(folder, 64)[0], windows.batch(np.array([0]), "cpu")).isfinite().all()


@pytest.mark.parametrize("family", ["roberta"], indirect=True)
def test_a_tokenizer_that_joins_texts_in_another_way_is_refused(family, save):
    folder = save()
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"]["sep"] = ["<mask>", 4]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}))
    with pytest.raises(UserError, match="the tokenizer joins two texts to '<s>a<mask><mask>b<mask>'"):
        weights.load_tokenizer(folder)


# ---- a run -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def train(monkeypatch, small_squad_file):
    """train(folder, out, *flags): train_bert.py in this process. Its exit status."""
    def run(folder: Path, out: Path, *flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["train_bert.py", "--model", str(folder), "--train-data", str(small_squad_file),
                                         "--dev-data", "none", "--max-length", "64", "--overlap", "16", "--batch-size", "4",
                                         "--max-steps", "5", "--lr", "1e-3", "--precision", "fp32", "--out", str(out), *flags])
        train_bert.main()
    return run


def test_a_run_trains_resumes_to_the_bit_and_loads_in_transformers(family, save, train, small_squad, tmp_path):
    folder, whole, cut = save(AutoModel), tmp_path / "whole", tmp_path / "cut"
    before = load_bert(folder, 64)[0].state_dict()
    train(folder, whole)
    with pytest.raises(Stopped):
        train(folder, cut, "--stop-after", "3")
    train(folder, cut, "--resume")
    one, other = (load_file(run / "model" / "model.safetensors") for run in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    changed = [name for name in one if not torch.equal(one[name], before[name])]
    assert len(changed) > 0.8 * len(one)
    batch = batch_of(whole / "model", small_squad)
    model, head_is_trained = load_bert(whole / "model", 64)
    assert head_is_trained
    theirs = AutoModelForQuestionAnswering.from_pretrained(whole / "model").eval()
    with torch.no_grad():
        assert_same_scores(scores(model.eval(), batch), transformers_scores(theirs, batch, family), batch)
