"""Folders of models, adapters and runs that are damaged in one place: one line and status 2, or the right answers.

One worked case: in a BERT's config.json `num_attention_heads` is missing. transformers would put 12 in its place, which divide
the hidden size of many models, and the answers would be other ones. We refuse the folder.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qa.data.squad import SquadData, load_squad
from qa.errors import UserError
from qa.reader import open_reader

MISSING = object()
WRONG = {"missing": MISSING, "null": None, "text": "x", "list": [[1]], "object": {"a": {}}, "true": True, "negative": -1,
         "absurd": 10**9, "fraction": 0.5, "nan": math.nan, "infinite": math.inf}
# The fields that we read, and of each what may stand there (the answers are then the same) or is another model's value
FIELDS = {
    "bert/config.json": "model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
                        "max_position_embeddings type_vocab_size layer_norm_eps",
    "llama/config.json": "model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
                         "max_position_embeddings num_key_value_heads rms_norm_eps rope_parameters tie_word_embeddings",
    "adapter/adapter_config.json": "peft_type r lora_alpha target_modules exclude_modules layers_to_transform rank_pattern "
                                   "alpha_pattern use_rslora base_model_name_or_path",
    "adapter/qa_lora.json": "base_model base_fingerprint extra",
    "adapter/qa.json": "max_length overlap max_answer_length num_best na_threshold is_v2 prompt decode max_expansions",
}
CASES = [(file, field, name) for file, fields in FIELDS.items() for field in fields.split() for name in WRONG]
CASES = [case if number % 4 == 0 else pytest.param(*case, marks=pytest.mark.slow) for number, case in enumerate(CASES)]
OTHER_VALUES = {("layer_norm_eps", "fraction"), ("rms_norm_eps", "fraction"), ("is_v2", "true"), ("use_rslora", "true"),
                ("na_threshold", "fraction"), ("na_threshold", "negative"), ("max_length", "absurd"), ("overlap", "absurd"),
                ("lora_alpha", "absurd"), ("lora_alpha", "fraction"), ("tie_word_embeddings", "missing")}


@pytest.fixture(scope="module")
def sound(scripts, llama_scripts, tiny_bert_folder, tiny_llama_folder, tmp_path_factory) -> Path:
    """bert, llama: as transformers saves them; adapter: of a run of ours."""
    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(tiny_bert_folder, folder / "bert")
    shutil.copytree(tiny_llama_folder, folder / "llama")
    llama_scripts.train(folder / "run", "--epochs", "1")
    shutil.copytree(folder / "run" / "model", folder / "adapter")
    (folder / "adapter" / "manifest.json").unlink()
    return folder


@pytest.fixture(scope="module")
def answers(data_file):
    """answers(folder): what the model says to two questions."""
    passage = load_squad(str(data_file)).passages[0]
    passage.examples[2:] = []
    whole = load_squad(str(data_file))
    data = SquadData("two", [passage], whole.is_v2, True, whole.summary)

    def read(folder: Path) -> list:
        lengths = {"max_length": 128, "overlap": 32} if "bert" in folder.name else {}
        torch.manual_seed(0)
        predictions = open_reader(str(folder), precision="fp32", **lengths).answer(data).predictions
        return [(found.text, [candidate.score for candidate in found.candidates]) for found in predictions]

    return read


@pytest.fixture(scope="module")
def expected(sound, answers) -> dict[str, list]:
    return {kind: answers(sound / kind) for kind in ("bert", "llama", "adapter")}


def assert_refused_or_right(folder: Path, kind: str, answers, expected, may_differ: bool = False) -> None:
    try:
        found = answers(folder)
    except UserError as error:
        line = " ".join(str(error).split())
        assert "--" in line or str(folder) in line, line
    else:
        assert may_differ or found == expected[kind]


def test_worked_case(sound, answers, tmp_path):
    folder = shutil.copytree(sound / "bert", tmp_path / "bert")
    change(folder / "config.json", "num_attention_heads", MISSING)
    with pytest.raises(UserError, match="config.json: num_attention_heads is missing; expected a whole number from 1 to"):
        answers(folder)


def change(path: Path, field: str, value: object) -> None:
    content = json.loads(path.read_text())
    if value is MISSING:
        content.pop(field, None)
    else:
        content[field] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("file", "field", "name"), CASES)
def test_a_field_that_is_wrong(file, field, name, sound, answers, expected, tmp_path):
    kind = file.split("/")[0]
    folder = shutil.copytree(sound / kind, tmp_path / kind)
    change(tmp_path / file, field, WRONG[name])
    assert_refused_or_right(folder, kind, answers, expected, (field, name) in OTHER_VALUES)


DAMAGES = {"empty": lambda content: b"", "cut": lambda content: content[:len(content) // 2],
           "flipped": lambda content: content[:9] + bytes([content[9] ^ 4]) + content[10:],
           "nested": lambda content: b"[" * 1000 + b"]" * 1000}
FILES = [f"{kind}/{name}" for kind in ("bert", "llama") for name in ("config.json", "tokenizer.json", "tokenizer_config.json",
                                                                     "model.safetensors")]
FILES += [f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "qa_lora.json", "qa.json")]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_damaged(file, damage, sound, answers, expected, tmp_path):
    kind = file.split("/")[0]
    folder = shutil.copytree(sound / kind, tmp_path / kind)
    (tmp_path / file).write_bytes(DAMAGES[damage]((tmp_path / file).read_bytes()))
    assert_refused_or_right(folder, kind, answers, expected)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(kind, sound, answers, tmp_path):
    """As the shard that an index names, and alone."""
    folder = shutil.copytree(sound / kind, tmp_path / kind)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    for _ in range(2):
        with pytest.raises(UserError, match="weights are in pytorch_model.bin, no safetensors file; convert it.*save_file"):
            answers(folder)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def test_the_way_to_convert_them_works(sound, answers, expected, tmp_path):
    folder = shutil.copytree(sound / "llama", tmp_path / "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        answers(folder)
    code = str(error.value).partition('python -c "')[2].removesuffix('"')
    exec(code.replace("'pytorch_model.bin'", repr(str(folder / "pytorch_model.bin"))).replace(
        "'model.safetensors'", repr(str(folder / "model.safetensors"))))
    assert answers(folder) == expected["llama"]


def test_a_token_that_the_model_has_no_embedding_for(sound, answers, expected, tmp_path):
    """A <pad> that somebody added: LLaMA never writes it; BERT might be given it."""
    for kind in ("bert", "llama"):
        folder = shutil.copytree(sound / kind, tmp_path / kind)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        number = len(tokenizer["model"]["vocab"])
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": number, "content": "<pad>"})
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert answers(tmp_path / "llama") == expected["llama"]
    with pytest.raises(UserError, match="the tokenizer's '<pad>' has the id 600, but the model has embeddings for 600 tokens"):
        answers(tmp_path / "bert")


@pytest.mark.parametrize("token", ["cls_token", "sep_token", "pad_token"])
def test_a_tokenizer_without_berts_tokens(token, sound, answers, tmp_path):
    folder = shutil.copytree(sound / "bert", tmp_path / "bert")
    change(folder / "tokenizer_config.json", token, None)
    with pytest.raises(UserError, match=f"the tokenizer has no {token}"):
        answers(folder)


def test_named_chat_templates_without_a_default(sound, answers, expected, tmp_path):
    """The plain prompt needs none."""
    folder = shutil.copytree(sound / "llama", tmp_path / "llama")
    change(folder / "tokenizer_config.json", "chat_template", [{"name": "rag", "template": "{{ messages }}"}])
    assert answers(folder) == expected["llama"]
    with pytest.raises(UserError, match="--prompt engineered: the model's chat template fails"):
        open_reader(str(folder), prompt="engineered")


def test_an_adapter_without_the_name_of_its_base(sound, tiny_llama_folder, tmp_path):
    folder = shutil.copytree(sound / "adapter", tmp_path / "adapter")
    change(folder / "adapter_config.json", "base_model_name_or_path", None)
    (folder / "qa_lora.json").unlink()
    with pytest.raises(UserError, match="the adapter does not say which base model it is for; give it by --base"):
        open_reader(str(folder))
    open_reader(str(folder), base=str(tiny_llama_folder))


def test_weights_that_are_not_all_there(sound, answers, tmp_path):
    folder = shutil.copytree(sound / "llama", tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights"):
        answers(folder)
