"""Fine-tune LLaMA with LoRA for extractive question answering.

    python train_llama.py --demo                                                 # two CPU cores, no hub needed
    python train_llama.py --train-data train-v1.1.json --dev-data dev-v1.1.json --max-train-questions 2000 --out runs/lora
    torchrun --nproc_per_node=4 train_llama.py --model meta-llama/Llama-3.2-1B --train-data squad --out runs/lora
    python train_llama.py ... --out runs/lora --resume                           # go on after Ctrl-C, SIGTERM or a crash

Reads SQuAD, puts each question as a prompt behind its passage, trains LoRA on the answers' tokens alone, and leaves in
runs/lora/model a folder that `peft.PeftModel.from_pretrained` loads. The same sections in the same order as train_bert.py.
"""

from __future__ import annotations

import math
import sys

import torch

from qa import weights
from qa.data.batches import passage_plan
from qa.data.splits import training_split
from qa.data.squad import load_squad
from qa.errors import Stopped, UserError, exit_status
from qa.llama.adapter import base_fingerprint, is_same_base
from qa.llama.encode import all_tokens, encode_examples, passages_and_lengths
from qa.llama.lora import describe_trainable, inject_lora, load_lora_state_dict, lora_state_dict
from qa.llama.model import context_length, load_llama
from qa.llama.packing import AnswerLoss, collate, deal_rows
from qa.llama.product import LlamaProduct
from qa.llama.prompt import PromptTemplate, choose_demonstrations
from qa.llama.targets import LoraSpec, targets_from_flag
from qa.options import DEMO_LLAMA, LlamaOptions, parse
from qa.training import distributed
from qa.training.checkpoint import save_checkpoint
from qa.training.dropout import Dropout
from qa.training.evaluator import Evaluator
from qa.training.log import RunLog
from qa.training.optim import learning_rate, load_optimizer_tensors, make_adamw, optimizer_tensors, set_learning_rate
from qa.training.precision import choose_precision
from qa.training.run import StopSignal, agree, check_folder, fingerprint, open_run


def main() -> None:
    # ---- options and runtime ------------------------------------------------------------------------------------
    options, _ = parse(LlamaOptions, __doc__, DEMO_LLAMA)
    check_folder(options)
    runtime = distributed.start(options.deterministic)
    precision = choose_precision(options.precision, runtime.device)
    micro_tokens = distributed.default_micro_tokens(options.micro_tokens, runtime.device)
    say = print if runtime.is_main else lambda *_, **__: None

    # ---- data and base model: examples -> prompts ---------------------------------------------------------------
    data = load_squad(options.train_data, "train")
    dev_data = load_squad(options.dev_data, "dev") if options.dev_data else None
    training, held_out = training_split(data, options.max_train_questions, options.held_out, options.seed)
    model, tokenizer = load_llama(weights.locate(options.model), precision.base_dtype(options.base_dtype))
    demonstrations = choose_demonstrations(training, options.shots, options.seed)
    template = PromptTemplate(tokenizer, options.prompt, data.is_v2, demonstrations)
    max_length = context_length(model, options.max_length)
    prompts, notes = encode_examples(template, training, max_length, options.overlap)
    passage_index, lengths = passages_and_lengths(prompts)
    say(data.describe(), *notes, sep="\n  ")

    # ---- LoRA and optimizer -------------------------------------------------------------------------------------
    base_print = base_fingerprint(model)
    spec = LoraSpec(targets_from_flag(options.target), options.rank, options.alpha, options.lora_dropout, options.rslora)
    distributed.reseed(options.seed, 0, 0)  # every rank draws the same A
    inject_lora(model, spec, make_dropout=Dropout)
    model.to(runtime.device).train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # the embeddings are frozen: no input needs a gradient
    answer_loss = AnswerLoss(model)
    forward = torch.compile(answer_loss, dynamic=True) if options.compile else answer_loss
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_adamw(model, options.lr, options.weight_decay)
    scaler = precision.grad_scaler()
    say(describe_trainable(model), f"{precision.name} on {runtime.num_ranks} × {runtime.device}", sep="\n")

    # ---- open the run, or resume it -----------------------------------------------------------------------------
    folder, checkpoint = open_run(options, runtime, fingerprint(training, all_tokens(prompts)))
    progress = {"step": 0, "updates": 0, "skipped": 0, "best_f1": None}  # all that a resume needs beside the tensors
    if checkpoint is not None:
        if not is_same_base(checkpoint.state["base"], base_print):
            raise UserError(f"--resume: the weights of {options.model} are not those that {folder} was begun with")
        load_lora_state_dict(model, checkpoint.tensors["lora"], str(checkpoint.folder))
        load_optimizer_tensors(model, optimizer, checkpoint.tensors["optimizer"])
        scaler.load_state_dict(checkpoint.state["scaler"])
        progress = checkpoint.state["progress"]
    steps_per_epoch = math.ceil(len(prompts) / options.batch_size)
    total_steps = steps_per_epoch * options.epochs
    log = RunLog(folder / "log.jsonl", total_steps, progress["step"], "questions", runtime)
    product = LlamaProduct(model, template, max_length, spec, base_print, data, options, precision, runtime)
    evaluator = Evaluator(product, options, log, held_out, dev_data)
    say(f"{len(prompts):,} training questions on {passage_index.max() + 1:,} passages; "
        f"{total_steps:,} steps of {options.batch_size}; held out: {len(held_out.examples) if held_out else 0:,} questions")
    if options.demo and checkpoint is None:
        for kind in ("plain", "engineered"):
            with product.prompted(kind):
                evaluator.score_dev(f"before training, {kind} prompt", progress)

    # ---- loop ---------------------------------------------------------------------------------------------------
    def save() -> None:
        if runtime.is_main:
            tensors = {"lora": lora_state_dict(model), "optimizer": optimizer_tensors(model, optimizer)}
            state = {"progress": progress, "scaler": scaler.state_dict(), "base": base_print}
            save_checkpoint(folder, progress["step"], tensors, state, options.keep)
        distributed.barrier(runtime)  # a rank that ends early would make torchrun stop rank 0 while it writes

    stop = StopSignal()
    first_step = progress["step"]
    for step in range(first_step, total_steps):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        if step == first_step or step_of_epoch == 0:
            plan = passage_plan(passage_index, lengths, options.batch_size, options.seed, epoch)
        batch = [prompts[index] for index in plan[step_of_epoch]]  # the same questions on every rank
        num_answer_tokens = sum(len(prompt.answer_ids) for prompt in batch)
        distributed.reseed(options.seed, step + 1, runtime.rank)

        # ---- a training step ------------------------------------------------------------------------------------
        shares = deal_rows(batch, runtime.num_ranks, len(template.prefix_ids), micro_tokens)
        loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
        for rows in shares[runtime.rank]:
            micro_batch = collate(rows, template.prefix_ids).to(runtime.device)
            with precision.autocast():
                loss = forward(micro_batch) / num_answer_tokens  # its share of the global mean
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        distributed.sum_gradients(parameters, runtime)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip or math.inf).item()
        mean_loss, stop_requested = agree(loss_sum, stop, runtime)
        if not scaler.is_enabled() and not math.isfinite(grad_norm + mean_loss):
            log.close()
            raise Stopped(f"stopped before the update of step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}; "
                          f"questions {', '.join(prompt.id for prompt in batch)}; the last checkpoint in {folder} is kept")
        set_learning_rate(optimizer, learning_rate(progress["updates"], total_steps, options.warmup, options.lr))
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # ---------------------------------------------------------------------------------------------------------

        skipped = scaler.get_scale() < scale  # GradScaler found an infinity: no update, and the schedule stays
        progress["step"] += 1
        progress["updates"] += not skipped
        progress["skipped"] += skipped
        log.step(progress["step"], mean_loss, len(batch), num_answer_tokens, options.log_every, grad_norm=grad_norm,
                 lr=optimizer.param_groups[0]["lr"], skipped=progress["skipped"])

        # ---- evaluation, checkpoint, stop -----------------------------------------------------------------------
        epoch_ends = (step + 1) % steps_per_epoch == 0
        if evaluator.is_due(step + 1, epoch_ends):
            with log.clock_stopped():
                evaluator.held_out_score(progress)
        stop_requested |= step + 1 - first_step == options.stop_after
        if epoch_ends or stop_requested or (options.save_every and (step + 1) % options.save_every == 0):
            with log.clock_stopped():
                save()
        if stop_requested and step + 1 < total_steps:
            log.close()
            raise Stopped(f"stopped after step {step + 1} of {total_steps}; go on with the same command and --resume")

    # ---- product and evaluation ---------------------------------------------------------------------------------
    stop.release()
    evaluator.finish(progress)
    log.close()
    distributed.finish(runtime)


if __name__ == "__main__":
    sys.exit(exit_status(main))
