"""One question's exact search, prefix by prefix, as a table: `evaluate.py --decode exact --trace ID`.

The plain search of search.py over the real model: each prefix is run by itself, after the whole prompt, by
`next_log_probs` of greedy.py. Used by: llama/reader.py.
"""

from __future__ import annotations

from collections.abc import Callable

from qa.llama.candidates_fast import make_trie_fast
from qa.llama.encode import Prompt
from qa.llama.greedy import next_log_probs
from qa.llama.prompt import PromptTemplate
from qa.llama.search import best_first

WIDEST = 60  # characters of a prefix that are shown; of a longer one the last


def prefix_log_probs(model, template: PromptTemplate, prompt: Prompt) -> Callable[[list[int]], tuple[list[float], float]]:
    """The model as `best_first` asks it: tokens of a prefix -> log P of each next token [V], and of the end."""
    prompt_ids = template.instruction_ids + prompt.piece.ids + prompt.question_ids

    def log_probs(prefix: list[int]) -> tuple[list[float], float]:
        found = next_log_probs(model, prompt_ids + prefix)  # [V]
        return found.tolist(), float(found[template.end_token_ids].logsumexp(dim=-1))

    return log_probs


def trace_search(model, template: PromptTemplate, prompt: Prompt, max_answer_length: int, num_best: int) -> list[str]:
    """Lines to print: the prefixes in the order of the search, then the open ones that it never ran, and why that is enough."""
    trie = make_trie_fast(template, prompt.piece.text, max_answer_length)
    best, steps, left_open = best_first(trie, prefix_log_probs(model, template, prompt), num_best)
    rows = [(node, log_prob, "no candidate" if answer is None else f"{answer:.3f}") for node, log_prob, answer in steps[1:]]
    rows += [(node, log_prob, "never run") for log_prob, node in left_open]
    texts = [template.tokenizer.decode(trie.prefix(node)) for node, _, _ in rows]
    texts = [f'"{text}"' if len(text) <= WIDEST else f'..."{text[-WIDEST:]}"' for text in texts]
    width = max(map(len, ("prefix", *texts)))
    lines = [f"{'prefix':<{width}}    log P  as the whole answer"]
    lines += [f"{text:<{width}}  {log_prob:7.3f}  {words:>12}" for text, (_, log_prob, words) in zip(texts, rows, strict=True)]
    lines.append(f"{len(steps) - 1} of {trie.num_nodes() - 1} prefixes were run")
    for number, step in enumerate(best, start=1):
        start, end = trie.span(step.node)
        lines.append(f"answer {number}: {prompt.piece.text[start:end]!r}, log P {step.answer_log_prob:.3f}")
    if not left_open:
        return [*lines, "proof: every prefix was run"]
    return [*lines, "proof: a further token never raises log P; every prefix that was not run has log P "
            f"{left_open[0][0]:.3f} or less, answer {len(best)} has {best[-1].answer_log_prob:.3f}"]
