"""What only a GPU can tell: the scripts there, and the computations against the same in fp64 on the CPU.

    python -m pytest -m gpu
"""

from __future__ import annotations

import pytest
import torch

from qa import weights
from qa.bert.model import load_bert, span_loss
from qa.bert.windows import make_windows
from qa.cpu.dropout import replace_dropout
from qa.data.squad import load_squad
from qa.llama.encode import encode_passages
from qa.llama.extract import extract
from qa.llama.greedy import generate
from qa.llama.lora import inject_lora, lora_layers
from qa.llama.loss import AnswerLoss, plain_answer_loss
from qa.llama.model import load_llama
from qa.llama.packing import collate, micro_batches
from qa.llama.prompt import PromptTemplate
from qa.llama.targets import LoraSpec
from qa.training.optim import make_adamw
from qa.training.precision import Precision

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DETERMINISTIC = ("--deterministic",)


def relative_error(found: dict, expected: dict) -> float:
    """Of the gradients as one vector. The true gradient of a key's bias is 0 (softmax does not see it): left out."""
    pairs = [(found[name], gradient) for name, gradient in expected.items() if "key.bias" not in name]
    return (sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b ** 2).sum() for _, b in pairs)).sqrt().item()


def gradients(model, loss, precision: Precision) -> dict:
    scaler, optimizer = precision.grad_scaler(), make_adamw(model, 1e-4, 0.01)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


# In half the format's rounding is what we see: 8 bits of bf16 are 0.4%, 11 of fp16 0.05%, added up over the layers.
LIMITS = [("fp64", 1e-9), ("fp32", 1e-3), ("bf16", 6e-2), ("fp16", 2e-2)]


@pytest.mark.parametrize("name, limit", LIMITS)
def test_gradient_of_bert(name, limit, tiny_bert_folder, small_squad_v2_file):
    windows = make_windows(load_squad(str(small_squad_v2_file), "train").passages, weights.load_tokenizer(tiny_bert_folder),
                           128, 32)

    def computed(device, precision):
        torch.manual_seed(0)  # the head is new
        model, _ = load_bert(tiny_bert_folder, 128, dropout=0.0)
        model.to(device, precision.parameter_dtype)
        batch = windows.batch(torch.arange(12).numpy(), device)
        with precision.autocast():
            scores = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        return gradients(model, span_loss(*scores, batch) / 12, precision)

    expected = computed(CPU, Precision("fp64", "cpu"))
    assert relative_error(computed(GPU, Precision(name, "cuda")), expected) < limit


def llama_with_lora(folder, device, dtype):
    """B is not zero, so that A gets a gradient."""
    model, tokenizer = load_llama(folder, dtype)
    torch.manual_seed(1)
    inject_lora(model, LoraSpec(rank=4, alpha=8))
    replace_dropout(model)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.copy_(torch.randn(layer.lora_B.weight.shape) * 0.1)
    return model.to(device).train(), PromptTemplate(tokenizer, "plain")


@pytest.mark.parametrize("name, limit", LIMITS)
def test_gradient_of_packed_llama(name, limit, tiny_llama_folder, data_file):
    """Against one row a question. LlamaRMSNorm computes in fp32 whatever the model's type, which bounds fp64 too."""
    passages = load_squad(str(data_file), "train").passages[:4]
    model, template = llama_with_lora(tiny_llama_folder, CPU, torch.float64)
    prompts, _ = encode_passages(template, passages, 256)
    expected = gradients(model, plain_answer_loss(model, prompts, template.instruction_ids) / 50, Precision("fp64", "cpu"))
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    model, template = llama_with_lora(tiny_llama_folder, GPU, dtype)
    answer_loss, precision = AnswerLoss(model), Precision(name, "cuda")
    (rows,) = micro_batches(prompts, len(template.instruction_ids), 10_000)
    with precision.autocast():
        loss = answer_loss(collate(rows, template.instruction_ids).to(GPU))
    assert relative_error(gradients(model, loss / 50, precision), expected) < max(limit, 1e-5)


def test_both_decoders_answer_as_on_the_cpu(tiny_llama_folder, data_file):
    passages, found = load_squad(str(data_file), "dev").passages[:6], []
    for device in (CPU, GPU):
        model, template = llama_with_lora(tiny_llama_folder, device, torch.float32)
        prompts, _ = encode_passages(template, passages, 256, max_new_tokens=12)
        written = generate(model.eval(), template, prompts, 12, 2000)
        searched = extract(model, template, prompts, 12, 2000, num_best=3)
        found.append(([one.token_ids for one in written], [[span.text for span in one.spans] for one in searched],
                      torch.tensor([one.log_prob for one in written]),
                      torch.tensor([span.log_prob for one in searched for span in one.spans])))
    (tokens, spans, *log_probs), (gpu_tokens, gpu_spans, *gpu_log_probs) = found
    assert gpu_tokens == tokens and gpu_spans == spans
    torch.testing.assert_close(gpu_log_probs, log_probs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("flags", [DETERMINISTIC, (*DETERMINISTIC, "--precision", "bf16"),
                                   (*DETERMINISTIC, "--precision", "fp16")])
def test_a_resumed_bert_is_the_same_to_the_bit(flags, scripts, read_run, tmp_path):
    scripts.train(tmp_path / "run", *flags, "--stop-after", "10")
    scripts.train(tmp_path / "run", *flags, "--resume")
    read_run(tmp_path / "run").assert_equal_to_the_bit(scripts.whole(1, *flags))


@pytest.mark.parametrize("flags", [DETERMINISTIC, (*DETERMINISTIC, "--precision", "bf16", "--gradient-checkpointing")])
def test_a_resumed_llama_is_the_same_to_the_bit(flags, llama_scripts, read_run, tmp_path):
    flags = (*flags, "--lora-dropout", "0.1")
    llama_scripts.train(tmp_path / "run", *flags, "--stop-after", "10")
    llama_scripts.train(tmp_path / "run", *flags, "--resume")
    read_run(tmp_path / "run").assert_equal_to_the_bit(llama_scripts.whole(1, *flags))


def test_gpu_and_cpu_train_alike(scripts, llama_scripts, read_run, tmp_path):
    """In double precision, without dropout: the losses of 20 steps."""
    for one, flags in ((scripts, ("--dropout", "0")), (llama_scripts, ())):
        gpu = one.whole(1, *flags, "--precision", "fp64")
        cpu = type(one)(one.server, one.script, one.recipe)
        cpu.before = "import torch; torch.cuda.is_available = lambda: False"
        cpu.train(tmp_path / one.script, *flags, "--precision", "fp64")
        assert gpu.losses() == pytest.approx(read_run(tmp_path / one.script).losses(), abs=1e-5)


@pytest.mark.parametrize("how", [pytest.param("--compile", marks=pytest.mark.slow), "torchrun"])
def test_compiled_and_launched(how, scripts, llama_scripts, read_run, tmp_path):
    """--compile, and torchrun with one rank: the losses of the first steps as without, but for rounding."""
    for one, flags in ((scripts, ("--dropout", "0")), (llama_scripts, ())):
        if how == "torchrun":
            output, _ = (process := one.torchrun(1, tmp_path / one.script, *flags)).communicate(timeout=200)
            assert process.returncode == 0, output
        else:
            one.train(tmp_path / one.script, *flags, how)
        losses, expected = read_run(tmp_path / one.script).losses(), one.whole(1, *flags).losses()
        assert [losses[step] for step in (1, 2, 3)] == pytest.approx([expected[step] for step in (1, 2, 3)], abs=1e-3)


@pytest.mark.parametrize("decode", ["greedy", "exact"])
def test_a_trained_llama_is_evaluated_and_merged(decode, llama_scripts, data_v2_file, tmp_path):
    run = llama_scripts.whole(1, *DETERMINISTIC).folder
    merge = ("--merge-into", str(tmp_path / "merged")) if decode == "greedy" else ()
    ended = llama_scripts.evaluate("--ckpt", str(run), "--data", str(data_v2_file), "--decode", decode,
                                   "--out", str(tmp_path / "out"), *merge)
    assert "41 questions" in ended.out
