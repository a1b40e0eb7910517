"""A run of train_llama.py is one computation, however it is cut; number formats; what becomes of the product."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qa.data.batches import passage_plan
from qa.data.splits import hold_out_articles
from qa.data.squad import load_squad
from qa.llama.adapter import load_adapter, read_adapter
from qa.llama.encode import encode_passages, passages_and_lengths
from qa.llama.model import load_llama
from qa.llama.prompt import PromptTemplate
from qa.training.checkpoint import load_checkpoint, save_checkpoint
from qa.training.distributed import Runtime

EXACT = ["--precision", "fp64", "--save-every", "1", "--keep", "30"]


@pytest.fixture
def one_process(llama_scripts):
    """20 steps in double precision without dropout, in one process, a batch in one piece; every step is saved."""
    return llama_scripts.whole(1, *EXACT, "--micro-tokens", "100000")


@pytest.mark.parametrize("ranks, micro_tokens", [
    (1, 1), (1, 150), (2, 100000), (3, 100),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1), (2, 250), (3, 100000), (4, 1), (5, 200)))])
def test_ranks_and_micro_batches_do_not_change_the_gradients(ranks, micro_tokens, one_process, llama_scripts, read_run,
                                                             tmp_path):
    """1 token: every question is a row of its own. One step of each epoch has two questions: a rank has nothing to do."""
    llama_scripts.train(tmp_path / "run", *EXACT, "--micro-tokens", str(micro_tokens), ranks=ranks)
    read_run(tmp_path / "run").assert_same_computation(one_process)


# ---- number formats, and numbers that are none ----------------------------------------------------------------


def test_fp16_learns_and_skips_steps_that_overflow(llama_scripts, read_run, tmp_path):
    """A scale that is too large halves until no gradient is infinite; until then weights and schedule stand still."""
    rates = [1e-2 * min((update + 1) / 3, (32 - update) / 29) for update in range(32)]  # 3 steps of warmup
    out, run = tmp_path / "run", read_run(tmp_path / "run")
    fp16 = ["--precision", "fp16", "--epochs", "8", "--save-every", "1", "--keep", "40"]
    llama_scripts.train(out, *fp16, "--stop-after", "5")
    checkpoint = load_checkpoint(out)
    already_skipped = checkpoint.state["progress"]["skipped"]
    checkpoint.state["scaler"]["scale"] = 2.0**30
    alone = Runtime(0, 1, torch.device("cpu"))
    save_checkpoint(out, 5, checkpoint.tensors, checkpoint.state, 40, alone)  # takes the place of the other one
    llama_scripts.train(out, *fp16, "--resume")

    lines = run.events("step")[5:]
    skipped = [already_skipped] + [line["skipped"] for line in lines]  # after steps 5, 6, ..., 32
    assert skipped[1:4] == [already_skipped + number for number in (1, 2, 3)] and skipped[-1] < 20
    assert [line["lr"] for line in lines] == pytest.approx([rates[line["step"] - 1 - before]
                                                            for line, before in zip(lines, skipped, strict=False)])
    for line, before in zip(lines[1:], skipped[1:], strict=False):
        step = line["step"]
        stands_still = all(torch.equal(tensor, run.tensors(step - 1)[name]) for name, tensor in run.tensors(step).items())
        assert stands_still == (line["skipped"] > before)
    assert run.state()["progress"]["updates"] == 32 - skipped[-1]
    assert all(tensor.dtype == torch.float32 for name, tensor in run.tensors().items() if name.startswith("lora:"))
    losses = list(run.losses().values())
    assert sum(losses[-4:]) < sum(losses[:4]) - 2  # the last epoch against the first


def test_non_finite_loss_stops_the_run_before_the_update(llama_scripts, tiny_llama_folder, data_file, tmp_path):
    base = shutil.copytree(tiny_llama_folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    ended = llama_scripts.train(tmp_path / "run", "--model", str(base), ranks=2, status=1)

    _, tokenizer = load_llama(tiny_llama_folder)
    prompts, _ = encode_passages(PromptTemplate(tokenizer), load_squad(str(data_file)).passages, 256)
    first_step = passage_plan(*passages_and_lengths(prompts), 13, seed=0, epoch=0)[0]
    assert ended.last_line.startswith("stopped before the update of step 1: loss nan")
    assert f"questions {', '.join(prompts[index].id for index in first_step)};" in ended.last_line
    assert "Traceback" not in ended.err and not (tmp_path / "run" / "model").exists()


# ---- the product ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(llama_scripts, read_run, data_file, tmp_path_factory):
    """Long enough that different questions get different answers; random weights cannot learn to give the right ones."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    llama_scripts.train(folder, "--dev-data", str(data_file), "--lr", "3e-2", "--epochs", "15", "--target", "all-linear")
    return read_run(folder)


def lora_of(run, step: int | None = None) -> dict[str, torch.Tensor]:
    """A checkpoint's LoRA weights under the keys of the product."""
    return {name.replace("lora:", "base_model.model.", 1): tensor for name, tensor in run.tensors(step).items()
            if name.startswith("lora:")}


def assert_product_of_step(run, step: int) -> None:
    product, weights = run.product(), lora_of(run, step)
    assert product.keys() == weights.keys()
    assert all(torch.equal(product[name], tensor) for name, tensor in weights.items())


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_without_held_out_articles_the_product_is_the_last_weights(trained):
    assert_product_of_step(trained, trained.steps()[-1])


def test_product_loads_in_peft_with_the_same_logits(trained, tiny_llama_folder):
    peft = pytest.importorskip("peft")
    folder = trained.folder / "model"
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # finds the base by itself
    ours, tokenizer = load_llama(tiny_llama_folder)
    ids = torch.randint(len(tokenizer), (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = ours(ids).logits
        load_adapter(ours, read_adapter(folder))
        logits = ours(ids).logits
        assert (logits - theirs(ids).logits).abs().max() < 1e-5 * logits.abs().max()
    assert (logits - base).abs().max() > 0.1 * logits.abs().max(), "else this test shows nothing"
    text = "The bridge of Bern was built in 1807."
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids


def test_evaluate_finds_the_figures_of_the_run_and_merging_keeps_the_answers(trained, llama_scripts, data_file, tmp_path):
    flags = ("--data", str(data_file), "--precision", "fp32", "--out")
    llama_scripts.evaluate("--ckpt", str(trained.folder), *flags, str(tmp_path / "run"), "--merge-into",
                           str(tmp_path / "merged"))
    metrics, last = read(tmp_path / "run", "metrics"), trained.events("evaluation")[-1]
    assert {name: last[name] for name in metrics} == metrics and metrics["total"] == 41
    answers = read(tmp_path / "run", "predictions")
    assert len(set(answers.values())) > 8, "else this test shows little"

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(model) is LlamaForCausalLM and not [name for name, _ in model.named_parameters() if "lora" in name]
    llama_scripts.evaluate("--ckpt", str(tmp_path / "merged"), *flags, str(tmp_path / "plain"))
    assert read(tmp_path / "plain", "predictions") == answers
    ended = llama_scripts.evaluate("--ckpt", str(trained.folder), *flags, str(tmp_path / "run"), "--merge-into",
                                   str(tmp_path / "merged"), status=2)
    assert "exists already" in ended.last_line


def test_evaluate_takes_the_runs_prompt_or_the_one_it_is_told(trained, llama_scripts, data_file, tmp_path):
    kinds = {}
    for name, flags in (("run", ()), ("plain", ("--prompt", "plain")), ("engineered", ("--prompt", "engineered"))):
        llama_scripts.evaluate("--ckpt", str(trained.folder), "--data", str(data_file), "--precision", "fp32", *flags,
                               "--out", str(tmp_path / name))
        kinds[name] = read(tmp_path / name, "conditions")["prompt"]["kind"]
    assert kinds == {"run": "plain", "plain": "plain", "engineered": "engineered"}
    assert read(tmp_path / "run", "predictions") == read(tmp_path / "plain", "predictions")
    assert read(tmp_path / "run", "predictions") != read(tmp_path / "engineered", "predictions")
    ended = llama_scripts.evaluate("--ckpt", str(trained.folder), "--data", str(data_file), "--prompt", "engineered", "--shots",
                                   "1", "--train-data", str(data_file), "--out", str(tmp_path / "shot"))
    assert "warning: 1 demonstration(s) are questions of the data that is scored" in ended.out


def test_product_is_the_best_on_held_out_articles(llama_scripts, read_run, data_v2_file, tmp_path):
    """v2.0, so long that the figures fall again; the threshold is that of the best weights, and evaluate.py uses it."""
    out, run = tmp_path / "run", read_run(tmp_path / "run")
    llama_scripts.train(out, "--train-data", str(data_v2_file), "--held-out", "0.3", "--eval-every", "3", "--save-every", "1",
                        "--keep", "50", "--lr", "0.05", "--epochs", "12")
    evaluations = run.events("evaluation")
    best = max(evaluations, key=lambda line: line["f1"])  # the first of several
    assert [line["step"] for line in evaluations] == list(range(3, run.steps()[-1] + 1, 3))
    assert 3 < best["step"] < run.steps()[-1], "else this test shows nothing"
    assert_product_of_step(run, best["step"])
    settings = read(out / "model", "qa")
    assert settings["na_threshold"] == best["na_threshold"] and settings["step"] == best["step"] and settings["is_v2"]

    document = json.loads(data_v2_file.read_text())
    held_out = {passage.title for passage in hold_out_articles(load_squad(str(data_v2_file)).passages, 0.3, seed=0)[1]}
    document["data"] = [article for article in document["data"] if article["title"] in held_out]
    (tmp_path / "held-out.json").write_text(json.dumps(document))
    llama_scripts.evaluate("--ckpt", str(out), "--data", str(tmp_path / "held-out.json"), "--precision", "fp32")
    metrics = read(out / "evaluation-held-out-precision-fp32", "metrics")
    assert {name: best[name] for name in metrics} == metrics
    odds = read(out / "evaluation-held-out-precision-fp32", "null_odds")
    refused = {name for name, answer in read(out / "evaluation-held-out-precision-fp32", "predictions").items() if not answer}
    assert refused >= {name for name, score in odds.items() if score > best["na_threshold"]}  # some have no span at all


def test_what_evaluation_needs_is_checked_before_the_training(llama_scripts, tmp_path):
    """100 tokens hold every training prompt with its answer, but no passage and 90 tokens to write."""
    flags = ("--max-length", "100", "--max-answer-length", "90", "--held-out", "0.3")
    ended = llama_scripts.train(tmp_path / "run", *flags, status=2)
    assert "leave no room for a passage" in ended.last_line and not (tmp_path / "run").exists()
