"""A run of train_bert.py is one computation, however it is cut; number formats; which weights become the product."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qa.bert.windows import make_windows
from qa.data.batches import epoch_plan
from qa.data.splits import hold_out_articles
from qa.data.squad import load_squad
from qa.training.checkpoint import load_checkpoint, save_checkpoint
from qa.training.distributed import Runtime
from qa.weights import load_tokenizer

EXACT = ["--precision", "fp64", "--dropout", "0", "--save-every", "1", "--keep", "30"]


@pytest.fixture
def one_process(scripts):
    """20 steps in double precision without dropout, in one process, a batch in one piece; every step is saved."""
    return scripts.whole(1, *EXACT, "--micro-tokens", "100000")


@pytest.mark.parametrize("ranks, micro_tokens", [
    (1, 1), (1, 400), (2, 100000), (3, 300),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1), (2, 250), (3, 100000), (4, 1), (5, 500)))])
def test_ranks_and_micro_batches_do_not_change_the_gradients(ranks, micro_tokens, one_process, scripts, read_run, tmp_path):
    """Three ranks and more: one step of each epoch has two windows, so a rank has nothing to do."""
    scripts.train(tmp_path / "run", *EXACT, "--micro-tokens", str(micro_tokens), ranks=ranks)
    read_run(tmp_path / "run").assert_same_computation(one_process)


@pytest.mark.slow
def test_two_ranks_under_torchrun_equal_one(one_process, scripts, read_run, tmp_path):
    process = scripts.torchrun(2, tmp_path / "run", *EXACT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    read_run(tmp_path / "run").assert_same_computation(one_process)


# ---- number formats, and numbers that are none ----------------------------------------------------------------


def test_fp16_learns(scripts, read_run, tmp_path):
    scripts.train(tmp_path / "run", "--precision", "fp16")
    run = read_run(tmp_path / "run")
    losses = list(run.losses().values())
    assert len(losses) == 20 and sum(losses[-4:]) < sum(losses[:4]) - 1  # the last epoch against the first
    progress = run.state()["progress"]
    assert progress["step"] == 20 == progress["updates"] + progress["skipped"]
    assert run.events("step")[-1]["skipped"] == progress["skipped"]


def test_fp16_skips_steps_that_overflow(scripts, read_run, tmp_path):
    """A scale that is too large halves until no gradient is infinite; until then weights and schedule stand still."""
    rates = [1e-3 * min((update + 1) / 2, (20 - update) / 18) for update in range(20)]  # two steps of warmup
    out, run = tmp_path / "run", read_run(tmp_path / "run")
    fp16 = ["--precision", "fp16", "--save-every", "1", "--keep", "30"]
    scripts.train(out, *fp16, "--stop-after", "5")
    checkpoint = load_checkpoint(out)
    checkpoint.state["scaler"]["scale"] = 2.0**26
    alone = Runtime(0, 1, torch.device("cpu"))
    save_checkpoint(out, 5, checkpoint.tensors, checkpoint.state, 30, alone)  # takes the place of the other one
    scripts.train(out, *fp16, "--resume")

    lines = run.events("step")[5:]
    skipped = [0] + [line["skipped"] for line in lines]  # after steps 5, 6, ..., 20
    assert skipped[1:4] == [1, 2, 3] and skipped[-1] < 15
    assert [line["lr"] for line in lines] == pytest.approx([rates[line["step"] - 1 - before]
                                                            for line, before in zip(lines, skipped, strict=False)])
    for line, before in zip(lines[1:], skipped[1:], strict=False):
        step = line["step"]
        stands_still = all(torch.equal(tensor, run.tensors(step - 1)[name]) for name, tensor in run.tensors(step).items())
        assert stands_still == (line["skipped"] > before)


def read_json(path):
    return json.loads(path.read_text())


def longest_windows(lengths: np.ndarray, seed: int) -> list[int]:
    """Tokens of the longest window of each step of the first epoch."""
    return [int(lengths[batch].max()) for batch in epoch_plan(lengths, 13, seed, epoch=0)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_non_finite_loss_stops_the_run_before_the_update(ranks, scripts, read_run, data_file, tiny_bert_folder, tmp_path):
    """The embedding of one position is NaN; no window of the first two steps is so long."""
    data = load_squad(str(data_file))
    windows = make_windows(data.passages, load_tokenizer(tiny_bert_folder), 128, 32)
    seed = next(seed for seed in range(99) if np.argmax(longest_windows(windows.lengths, seed)) == 2)
    base = shutil.copytree(tiny_bert_folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["embeddings.position_embeddings.weight"][max(longest_windows(windows.lengths, seed)[:2])] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    ended = scripts.train(tmp_path / "run", "--model", str(base), "--save-every", "1", "--seed", str(seed), ranks=ranks,
                          status=1)
    questions = windows.example_index[epoch_plan(windows.lengths, 13, seed, epoch=0)[2]]
    ids = ", ".join(data.examples[question].id for question in sorted(set(questions.tolist())))
    assert ended.last_line.startswith("stopped before the update of step 3: loss nan")
    assert f"questions {ids};" in ended.last_line
    assert "Traceback" not in ended.err
    run = read_run(tmp_path / "run")
    assert run.steps() == [1, 2] and len(run.losses()) == 2 and not (tmp_path / "run" / "model").exists()


# ---- what a run leaves beside its product ---------------------------------------------------------------------


@pytest.mark.parametrize("is_v2", [False, True])
def test_a_run_leaves_its_scores_and_how_they_came_to_be(is_v2, scripts, data_file, data_v2_file, tmp_path):
    """Also one of two processes. Its evaluation is that of evaluate.py on the product, with what it chose if it is v2.0."""
    data = str(data_v2_file if is_v2 else data_file)
    out, flags = tmp_path / "run", ["--train-data", data, "--dev-data", data, "--max-train-questions", "20"]
    scripts.train(out, *flags, "--stop-after", "3")
    scripts.train(out, *flags, "--resume")
    learnt = read_json(out / "train_questions.json")
    ids = {example.id for example in load_squad(data).examples}
    assert len(learnt) == len(set(learnt)) == 20 and set(learnt) < ids
    first, second = read_json(out / "environment.json")
    assert first["script"] == "train_bert.py" and first["command"].endswith("--stop-after 3")
    assert second["command"].endswith("--resume") and first["began"] <= second["began"]
    finished = read_json(out / "finished.json")
    assert 0 <= finished["seconds"] < 300 and finished["step"] == 10
    scripts.evaluate("--ckpt", str(out), "--data", data, "--precision", "fp32", "--out", str(tmp_path / "again"))
    assert {path.name for path in (out / "evaluation").iterdir()} == {
        "metrics.json", "per_question.json", "predictions.json", "nbest.json", "conditions.json",
        *(["null_odds.json"] if is_v2 else [])}
    for name in ("metrics", "per_question", "predictions", "nbest", *(["null_odds"] if is_v2 else [])):
        assert read_json(out / "evaluation" / f"{name}.json") == read_json(tmp_path / "again" / f"{name}.json"), name
    assert read_json(out / "evaluation" / "conditions.json")["step"] == read_json(out / "model" / "qa.json")["step"]
    ended = scripts.evaluate("--ckpt", str(out), "--data", data, "--against", str(out), "--out", str(tmp_path / "2"))
    assert "EM +0.00 [+0.00, +0.00], p 1;" in ended.out


# ---- which weights become the product -------------------------------------------------------------------------


def test_without_held_out_articles_the_product_is_the_last_weights(scripts, read_run, data_file, tmp_path):
    ended = scripts.train(tmp_path / "run", "--dev-data", str(data_file), "--eval-every", "6")
    run = read_run(tmp_path / "run")
    assert [line["step"] for line in run.events("evaluation")] == [6, 12, 18, 20]
    assert_product_of_step(run, 20)
    assert f"F1 {run.events('evaluation')[-1]['f1']:.2f}" in ended.out


def test_product_is_the_best_on_held_out_articles(scripts, read_run, data_v2_file, tmp_path):
    """v2.0, a learning rate that ruins the model; the threshold is that of the best weights, and evaluate.py uses it."""
    for rate in ("0.1", "0.3", "0.03", "0.05"):  # until the best is not the last, which hangs on rounding
        out, run = tmp_path / rate, read_run(tmp_path / rate)
        scripts.train(out, "--train-data", str(data_v2_file), "--held-out", "0.3", "--eval-every", "3", "--save-every", "1",
                      "--keep", "50", "--lr", rate, "--epochs", "12")
        evaluations = run.events("evaluation")
        best = max(evaluations, key=lambda line: line["f1"])  # the first of several
        if best["step"] < run.steps()[-1]:
            break
    assert [line["step"] for line in evaluations] == list(range(3, run.steps()[-1] + 1, 3))
    assert best["step"] < run.steps()[-1], "else this test shows nothing"
    assert_product_of_step(run, best["step"])
    settings = json.loads((out / "model" / "qa.json").read_text())
    assert settings["na_threshold"] == best["na_threshold"] and settings["step"] == best["step"] and settings["is_v2"]

    document = json.loads(data_v2_file.read_text())
    held_out = {passage.title for passage in hold_out_articles(load_squad(str(data_v2_file)).passages, 0.3, seed=0)[1]}
    document["data"] = [article for article in document["data"] if article["title"] in held_out]
    (tmp_path / "held-out.json").write_text(json.dumps(document))
    scripts.evaluate("--ckpt", str(out), "--data", str(tmp_path / "held-out.json"), "--precision", "fp32")
    results = out / "evaluation-held-out-precision-fp32"
    metrics = json.loads((results / "metrics.json").read_text())
    assert {name: best[name] for name in metrics} == metrics
    odds = json.loads((results / "null_odds.json").read_text())
    answers = json.loads((results / "predictions.json").read_text())
    assert {name for name, answer in answers.items() if not answer} == {
        name for name, score in odds.items() if score > best["na_threshold"]}


def test_v2_threshold_is_chosen_even_if_the_run_is_shorter_than_eval_every(scripts, data_v2_file, tmp_path):
    scripts.train(tmp_path / "run", "--train-data", str(data_v2_file), "--eval-every", "1000", "--epochs", "1")
    assert json.loads((tmp_path / "run" / "model" / "qa.json").read_text())["na_threshold"] is not None


def assert_product_of_step(run, step: int) -> None:
    product = run.product()
    weights = {name.removeprefix("model:"): tensor for name, tensor in run.tensors(step).items() if name.startswith("model:")}
    assert product.keys() == weights.keys()
    assert all(torch.equal(product[name], tensor) for name, tensor in weights.items())


# ---- fp16 that diverges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["NaN weights", "a rate that ruins them"])
def test_fp16_stops_a_run_whose_updates_are_skipped_and_leaves_no_product(kind, scripts, read_run, tiny_bert_folder, tmp_path):
    """GradScaler skips them in silence: 12 of 12, and the run used to end with status 0 and a model."""
    base = shutil.copytree(tiny_bert_folder, tmp_path / "base")
    flags = ["--lr", "1e10"]
    if kind == "NaN weights":
        tensors = load_file(base / "model.safetensors")
        tensors["encoder.layer.0.output.dense.weight"].fill_(float("nan"))
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        flags = []
    ended = scripts.train(tmp_path / "run", "--model", str(base), "--precision", "fp16", "--epochs", "3", *flags, status=1)
    assert re.search(r"^\d+ of 12 updates were skipped because gradients overflowed, so there is no model", ended.last_line)
    assert not (tmp_path / "run" / "model").exists() and read_run(tmp_path / "run").steps()[-1] == 12


def test_fp16_stops_a_long_run_as_soon_as_no_scale_is_left(scripts, read_run, tmp_path):
    ended = scripts.train(tmp_path / "run", "--precision", "fp16", "--epochs", "9", "--lr", "1e10", status=1)
    assert re.search(r"^stopped before the update of step (1[6-9]|2\d): gradients overflow fp16 even at a scale of 1",
                     ended.last_line)
    assert not (tmp_path / "run" / "model").exists()


# ---- what is drawn, and what is written -----------------------------------------------------------------------


def test_the_seed_draws_no_data_and_the_data_seed_nothing_else(scripts, read_run, tmp_path):
    """Seeds 0 and 1 train on the same 20 questions from other heads; data seeds 0 and 1 on other questions."""
    seen = {}
    for seed, data_seed in ((0, 0), (1, 0), (0, 1)):
        out = tmp_path / f"{seed}-{data_seed}"
        scripts.train(out, "--max-train-questions", "20", "--seed", str(seed), "--data-seed", str(data_seed), "--epochs", "1",
                      "--save-every", "1", "--keep", "9", "--held-out", "0.2")
        head = read_run(out).tensors(1)["model:qa_outputs.bias"]
        seen[seed, data_seed] = json.loads((out / "options.json").read_text())["examples"], head
    assert seen[0, 0][0] == seen[1, 0][0] != seen[0, 1][0]
    assert not torch.equal(seen[0, 0][1], seen[1, 0][1])


def test_a_data_file_whose_name_is_no_text_trains_to_the_end(scripts, data_file, tmp_path):
    """The name's byte 0xff is no UTF-8: it once ended a run at its model card, after the training."""
    data = tmp_path / "small-\udcff.json"
    shutil.copy(data_file, data)
    scripts.train(tmp_path / "run", "--train-data", str(data), "--dev-data", str(data), "--epochs", "1")
    assert "small-" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert "small-" in scripts.evaluate("--ckpt", str(tmp_path / "run"), "--data", str(data), "--precision", "fp32").out
