"""Fine-tune BERT for extractive question answering.

    python train_bert.py --demo                                                  # minutes on two CPU cores, no hub needed
    python train_bert.py --train-data train-v1.1.json --dev-data dev-v1.1.json --out runs/bert
    torchrun --nproc_per_node=4 train_bert.py --train-data squad --dev-data squad --out runs/bert
    python train_bert.py ... --out runs/bert --resume                            # go on after Ctrl-C, SIGTERM or a crash

Reads SQuAD, cuts it into windows, trains encoder and span head, and leaves in runs/bert/model a folder that
`AutoModelForQuestionAnswering.from_pretrained` loads. train_llama.py has the same sections in the same order.
"""

from __future__ import annotations

import math
import sys

import torch

from qa import weights
from qa.bert.model import load_bert, span_loss
from qa.bert.product import BertProduct
from qa.bert.windows import make_windows
from qa.data.batches import deal, epoch_plan, padding_share
from qa.data.splits import training_split
from qa.data.squad import load_squad
from qa.errors import Stopped, exit_status
from qa.options import DEMO_BERT, BertOptions, parse
from qa.training import distributed
from qa.training.checkpoint import save_checkpoint
from qa.training.evaluator import Evaluator
from qa.training.log import RunLog
from qa.training.optim import learning_rate, load_optimizer_tensors, make_adamw, optimizer_tensors, set_learning_rate
from qa.training.precision import choose_precision
from qa.training.run import StopSignal, agree, check_folder, fingerprint, open_run


def main() -> None:
    # ---- options and runtime ------------------------------------------------------------------------------------
    options, _ = parse(BertOptions, __doc__, DEMO_BERT)
    check_folder(options)
    runtime = distributed.start(options.deterministic)
    precision = choose_precision(options.precision, runtime.device)
    micro_tokens = distributed.default_micro_tokens(options.micro_tokens, runtime.device)
    say = print if runtime.is_main else lambda *_, **__: None

    # ---- data: examples -> windows ------------------------------------------------------------------------------
    data = load_squad(options.train_data, "train")
    dev_data = load_squad(options.dev_data, "dev") if options.dev_data else None
    training, held_out = training_split(data, options.max_train_questions, options.held_out, options.seed)
    model_path = weights.locate(options.model)
    weights.expect_family(model_path, "bert")
    tokenizer = weights.load_tokenizer(model_path)
    windows = make_windows(training, tokenizer, options.max_length, options.overlap)
    lengths = windows.lengths
    say(data.describe(), *windows.summary.lines(), sep="\n  ")

    # ---- model and optimizer ------------------------------------------------------------------------------------
    distributed.reseed(options.seed, 0, 0)  # every rank draws the same new head
    model, head_is_trained = load_bert(model_path, options.max_length, options.dropout)
    model.to(runtime.device, precision.parameter_dtype)
    forward = torch.compile(model, dynamic=True) if options.compile else model
    parameters = list(model.parameters())
    optimizer = make_adamw(model, options.lr, options.weight_decay)
    scaler = precision.grad_scaler()
    say(f"{options.model}: {sum(p.numel() for p in parameters):,} parameters, all trained; head "
        f"{'from the checkpoint' if head_is_trained else 'new'}; {precision.name} on {runtime.num_ranks} × {runtime.device}")

    # ---- open the run, or resume it -----------------------------------------------------------------------------
    folder, checkpoint = open_run(options, runtime, fingerprint(training, windows.tokens))
    progress = {"step": 0, "updates": 0, "skipped": 0, "best_f1": None}  # all that a resume needs beside the tensors
    if checkpoint is not None:
        model.load_state_dict(checkpoint.tensors["model"])
        load_optimizer_tensors(model, optimizer, checkpoint.tensors["optimizer"])
        scaler.load_state_dict(checkpoint.state["scaler"])
        progress = checkpoint.state["progress"]
    steps_per_epoch = math.ceil(len(windows) / options.batch_size)
    total_steps = steps_per_epoch * options.epochs
    log = RunLog(folder / "log.jsonl", total_steps, progress["step"], "windows", runtime)
    product = BertProduct(model, forward, tokenizer, data, options, precision, runtime)
    evaluator = Evaluator(product, options, log, held_out, dev_data)
    say(f"{len(training):,} training questions in {len(windows):,} windows of {lengths.mean():.0f} tokens on average; "
        f"{total_steps:,} steps of {options.batch_size}; held out: {len(held_out.examples) if held_out else 0:,} questions")
    if options.demo and checkpoint is None:
        evaluator.score_dev("before training", progress)

    # ---- loop ---------------------------------------------------------------------------------------------------
    def save() -> None:
        if runtime.is_main:
            tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
            save_checkpoint(folder, progress["step"], tensors, {"progress": progress, "scaler": scaler.state_dict()},
                            options.keep)
        distributed.barrier(runtime)  # a rank that ends early would make torchrun stop rank 0 while it writes

    stop = StopSignal()
    first_step = progress["step"]
    for step in range(first_step, total_steps):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        if step == first_step or step_of_epoch == 0:
            plan = epoch_plan(lengths, options.batch_size, options.seed, epoch)
        batch = plan[step_of_epoch]  # window indices, the same on every rank
        distributed.reseed(options.seed, step + 1, runtime.rank)

        # ---- a training step ------------------------------------------------------------------------------------
        shares = deal(batch, lengths, runtime.num_ranks, micro_tokens)  # one list of micro-batches per rank
        loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
        for rows in shares[runtime.rank]:
            micro_batch = windows.batch(rows, runtime.device)
            with precision.autocast():
                start, end = forward(micro_batch["input_ids"], micro_batch["attention_mask"],
                                     micro_batch["token_type_ids"])  # [B, L], [B, L]
            loss = span_loss(start, end, micro_batch) / len(batch)  # its share of the global mean
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        distributed.sum_gradients(parameters, runtime)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip or math.inf).item()
        mean_loss, stop_requested = agree(loss_sum, stop, runtime)
        if not scaler.is_enabled() and not math.isfinite(grad_norm + mean_loss):
            ids = [training[index].id for index in sorted(set(windows.question[batch].tolist()))]
            log.close()
            raise Stopped(f"stopped before the update of step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}; "
                          f"questions {', '.join(ids)}; the last checkpoint in {folder} is kept")
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
        log.step(progress["step"], mean_loss, len(batch), len(batch), options.log_every, grad_norm=grad_norm,
                 lr=optimizer.param_groups[0]["lr"], skipped=progress["skipped"], padding=padding_share(shares, lengths))

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
