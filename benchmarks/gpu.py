"""Training and decoding on one GPU, against plain loops with transformers' own models, in one run.

    python benchmarks/gpu.py [--only bert,llama,decoding] [--kinds plain,ours,compiled] [--budget 300]

Random weights and made-up tokens of SQuAD's lengths, in the shapes of BERT-base, BERT-large and a LLaMA of 1.2 billion
parameters: speed does not depend on what the tokens are. Each line is the median of several timed blocks of steps, with the
peak memory, the share of the time in which a kernel runs, kernels launched and waits for the GPU in a step, and the share of
the card's matrix products: 6 floating-point operations per encoder parameter and token for BERT, 4 for a frozen LLaMA.

plain: the usual loop; ours: a step of the training scripts; compiled: with --compile, which takes minutes at first. --tiny:
small models, on a CPU too, to test this program itself. After --budget seconds the rest is left out, and that is said.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from transformers import BertConfig, BertForQuestionAnswering, BertModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from qa.bert.model import BertSpanModel, span_loss  # noqa: E402
from qa.bert.windows import Windows  # noqa: E402
from qa.cpu import attention  # noqa: E402
from qa.cpu.dropout import replace_dropout  # noqa: E402
from qa.data.batches import deal, epoch_plan  # noqa: E402
from qa.data.squad import Summary  # noqa: E402
from qa.families import FAMILIES  # noqa: E402
from qa.llama.encode import Piece, Prompt  # noqa: E402
from qa.llama.greedy import generate  # noqa: E402
from qa.llama.lora import inject_lora, lora_layers  # noqa: E402
from qa.llama.loss import AnswerLoss  # noqa: E402
from qa.llama.packing import collate, micro_batches  # noqa: E402
from qa.llama.targets import LoraSpec  # noqa: E402
from qa.training.optim import make_adamw  # noqa: E402
from qa.training.precision import Precision  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
PRECISION = Precision("bf16", DEVICE.type)
PEAK = 989e12  # H100 and H200 SXM, dense bf16 products, by the datasheet
MICRO_TOKENS = 32768
BERTS = {"BERT-base": (768, 12, 12), "BERT-large": (1024, 24, 16)}
LLAMA = (2048, 8192, 16, 32, 8, 128256)  # hidden, intermediate, layers, heads, kv heads, vocabulary
BEGIN = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=300)
    parser.add_argument("--only", default="bert,llama,decoding")
    parser.add_argument("--kinds", default="plain,ours")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as qa/training/distributed.py does
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else 'CPU'}, {PRECISION.name} autocast")
    sections = {"bert": bert_training, "llama": llama_training, "decoding": decoding}
    for name in options.only.split(","):
        sections[name](options)


def left_out(options, name: str) -> bool:
    late = time.perf_counter() - BEGIN > options.budget
    if late:
        print(f"left out for time: {name}")
    return late


# ---- made-up data with SQuAD's lengths ------------------------------------------------------------------------------
def make_windows(num: int, generator, vocabulary: int) -> Windows:
    lengths = np.clip(generator.lognormal(math.log(165), 0.33, num), 40, 384).astype(np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    starts = (14 + generator.random(num) * (lengths - 20)).astype(np.int32)
    ranges = np.stack([np.full(num, 14), lengths - 1], 1).astype(np.int32)
    tokens = generator.integers(5, vocabulary, bounds[-1]).astype(np.int32)
    return Windows(tokens, np.zeros((bounds[-1], 2), np.int32), bounds, ranges, np.arange(num, dtype=np.int32), starts,
                   starts + 2, 0, Summary())


def make_prompts(num_passages: int, generator, vocabulary: int, answer: int) -> list[Prompt]:
    def ids(count: int) -> list[int]:
        return generator.integers(5, vocabulary, count).tolist()

    prompts = []
    for _ in range(num_passages):
        piece = Piece(ids(int(np.clip(generator.lognormal(math.log(157), 0.4), 8, 800))), "", 0)
        prompts += [Prompt(len(prompts) + i, "x", piece, ids(17), ids(answer)) for i in range(5)]
    return prompts


# ---- measuring ------------------------------------------------------------------------------------------------------
def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def profile_step(step) -> tuple[float, float, float]:
    """Of three steps: the share of the time in which a kernel runs; kernels launched, and waits for the GPU, in one step."""
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if CUDA else [])]
    with torch.profiler.profile(activities=activities[-1:]) as profile:
        begin = time.perf_counter()
        for _ in range(3):
            step()
        synchronize()
        seconds = time.perf_counter() - begin
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / seconds
    with torch.profiler.profile(activities=activities) as profile:
        step()
    counts = {event.key: event.count for event in profile.key_averages()}
    launches = sum(count for key, count in counts.items() if "LaunchKernel" in key)
    return busy, launches, counts.get("cudaStreamSynchronize", 0) + counts.get("aten::_local_scalar_dense", 0)


def measure(name: str, step, unit: str, per_step: float, operations: float, options, blocks: int = 5, steps: int = 6) -> float:
    """One line of the table; returns items per second. `operations`: floating-point operations of a step."""
    begin = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - begin
    if options.tiny:
        blocks, steps = 2, 1
    for _ in range(0 if options.tiny else 4):
        step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(blocks):
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        seconds.append((time.perf_counter() - begin) / steps)
    median, peak = statistics.median(seconds), torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0
    busy, launches, waits = profile_step(step)
    print(f"{name:<42} {per_step / median:7.0f} {unit}/s  {1e3 * median:6.1f} ms [{1e3 * min(seconds):.1f}, "
          f"{1e3 * max(seconds):.1f}]  peak {peak:5.1f} GB  busy {busy:4.0%}  {launches:5.0f} launches  {waits:3.0f} waits  "
          f"{operations / median / PEAK:5.1%} of 989 TFLOP/s  first step {first:.0f} s", flush=True)
    return per_step / median


# ---- BERT -----------------------------------------------------------------------------------------------------------
def bert_training(options) -> None:
    for name, (hidden, layers, heads) in {"tiny": (64, 2, 2)}.items() if options.tiny else BERTS.items():
        config = BertConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                            intermediate_size=4 * hidden)
        windows = make_windows(6000, np.random.default_rng(1), config.vocab_size)
        for batch_size in (16, 48):
            plan = epoch_plan(windows.lengths, batch_size, 0, 0)
            for kind in options.kinds.split(","):
                if left_out(options, f"{name}, {batch_size}, {kind}"):
                    continue
                torch.manual_seed(0)
                if kind == "plain":
                    model = BertForQuestionAnswering(config).to(DEVICE).train()
                else:
                    encoder = BertModel._from_config(config, attn_implementation=attention.register(), add_pooling_layer=False)
                    model = BertSpanModel(encoder, FAMILIES["bert"]).to(DEVICE).train()
                    replace_dropout(model)
                make_step = plain_bert_step if kind == "plain" else our_bert_step
                step = make_step(model, windows, plan, torch.compile(model, dynamic=True) if kind == "compiled" else model)
                weights = sum(p.numel() for path, p in model.named_parameters() if ".encoder." in path and p.ndim > 1)
                tokens = float(np.mean([windows.lengths[batch].sum() for batch in plan[:30]]))
                measure(f"{name}, batch {batch_size}, {kind}", step, "windows", batch_size, 6 * weights * tokens, options)


def our_bert_step(model, windows, plan, forward):
    """A step of train_bert.py."""
    parameters, optimizer, count = list(model.parameters()), make_adamw(model, 1e-5, 0.01), iter(range(10**9))

    def step() -> None:
        batch = plan[next(count) % len(plan)]
        loss_sum = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for rows in deal(batch, windows.lengths, 1, MICRO_TOKENS)[0]:
            micro_batch = windows.batch(rows, DEVICE)
            with PRECISION.autocast():
                start, end = forward(micro_batch["input_ids"], micro_batch["attention_mask"], micro_batch["token_type_ids"])
            loss = span_loss(start, end, micro_batch) / len(batch)
            loss.backward()
            loss_sum += loss.detach()
        clip_and_update(parameters, optimizer, loss_sum)

    return step


def clip_and_update(parameters, optimizer, loss_sum) -> None:
    """The end of a step of both scripts; the one wait for the GPU is where the loss and the norm come over."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.stack([loss_sum, norm.double()]).tolist()
    optimizer.step()
    optimizer.zero_grad()


def plain_bert_step(model, windows, plan, _):
    """The usual loop: the same batches, padded to the longest window."""
    optimizer, count = make_adamw(model, 1e-5, 0.01), iter(range(10**9))

    def step() -> None:
        batch = windows.batch(plan[next(count) % len(plan)], DEVICE)
        with PRECISION.autocast():
            loss = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"],
                         start_positions=batch["start_token"], end_positions=batch["end_token"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


# ---- LLaMA ----------------------------------------------------------------------------------------------------------
def make_llama(options, lora: bool = True) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = (64, 96, 2, 4, 2, 384) if options.tiny else LLAMA
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096,
                         tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    with DEVICE:
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa",
                                              dtype=torch.bfloat16 if CUDA else torch.float32)
    if lora:
        inject_lora(model, LoraSpec())
        for layer in lora_layers(model).values():
            layer.lora_B.weight.data.normal_(std=0.02)
    return model


def llama_training(options) -> None:
    for batch_size in (16, 64):
        for kind in options.kinds.split(","):
            if left_out(options, f"LLaMA, {batch_size}, {kind}"):
                continue
            model = make_llama(options).train()
            prompts = make_prompts(120, np.random.default_rng(2), model.config.vocab_size, answer=5)
            batches = [prompts[at : at + batch_size] for at in range(0, len(prompts) - batch_size, batch_size)]
            make_step = plain_llama_step if kind == "plain" else our_llama_step
            weights = sum(p.numel() for path, p in model.named_parameters() if "layers" in path and p.ndim > 1)
            read = np.mean([sum(row.num_tokens() for rows in micro_batches(batch, 1, MICRO_TOKENS) for row in rows)
                            for batch in batches])
            measure(f"LLaMA 1B LoRA, batch {batch_size}, {kind}", make_step(model, batches, kind == "compiled"), "questions",
                    batch_size, 4 * weights * float(read), options)
            del model
            if CUDA:
                torch.cuda.empty_cache()


def our_llama_step(model, batches, compiled: bool):
    """A step of train_llama.py."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, count, answer_loss = make_adamw(model, 1e-4, 0.01), iter(range(10**9)), AnswerLoss(model)
    forward = torch.compile(answer_loss, dynamic=True) if compiled else answer_loss

    def step() -> None:
        batch = batches[next(count) % len(batches)]
        loss_sum = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for rows in micro_batches(batch, 1, MICRO_TOKENS):
            micro_batch = collate(rows, [1]).to(DEVICE)
            with PRECISION.autocast():
                loss = forward(micro_batch) / (5 * len(batch))
            loss.backward()
            loss_sum += loss.detach()
        clip_and_update(parameters, optimizer, loss_sum)

    return step


def plain_llama_step(model, batches, _):
    """The usual loop: a row for each question, logits of all tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, count = make_adamw(model, 1e-4, 0.01), iter(range(10**9))

    def step() -> None:
        rows = [[1] + p.piece.ids + p.question_ids + p.answer_ids for p in batches[next(count) % len(batches)]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=DEVICE)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=DEVICE)
        labels = torch.tensor([[-100] * (len(row) - 5) + row[-5:] + [-100] * (longest - len(row)) for row in rows],
                              device=DEVICE)
        with PRECISION.autocast():
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


# ---- decoding -------------------------------------------------------------------------------------------------------
class Template:
    """As much of PromptTemplate as `generate` asks for; no end token, so that every answer has its full length."""

    instruction_ids, refusal, end_token_ids, closing_token_ids, decode = [1], None, [0], [], staticmethod(str)


def decoding(options) -> None:
    if left_out(options, "decoding"):
        return
    model = make_llama(options).eval()
    asked = make_prompts(10 if options.tiny else 100, np.random.default_rng(3), model.config.vocab_size, answer=0)
    for _ in range(3):
        begin = time.perf_counter()
        with PRECISION.autocast():
            generate(model, Template, asked, 8, MICRO_TOKENS)
        synchronize()
        print(f"greedy, LoRA, {len(asked)} questions x 8 tokens: {len(asked) / (time.perf_counter() - begin):.0f} questions/s")
    del model
    plain = make_llama(options, lora=False).eval()
    for size in (50, 200):
        for _ in range(2):
            begin = time.perf_counter()
            for at in range(0, len(asked), size):
                rows = [[1] + prompt.piece.ids + prompt.question_ids for prompt in asked[at : at + size]]
                longest = max(map(len, rows))
                ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=DEVICE)
                mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=DEVICE)
                plain.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0)
            synchronize()
        print(f"generate, no adapter, batches of {size}: {len(asked) / (time.perf_counter() - begin):.0f} questions/s")


if __name__ == "__main__":
    main()
