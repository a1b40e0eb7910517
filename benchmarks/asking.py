"""The time of a question to many documents, against the model's own forward passes.

    python benchmarks/asking.py --ckpt runs/bert --data dev-v1.1.json [--documents 40] [--words 1500]

Documents of some 1,500 words, made of the passages of --data (a paragraph each; repeated with another first word if there are
too few), are asked two questions, in one process. The second one must not pay again for what does not depend on it. The forward
passes are timed inside the same run: the time in the model's forward (and, in exact decoding, in its language-model head).
The rest is ours: tokenising, decoding, search, ranking.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qa.data.squad import load_squad  # noqa: E402
from qa.reader import open_reader  # noqa: E402

QUESTIONS = ("When did the Normans come?", "Who built the first steam engine?")


def make_passages(source: str, num_documents: int, num_words: int) -> list[str]:
    texts = [passage.text for passage in load_squad(source, "dev").passages]
    passages: list[str] = []
    for _ in range(num_documents):
        words = 0
        while words < num_words:
            round_number, place = divmod(len(passages), len(texts))
            passages.append(texts[place] if round_number == 0 else f"{round_number}. {texts[place]}")
            words += len(passages[-1].split())
    return passages


class Clock:
    """The time inside some modules' forward, those inside one another once."""

    def __init__(self, *modules: torch.nn.Module):
        self.seconds, self.depth, self.begin = 0.0, 0, 0.0
        for module in modules:
            module.register_forward_pre_hook(self.enter)
            module.register_forward_hook(self.leave)

    def enter(self, *_) -> None:
        if self.depth == 0:
            self.begin = time.perf_counter()
        self.depth += 1

    def leave(self, *_) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.seconds += time.perf_counter() - self.begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--words", type=int, default=1500)
    parser.add_argument("--cache-mb", type=int, default=0, help="for a LLaMA: 4000 or so")
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    passages = make_passages(options.data, options.documents, options.words)
    more = {"cache_mb": options.cache_mb} if options.cache_mb else {}
    reader = open_reader(options.ckpt, precision=options.precision, **more)
    is_llama = hasattr(reader, "template")
    clock = Clock(reader.model.model, reader.model.lm_head) if is_llama else Clock(reader.model)
    print(f"{options.ckpt}: {options.documents} documents, {len(passages)} passages, "
          f"{sum(len(text.split()) for text in passages):,} words")
    for number, question in enumerate(QUESTIONS, start=1):
        clock.seconds, begin = 0.0, time.perf_counter()
        found = reader.find(question, passages)
        seconds = time.perf_counter() - begin
        memory = reader.memory if is_llama else None
        kept = f"; kept: {len(memory.kept)} passages, {memory.num_bytes / 1e6:.0f} MB" if memory else ""
        print(f"question {number}: {seconds:.1f} s, forward passes {clock.seconds:.1f} s: {seconds / clock.seconds:.2f} times; "
              f"first answer {found[0].answer.text!r}{kept}")


if __name__ == "__main__":
    main()
