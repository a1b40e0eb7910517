"""The peer: BERT for question answering with transformers' Trainer, set up as its example `run_qa.py` does.

Used by bert_training.py for side-by-side timings, and by itself to write a `BertForQuestionAnswering` checkpoint that
owes nothing to our code:

    python benchmarks/trainer_bert.py --model FOLDER --train-data train-v2.0.json --out runs/trainer-v2 --best-flags bf16

Two settings: as it comes (fp32, every window padded to 384) and with its best flags (padding to the longest of the batch,
batches grouped by length, fused AdamW), in bf16 or fp32. The features follow run_qa.py's `prepare_train_features`:
overlapping windows from the fast tokenizer, a window without the answer labelled with [CLS].
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from decoding import loop_decode  # noqa: E402

from qa.data.splits import first_passages, questions_that  # noqa: E402
from qa.data.squad import Example, Passage, load_squad  # noqa: E402


def trainer_features(passages: list[Passage], tokenizer, max_length: int, overlap: int, pad: bool, labels: bool = True):
    """run_qa.py's features: a list of dicts, one per window, with `start_positions` and `end_positions`."""
    examples = [example for passage in passages for example in passage.examples]
    contexts = [passage.text for passage in passages for _ in passage.examples]
    encoded = tokenizer([example.question.lstrip() for example in examples], contexts,
                        truncation="only_second", max_length=max_length, stride=overlap,
                        return_overflowing_tokens=True, return_offsets_mapping=True,
                        padding="max_length" if pad else False)
    features = []
    for row in range(len(encoded["input_ids"])):
        feature = {key: encoded[key][row] for key in ("input_ids", "token_type_ids", "attention_mask")}
        if labels:
            example = examples[encoded["overflow_to_sample_mapping"][row]]
            start, end = _label(example, encoded["offset_mapping"][row], encoded.sequence_ids(row))
            feature |= {"start_positions": start, "end_positions": end}
        features.append(feature)
    return features, encoded


def _label(example: Example, offsets, sequence_ids) -> tuple[int, int]:
    if example.is_impossible:
        return 0, 0
    answer = example.answers[0]
    first, last = sequence_ids.index(1), len(sequence_ids) - 1 - sequence_ids[::-1].index(1)
    if offsets[first][0] > answer.start_char or offsets[last][1] < answer.end_char:
        return 0, 0
    while first < len(offsets) and offsets[first][0] <= answer.start_char:
        first += 1
    while offsets[last][1] >= answer.end_char:
        last -= 1
    return first - 1, last + 1


def make_trainer(model, tokenizer, features, out: Path, *, batch_size: int, epochs: float, lr: float, warmup: float,
                 seed: int, best_flags: str | None, max_steps: int = -1) -> Trainer:
    steps = max_steps if max_steps > 0 else -(-len(features) // batch_size) * epochs
    flags = {"bf16": best_flags == "bf16", "train_sampling_strategy": "group_by_length",
             "optim": "adamw_torch_fused"} if best_flags else {}
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size,
        num_train_epochs=epochs, max_steps=max_steps, learning_rate=lr, warmup_steps=int(warmup * steps), seed=seed,
        save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=False, **flags)
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if arguments.fp16 else None)
    return Trainer(model=model, args=arguments, train_dataset=features, processing_class=tokenizer,
                   data_collator=collator if best_flags else default_data_collator)


def trainer_answers(folder: Path, passages: list[Passage]) -> tuple[float, dict[str, str]]:
    """run_qa.py's evaluation, fp32, every window padded to 384: (seconds, {id: best answer})."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    arguments = TrainingArguments(output_dir=tempfile.mkdtemp(), per_device_eval_batch_size=8, report_to=[],
                                  use_cpu=not torch.cuda.is_available(), disable_tqdm=True)
    trainer = Trainer(model=model, args=arguments, processing_class=tokenizer, data_collator=default_data_collator)
    begin = time.perf_counter()
    features, encoded = trainer_features(passages, tokenizer, 384, 128, pad=True, labels=False)
    start, end = trainer.predict(features).predictions
    rows = [{"id": example.id, "context": passage.text} for passage in passages for example in passage.examples]
    for row, owner in enumerate(encoded["overflow_to_sample_mapping"]):
        inside = zip(encoded["offset_mapping"][row], encoded.sequence_ids(row), strict=True)
        features[row] |= {"example_id": rows[owner]["id"],
                          "offset_mapping": [pair if part == 1 else None for pair, part in inside]}
    nbest = loop_decode(start, end, features, rows)
    best = {key: spans[0]["text"] for key, spans in nbest.items()}
    return time.perf_counter() - begin, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-train-questions", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--best-flags", choices=("bf16", "fp32"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForQuestionAnswering.from_pretrained(args.model)
    passages = questions_that(lambda example: example.trainable, load_squad(args.train_data).passages)
    if args.max_train_questions:
        passages = first_passages(passages, args.max_train_questions, args.seed)
    features, _ = trainer_features(passages, tokenizer, 384, 128, pad=not args.best_flags)
    trainer = make_trainer(model, tokenizer, features, args.out, batch_size=args.batch_size, epochs=args.epochs,
                           lr=args.lr, warmup=0.1, seed=args.seed, best_flags=args.best_flags)
    metrics = trainer.train().metrics
    print(f"windows_per_second {len(features) * args.epochs / metrics['train_runtime']}")
    trainer.save_model(str(args.out))
    tokenizer.save_pretrained(str(args.out))


if __name__ == "__main__":
    main()
