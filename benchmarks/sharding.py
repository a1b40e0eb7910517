"""How much memory a process needs with `train_llama.py --shard`, on CPUs.

    python benchmarks/sharding.py                  # 4 processes, a base of 1 GB; minutes, and 5 GB of memory

Trains two steps of LoRA over a base of random weights, in fp32: 36 blocks of 28 MB, 768 wide, whose tokens are bytes; a step
has a short question for each process. Prints the peak memory (resident set) of one process with a base of a single block, and
of each process with the base cut over them. The bound: a part of the base, what one process needs without the base, and 15%.
What it needs without the base: that one process, and 16 bytes (weight, gradient, AdamW's two) for each parameter of LoRA on the
other blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
PEAK = "import resource, runpy, sys; sys.argv = sys.argv[1:]; code = 0\n" \
       "try: runpy.run_path(sys.argv[0], run_name='__main__')\n" \
       "except SystemExit as end: code = end.code\n" \
       "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"


def make_base(folder: Path, num_blocks: int) -> int:
    """Save it; returns its bytes."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: id for id, symbol in enumerate([*symbols, "<s>", "</s>"])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                            clean_up_tokenization_spaces=False).save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=258, hidden_size=768, intermediate_size=2048, num_hidden_layers=num_blocks, num_attention_heads=12,
        max_position_embeddings=2048, bos_token_id=256, eos_token_id=257, pad_token_id=257))
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def make_data(path: Path, num_ranks: int) -> None:
    """A passage and a question for each process and step."""
    paragraphs = [{"context": f"Tower {number} was built in 1889.", "qas": [
        {"id": str(number), "question": "When?", "answers": [{"text": "1889", "answer_start": 22 + len(str(number))}]}]}
        for number in range(2 * num_ranks)]
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "towers", "paragraphs": paragraphs}]}))


def peaks(base: Path, data: Path, out: Path, num_ranks: int, *flags: str) -> list[float]:
    """GB of each rank of a run."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", PEAK, "train_llama.py", "--model", str(base), "--train-data", str(data),
               "--dev-data", "none", "--batch-size", str(num_ranks), "--max-steps", "2", "--gradient-checkpointing",
               "--precision", "fp32", "--out", str(out), *flags]
    ranks = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={
        **os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}) for rank in range(num_ranks)]
    outputs = [rank.communicate()[0] for rank in ranks]
    return [int(output.rpartition("peak ")[2]) * 1024 / 1e9 for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=36)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process's peak is never below that of its parent
            num_bytes, _ = pool.map(make_base, (folder / "base", folder / "one"), (args.blocks, 1))
        make_data(folder / "data.json", args.ranks)
        without = peaks(folder / "one", folder / "data.json", folder / "run-one", 1)[0]
        print(f"peak of one process with a base of one block: {without:.2f} GB", flush=True)
        sharded = peaks(folder / "base", folder / "data.json", folder / "run", args.ranks, "--shard")
        lora = [sum(tensor.numel() for tensor in load_file(folder / run / "model/adapter_model.safetensors").values())
                for run in ("run", "run-one")]
    without += 16 * (lora[0] - lora[1]) / 1e9
    part = num_bytes / args.ranks / 1e9
    print(f"a base of {num_bytes / 1e9:.2f} GB over {args.ranks} processes: {part:.2f} GB each")
    print(f"what a process needs without the base: {without:.2f} GB")
    print(f"peak of each process with --shard: {', '.join(f'{peak:.2f}' for peak in sharded)} GB; "
          f"bound {1.15 * (part + without):.2f} GB")


if __name__ == "__main__":
    main()
