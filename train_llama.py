"""Fine-tune LLaMA with LoRA for extractive question answering.

    python train_llama.py --demo                                                 # two CPU cores, no hub needed
    python train_llama.py                                                        # SmolLM2-135M on SQuAD v1.1, from the hub
    torchrun --nproc_per_node=4 train_llama.py --model meta-llama/Llama-3.2-1B --lr 2e-4 --max-train-questions 2000
    python train_llama.py --train-data train-v1.1.json --dev-data dev-v1.1.json --out runs/lora
    python train_llama.py ... --resume                                           # go on after Ctrl-C, SIGTERM or a crash

Reads SQuAD, writes each question as a prompt after its passage, trains LoRA on the answers' tokens alone, and leaves in
runs/.../model a folder that `peft.PeftModel.from_pretrained` loads. train_bert.py has the same sections in the same order.
"""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import asdict

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: no traceback; exit_status sets it back

import torch

from qa import weights
from qa.cpu.dropout import replace_dropout
from qa.data.batches import passage_plan
from qa.data.splits import training_split
from qa.data.squad import load_squad
from qa.errors import Stopped, exit_status
from qa.flags import parse
from qa.llama.adapter import read_tensors, save_adapter
from qa.llama.base_fingerprint import base_fingerprint, check_base
from qa.llama.demonstrations import choose_demonstrations
from qa.llama.encode import all_tokens, encode_passages, passages_and_lengths
from qa.llama.lora import describe_trainable, inject_lora, load_lora_state_dict, lora_state_dict
from qa.llama.loss import AnswerLoss
from qa.llama.model import context_length, load_llama
from qa.llama.packing import collate, deal_rows
from qa.llama.prompt import PromptTemplate
from qa.llama.reader import LlamaReader
from qa.llama.targets import LoraSpec, targets_from_flag
from qa.options import DEMO_LLAMA, LlamaOptions
from qa.settings import resolve
from qa.training import distributed
from qa.training.card import model_card
from qa.training.checkpoint import save_checkpoint
from qa.training.evaluator import Evaluator
from qa.training.log import RunLog
from qa.training.optim import advice, learning_rate, load_optimizer_tensors, make_adamw, optimizer_tensors, set_learning_rate
from qa.training.precision import base_dtype, choose_precision
from qa.training.product import Product
from qa.training.run import find_run, fingerprint, finish_run, open_run
from qa.training.state import StopSignal, TrainState, agree, stopped_before, trouble


def main() -> None:
    # ---- options and runtime ------------------------------------------------------------------------------------
    options, typed = parse(LlamaOptions, __doc__, DEMO_LLAMA)
    runtime = distributed.start(options.deterministic)
    options = find_run(options, runtime)
    say = print if runtime.is_main else lambda *_, **__: None

    # ---- data and base model: passages -> prompts ---------------------------------------------------------------
    with distributed.first_of_each_node(runtime):
        data = load_squad(options.train_data, "train")
        dev_data = load_squad(options.dev_data, "dev") if options.dev_data else None
        model_path = weights.locate(options.model)
    training, held_out = training_split(data, options.max_train_questions, options.held_out, options.data_seed)
    dtype = base_dtype(options.base_dtype, options.precision, runtime.device)
    model, tokenizer = load_llama(model_path, dtype, runtime if options.shard else None)  # qa/llama/base_shards.py
    precision = choose_precision(options.precision, runtime, model.config.hidden_size, model.config.intermediate_size)
    template = PromptTemplate(tokenizer, options.prompt, data.is_v2,
                              choose_demonstrations(training, options.shots or 0, options.data_seed))
    max_length = context_length(model, options.max_length)
    prompts, notes = encode_passages(template, training, max_length, options.overlap)
    passage_index, lengths = passages_and_lengths(prompts)
    say(data.describe(), *notes, sep="\n  ")

    # ---- LoRA, optimizer and reader -----------------------------------------------------------------------------
    base_print = base_fingerprint(model)
    spec = LoraSpec(targets_from_flag(options.target), options.rank, options.alpha, options.lora_dropout, options.rslora)
    distributed.reseed(options.seed, 0, 0)  # so that every rank draws the same A
    inject_lora(model, spec)
    replace_dropout(model)  # by one that is fast on a CPU
    model.to(runtime.device).train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # reentrant: the input must require grad, ours is frozen
    micro_tokens = distributed.choose_micro_tokens(options.micro_tokens, runtime.device, model, precision.is_half,
                                                   options.gradient_checkpointing)
    forward = torch.compile(AnswerLoss(model), dynamic=True) if options.compile else AnswerLoss(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_adamw(model, options.lr, options.weight_decay)
    scaler = precision.grad_scaler()
    say(describe_trainable(model), f"{runtime}, at most {micro_tokens:,} tokens at a time; {precision.reason}",
        *advice(options, typed, model), sep="\n")
    settings, _ = resolve("llama", {**asdict(options), "max_length": max_length, "prompt": template.settings()},
                          {"is_v2": data.is_v2})
    reader = LlamaReader(model, template, settings, precision, runtime, micro_tokens)
    reader.check(held_out, dev_data)

    # ---- open the run, or resume it -----------------------------------------------------------------------------
    folder, checkpoint = open_run(options, runtime, precision, fingerprint(training, all_tokens(prompts)),
                                  [prompt.id for prompt in prompts])
    state = TrainState()
    if checkpoint is not None:
        check_base(checkpoint.state["base"], base_print, options.model)
        load_lora_state_dict(model, checkpoint.tensors["lora"], str(checkpoint.folder))
        load_optimizer_tensors(model, optimizer, checkpoint.tensors["optimizer"])
        scaler.load_state_dict(checkpoint.state["scaler"])
        state = TrainState(**checkpoint.state["progress"])
    steps_per_epoch = math.ceil(len(prompts) / options.batch_size)
    total_steps = options.max_steps or steps_per_epoch * options.epochs
    product = Product(
        folder / "model", settings=settings, runtime=runtime,
        write=lambda to, _: save_adapter(model, tokenizer, spec, to, options.model, base_print),
        read=lambda saved: load_lora_state_dict(model, read_tensors(saved), str(saved)),
        card=lambda *scores: model_card(options, len(prompts), precision, f"{spec.describe()}; {options.prompt} prompt",
                                        *scores))
    product.check(state.best_step)
    num_held_out = len(held_out.examples) if held_out else 0
    log = RunLog(folder / "log.jsonl", total_steps, "questions", runtime)
    evaluator = Evaluator(reader, product, options, log, state, held_out, dev_data)
    say(f"{len(prompts):,} training questions on {passage_index.max() + 1:,} passages; "
        f"{total_steps:,} steps of {options.batch_size} questions; held out: {num_held_out:,} questions")
    evaluator.begin(reader.with_each_prompt() if options.demo else {},
                    epoch_ends=state.step % steps_per_epoch == 0 or state.step == total_steps)

    # ---- loop ---------------------------------------------------------------------------------------------------
    stop, first_step = StopSignal(options.stop_after), state.step
    for step in range(first_step, total_steps):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        if step == first_step or step_of_epoch == 0:
            plan = passage_plan(passage_index, lengths, options.batch_size, options.seed, epoch)
        batch = [prompts[index] for index in plan[step_of_epoch]]  # the same questions on every rank
        num_answer_tokens = sum(len(prompt.answer_ids) for prompt in batch)
        distributed.reseed(options.seed, step + 1, runtime.rank)  # so a resumed run repeats its dropout masks

        # ---- a training step: forward and backward --------------------------------------------------------------
        shares = deal_rows(batch, runtime.num_ranks, len(template.instruction_ids), micro_tokens, even=options.shard)
        loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
        for rows in shares[runtime.rank]:  # each row: a passage and some of its questions with their answers
            micro_batch = collate(rows, template.instruction_ids).to(runtime.device)  # see qa/llama/packing.py
            with precision.autocast():
                loss = forward(micro_batch)  # a sum over the rows' answer tokens; see AnswerLoss in qa/llama/loss.py
            loss = loss / num_answer_tokens  # the micro-batch's part of the mean over all answer tokens of `batch`
            scaler.scale(loss).backward()  # adds to LoRA's .grad; times a factor in fp16, see qa/training/precision.py
            loss_sum += loss.detach()

        # ---- sum over ranks, clipping ---------------------------------------------------------------------------
        distributed.sum_gradients(parameters, runtime)  # now every rank has the gradient of the mean loss of `batch`
        scaler.unscale_(optimizer)  # divides it by fp16's factor
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip or math.inf)
        mean_loss, grad_norm, stop_requested = agree(loss_sum, norm, stop, runtime)  # over all ranks; qa/training/state.py
        if reason := trouble(scaler, mean_loss, grad_norm):
            log.close()
            raise stopped_before(step + 1, reason, [prompt.id for prompt in batch], folder)

        # ---- update ---------------------------------------------------------------------------------------------
        set_learning_rate(optimizer, learning_rate(state.updates, total_steps, options.warmup, options.lr))  # see optim.py
        scale = scaler.get_scale()
        scaler.step(optimizer)  # AdamW's update; none if a gradient overflowed in fp16
        scaler.update()  # halves the factor after an overflow, doubles it after 2,000 good steps in a row
        optimizer.zero_grad()
        # ---------------------------------------------------------------------------------------------------------

        state.advance(skipped=scaler.get_scale() < scale)  # a skipped step does not advance the learning rate's schedule
        log.step(state.step, mean_loss, num_items=len(batch), weight=num_answer_tokens, every=options.log_every,
                 grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"], skipped=state.skipped)

        # ---- checkpoint, stop, evaluation -----------------------------------------------------------------------
        epoch_ends = (step + 1) % steps_per_epoch == 0 or step + 1 == total_steps  # --max-steps may cut the last epoch
        with log.clock_stopped():
            if epoch_ends or stop_requested or (options.save_every and (step + 1) % options.save_every == 0):
                tensors = {"lora": lora_state_dict(model), "optimizer": optimizer_tensors(model, optimizer)}
                others = {"progress": asdict(state), "scaler": scaler.state_dict(), "base": base_print}
                save_checkpoint(folder, state.step, tensors, others, options.keep, runtime)
            if stop_requested and step + 1 < total_steps:
                log.close()
                raise Stopped(f"stopped after step {step + 1} of {total_steps}; go on with the same command and --resume",
                              planned=stop.steps_left <= 0)
            if evaluator.is_due(step + 1, epoch_ends):
                evaluator.evaluate()

    # ---- product and evaluation ---------------------------------------------------------------------------------
    stop.release()
    evaluator.finish()
    log.close()
    finish_run(folder, state, runtime)
    distributed.finish(runtime)


if __name__ == "__main__":
    sys.exit(exit_status(main))
