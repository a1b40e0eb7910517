"""--shard: the runs of a model that is cut over the ranks, against the same runs in which every rank has all of it.

One worked case: `cut_like` gives rank 1 of 2 the rows 2 and 3 of a matrix of 4 rows (tests/training/test_sharding.py).
"""

from __future__ import annotations

import json
import socket

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

BERT = ("--precision", "fp64", "--micro-tokens", "200")


COUNT = ("import qa.training.sharding as s; cut = s.fully_shard; "
         "s.fully_shard = lambda m, **k: (print('cut', type(m)), cut(m, **k))")


@pytest.fixture
def sharded(request, scripts, llama_scripts, monkeypatch):
    """sharded(kind, out, *flags, ranks=2): a run with --shard, in which the model is really cut."""
    def train(kind: str, out, *flags: str, ranks: int = 2):
        of_kind = {"bert": scripts, "llama": llama_scripts}[kind]
        monkeypatch.setattr(of_kind, "before", COUNT)
        ended = of_kind.train(out, *flags, "--shard", ranks=ranks)
        monkeypatch.setattr(of_kind, "before", "")
        assert ended.out.count("cut <class") == {"bert": 3, "llama": 4}[kind]  # 2 blocks; the rest; LLaMA's head
        return ended

    return train


def same_weights(found, expected, atol: float = 0.0) -> None:
    """Checkpoint (with AdamW's state) and product."""
    for one, other in ((found.tensors(), expected.tensors()), (found.product(), expected.product())):
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            torch.testing.assert_close(one[name], tensor, atol=atol, rtol=0, msg=name)


# ---- BERT -----------------------------------------------------------------------------------------------------


def test_bert_sharded_equals_whole(sharded, scripts, read_run, data_file, tmp_path):
    """Two ranks, one of which often has nothing to do; evaluated before, within and after the training; dropout."""
    flags = (*BERT, "--held-out", "0.3", "--eval-every", "7", "--dev-data", str(data_file))
    sharded("bert", tmp_path / "run", *flags)
    run, whole = read_run(tmp_path / "run"), scripts.whole(2, *flags)
    same_weights(run, whole, 1e-6)
    assert run.losses() == pytest.approx(whole.losses(), abs=1e-9)
    answers = [json.loads((one.folder / "evaluation" / "predictions.json").read_text()) for one in (run, whole)]
    assert answers[0] == answers[1]
    theirs = AutoModelForQuestionAnswering.from_pretrained(run.folder / "model")
    assert all(torch.equal(theirs.state_dict()[name], tensor) for name, tensor in run.product().items())


@pytest.mark.slow
def test_bert_resumes_on_other_ranks_sharded_or_not(sharded, scripts, read_run, tmp_path):
    """No dropout: else the ranks' masks differ."""
    exact, out = (*BERT, "--dropout", "0"), tmp_path / "run"
    sharded("bert", out, *exact, "--stop-after", "5")
    sharded("bert", out, *exact, "--stop-after", "5", "--resume", ranks=3)
    scripts.train(out, *exact, "--stop-after", "5", "--resume", ranks=2)
    scripts.train(out, *exact, "--resume")
    same_weights(read_run(out), scripts.whole(1, *exact), 1e-9)


@pytest.mark.slow
def test_bert_resumed_with_dropout_to_the_bit(sharded, read_run, tmp_path):
    flags = ("--precision", "fp32")
    sharded("bert", tmp_path / "whole", *flags)
    sharded("bert", tmp_path / "run", *flags, "--stop-after", "7")
    sharded("bert", tmp_path / "run", *flags, "--resume")
    read_run(tmp_path / "run").assert_equal_to_the_bit(read_run(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_bert_in_half_precision(precision, sharded, scripts, read_run, tmp_path):
    sharded("bert", tmp_path / "run", "--precision", precision)
    run, whole = read_run(tmp_path / "run"), scripts.whole(2, "--precision", precision)
    assert run.state() == whole.state() and run.losses() == pytest.approx(whole.losses(), abs=0.02)


# ---- LLaMA ----------------------------------------------------------------------------------------------------

LLAMA = ("--precision", "fp64", "--micro-tokens", "150")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_llama_sharded_equals_whole_to_the_bit(ranks, sharded, llama_scripts, read_run, data_v2_file, tmp_path):
    """One step of each epoch has two questions. Evaluated by greedy decoding before its last step and at its end."""
    data = ("--train-data", str(data_v2_file), "--dev-data", str(data_v2_file))
    flags = (*LLAMA, *data, "--held-out", "0.3", "--eval-every", "9")
    sharded("llama", tmp_path / "run", *flags, ranks=ranks)
    run, whole = read_run(tmp_path / "run"), llama_scripts.whole(ranks, *flags)
    run.assert_equal_to_the_bit(whole)
    for name in ("predictions", "generated", "nbest"):
        assert (run.folder / "evaluation" / f"{name}.json").read_bytes() == (
            whole.folder / "evaluation" / f"{name}.json").read_bytes()


@pytest.mark.slow
def test_llama_resumed_to_the_bit_and_on_other_ranks_sharded_or_not(sharded, llama_scripts, read_run, tmp_path):
    """On the same ranks with dropout, to the bit; on others without it. The base is known again, sharded or not."""
    dropout, out = (*LLAMA, "--lora-dropout", "0.1"), tmp_path / "other"
    sharded("llama", tmp_path / "run", *dropout, "--stop-after", "10")
    sharded("llama", tmp_path / "run", *dropout, "--resume")
    read_run(tmp_path / "run").assert_equal_to_the_bit(llama_scripts.whole(2, *dropout))
    sharded("llama", out, *LLAMA, "--stop-after", "5", ranks=3)
    llama_scripts.train(out, *LLAMA, "--stop-after", "5", "--resume")
    sharded("llama", out, *LLAMA, "--resume")
    same_weights(read_run(out), llama_scripts.whole(1, *LLAMA), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, decode", [(2, "exact"), (3, "exact"), (3, "greedy")])
def test_llama_evaluated_sharded_gives_the_same_answers(ranks, decode, llama_scripts, data_v2_file, tmp_path):
    """An adapter on its base; 14 passages, so that the ranks read unequal shares; 1 passage: two ranks have none."""
    run = llama_scripts.whole(2, *LLAMA, "--lora-dropout", "0.1").folder
    for number, sample in (("14", ()), ("1", ("--max-questions", "2"))):
        flags = ("--ckpt", str(run), "--data", str(data_v2_file), "--precision", "fp64", "--decode", decode, "--micro-tokens",
                 "200", *sample, "--out")
        llama_scripts.evaluate(*flags, str(tmp_path / f"sharded-{number}"), "--shard", ranks=ranks)
        llama_scripts.evaluate(*flags, str(tmp_path / f"whole-{number}"), ranks=ranks)
        for name in ("predictions", "nbest", "metrics"):
            found, expected = ((tmp_path / f"{kind}-{number}" / f"{name}.json").read_bytes() for kind in ("sharded", "whole"))
            assert found == expected, name


@pytest.mark.slow
def test_two_nodes_share_a_run(llama_scripts, read_run, tmp_path):
    """Two of torchrun's agents on this machine, one rank each: both are the first of their node. Stopped, and resumed."""
    for flags in (("--stop-after", "7"), ("--resume",)):
        with socket.create_server(("localhost", 0)) as probe:
            port = probe.getsockname()[1]
        nodes = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=qa")
        agents = [llama_scripts.torchrun(1, tmp_path / "run", *LLAMA, "--shard", *flags, nodes=nodes) for _ in range(2)]
        outputs = [agent.communicate(timeout=300)[0] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], outputs
        assert sum("20 steps of 13 questions" in output for output in outputs) == 1  # one of all ranks speaks
    same_weights(read_run(tmp_path / "run"), llama_scripts.whole(2, *LLAMA), 1e-9)


# ---- what cannot be -------------------------------------------------------------------------------------------


def test_what_cannot_be_sharded_is_refused_in_one_line(scripts, llama_scripts, tiny_bert_folder, data_file, tmp_path):
    run = llama_scripts.whole(2, *LLAMA, "--lora-dropout", "0.1").folder
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    evaluate, merged = ("--data", str(data_file), "--shard", "--ckpt"), ("--merge-into", str(tmp_path / "m"))
    for ended, line in (
            (scripts.train(tmp_path / "run", "--shard", "--compile", status=2), "--shard and --compile do not work together"),
            (llama_scripts.train(tmp_path / "run", "--shard", "--model", str(tmp_path / "base.gguf"), ranks=2, status=2),
             "is a .gguf file"),
            (llama_scripts.evaluate(*evaluate, str(run), *merged, status=2), "--shard and --merge-into"),
            (llama_scripts.evaluate(*evaluate, str(tiny_bert_folder), ranks=2, status=2), "--shard has no effect"),
            (llama_scripts.evaluate(*evaluate, str(run), status=2), "--shard: one process holds the whole model"),
            (scripts.train(tmp_path / "run", "--shard", status=2), "--shard: one process holds the whole model")):
        assert line in ended.last_line and "Traceback" not in ended.err
