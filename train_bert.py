"""Fine-tune BERT for extractive question answering.

    python train_bert.py --demo                                                  # minutes on two CPU cores, no hub needed
    python train_bert.py                                                         # BERT-base on SQuAD v1.1, from the hub
    torchrun --nproc_per_node=4 train_bert.py
    python train_bert.py --train-data train-v1.1.json --dev-data dev-v1.1.json --out runs/bert
    python train_bert.py ... --resume                                            # go on after Ctrl-C, SIGTERM or a crash

Reads SQuAD, cuts it into windows, trains the encoder and the span head, and leaves in runs/.../model a folder that
`AutoModelForQuestionAnswering.from_pretrained` loads. train_llama.py has the same sections in the same order.

Letters: B windows of a micro-batch, L tokens of the longest of them.
"""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import asdict

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: no traceback; exit_status sets it back

import torch
from safetensors.torch import load_file

from qa import weights
from qa.bert.model import load_bert, load_weights, save_bert, span_loss
from qa.bert.reader import BertReader
from qa.bert.windows import make_windows
from qa.data.batches import deal, epoch_plan, padding_share
from qa.data.splits import training_split
from qa.data.squad import load_squad
from qa.errors import Stopped, exit_status
from qa.flags import parse
from qa.options import DEMO_BERT, BertOptions
from qa.settings import resolve
from qa.training import distributed
from qa.training.card import model_card
from qa.training.checkpoint import save_checkpoint
from qa.training.evaluator import Evaluator
from qa.training.log import RunLog
from qa.training.optim import advice, learning_rate, load_optimizer_tensors, make_adamw, optimizer_tensors, set_learning_rate
from qa.training.precision import choose_precision
from qa.training.product import Product
from qa.training.run import find_run, fingerprint, finish_run, open_run
from qa.training.sharding import gather, shard
from qa.training.state import StopSignal, TrainState, agree, stopped_before, trouble


def main() -> None:
    # ---- options and runtime ------------------------------------------------------------------------------------
    options, typed = parse(BertOptions, __doc__, DEMO_BERT)
    runtime = distributed.start(options.deterministic)
    options = find_run(options, runtime)
    say = print if runtime.is_main else lambda *_, **__: None

    # ---- data: passages -> windows ------------------------------------------------------------------------------
    with distributed.first_of_each_node(runtime):
        data = load_squad(options.train_data, "train")
        dev_data = load_squad(options.dev_data, "dev") if options.dev_data else None
        model_path = weights.locate(options.model)
    training, held_out = training_split(data, options.max_train_questions, options.held_out, options.data_seed)
    weights.expect_reader(model_path, "bert")
    tokenizer = weights.load_tokenizer(model_path)
    windows = make_windows(training, tokenizer, options.max_length, options.overlap)
    lengths, questions = windows.lengths, [example for passage in training for example in passage.examples]
    say(data.describe(), *weights.tokenizer_warnings(tokenizer), *windows.summary.lines(), sep="\n  ")

    # ---- model, optimizer and reader ----------------------------------------------------------------------------
    distributed.reseed(options.seed, 0, 0)  # so that every rank draws the same new head
    model, head_is_trained = load_bert(model_path, options.max_length, options.dropout)
    precision = choose_precision(options.precision, runtime, *model.widths)
    model.to(runtime.device, precision.parameter_dtype)
    if options.shard:
        shard(model, runtime)  # qa/training/sharding.py
    micro_tokens = distributed.choose_micro_tokens(options.micro_tokens, runtime.device, model, precision.is_half)
    forward = torch.compile(model, dynamic=True) if options.compile else model
    parameters = list(model.parameters())
    optimizer = make_adamw(model, options.lr, options.weight_decay)
    scaler = precision.grad_scaler()
    say(f"{options.model}: {sum(parameter.numel() for parameter in parameters):,} parameters, all trained; span head "
        f"{'trained already' if head_is_trained else 'new'}; {runtime}, at most {micro_tokens:,} tokens at a time; "
        f"{precision.reason}",
        *advice(options, typed, model), sep="\n")
    settings, _ = resolve("bert", asdict(options), {"is_v2": data.is_v2})
    reader = BertReader(forward, tokenizer, settings, precision, runtime, micro_tokens)

    # ---- open the run, or resume it -----------------------------------------------------------------------------
    folder, checkpoint = open_run(options, runtime, precision, fingerprint(training, windows.tokens),
                                  [example.id for example in questions])
    state = TrainState()
    if checkpoint is not None:
        load_weights(model, checkpoint.tensors["model"])
        load_optimizer_tensors(model, optimizer, checkpoint.tensors["optimizer"])
        scaler.load_state_dict(checkpoint.state["scaler"])
        state = TrainState(**checkpoint.state["progress"])
    steps_per_epoch = math.ceil(len(windows) / options.batch_size)
    total_steps = options.max_steps or steps_per_epoch * options.epochs
    product = Product(
        folder / "model", settings=settings, runtime=runtime,
        whole_weights=lambda: gather(model.state_dict(), runtime),
        write=lambda to, tensors: save_bert(model, tokenizer, to, tensors),
        read=lambda saved: load_weights(model, load_file(saved / "model.safetensors")),
        card=lambda *scores: model_card(options, len(questions), precision, f"windows of {options.max_length} tokens, overlap "
                                        f"{options.overlap}, dropout {model.dropout:g}", *scores))
    product.check(state.best_step)
    num_held_out = len(held_out.examples) if held_out else 0
    log = RunLog(folder / "log.jsonl", total_steps, "windows", runtime)
    evaluator = Evaluator(reader, product, options, log, state, held_out, dev_data)
    say(f"{len(questions):,} training questions in {len(windows):,} windows of {lengths.mean():.0f} tokens on average; "
        f"{total_steps:,} steps of {options.batch_size} windows; held out: {num_held_out:,} questions")
    evaluator.begin({"before training": reader}, epoch_ends=state.step % steps_per_epoch == 0 or state.step == total_steps)

    # ---- loop ---------------------------------------------------------------------------------------------------
    stop, first_step = StopSignal(options.stop_after), state.step
    for step in range(first_step, total_steps):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        if step == first_step or step_of_epoch == 0:
            plan = epoch_plan(lengths, options.batch_size, options.seed, epoch)
        batch = plan[step_of_epoch]  # window indices, the same on every rank
        distributed.reseed(options.seed, step + 1, runtime.rank)  # so a resumed run repeats its dropout masks

        # ---- a training step: forward and backward --------------------------------------------------------------
        shares = deal(batch, lengths, runtime.num_ranks, micro_tokens, even=options.shard)  # per rank its micro-batches
        loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
        for rows in shares[runtime.rank]:  # B window indices
            micro_batch = windows.batch(rows, runtime.device)  # name -> [B, L]; labels [B]; see qa/bert/windows.py
            with precision.autocast():
                start, end = forward(micro_batch["input_ids"], micro_batch["attention_mask"],
                                     micro_batch["token_type_ids"])  # [B, L], [B, L]; see BertSpanModel in qa/bert/model.py
            loss = span_loss(start, end, micro_batch) / len(batch)  # the micro-batch's part of the mean over `batch`
            scaler.scale(loss).backward()  # adds to every .grad; times a factor in fp16, see qa/training/precision.py
            loss_sum += loss.detach()

        # ---- sum over ranks, clipping ---------------------------------------------------------------------------
        distributed.sum_gradients(parameters, runtime)  # now every rank has the gradient of the mean loss of `batch`
        scaler.unscale_(optimizer)  # divides it by fp16's factor
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip or math.inf)
        mean_loss, grad_norm, stop_requested = agree(loss_sum, norm, stop, runtime)  # over all ranks; qa/training/state.py
        if reason := trouble(scaler, mean_loss, grad_norm):
            log.close()
            ids = [questions[index].id for index in sorted(set(windows.example_index[batch]))]
            raise stopped_before(step + 1, reason, ids, folder)

        # ---- update ---------------------------------------------------------------------------------------------
        set_learning_rate(optimizer, learning_rate(state.updates, total_steps, options.warmup, options.lr))  # see optim.py
        scale = scaler.get_scale()
        scaler.step(optimizer)  # AdamW's update; none if a gradient overflowed in fp16
        scaler.update()  # halves the factor after an overflow, doubles it after 2,000 good steps in a row
        optimizer.zero_grad()
        # ---------------------------------------------------------------------------------------------------------

        state.advance(skipped=scaler.get_scale() < scale)  # a skipped step does not advance the learning rate's schedule
        log.step(state.step, mean_loss, num_items=len(batch), weight=len(batch), every=options.log_every, grad_norm=grad_norm,
                 lr=optimizer.param_groups[0]["lr"], skipped=state.skipped, padding=padding_share(shares, lengths))

        # ---- checkpoint, stop, evaluation -----------------------------------------------------------------------
        epoch_ends = (step + 1) % steps_per_epoch == 0 or step + 1 == total_steps  # --max-steps may cut the last epoch
        with log.clock_stopped():
            if epoch_ends or stop_requested or (options.save_every and (step + 1) % options.save_every == 0):
                tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
                others = {"progress": asdict(state), "scaler": scaler.state_dict()}
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
