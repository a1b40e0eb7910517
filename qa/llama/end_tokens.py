r"""Where an answer ends: at a special token, or at the first newline.

    end_token_ids       special tokens, and tokens with a newline and only spaces before it ("\n", "\n\n", " \n");
                        P(end), the probability that an answer ends, is their sum
    closing_token_ids   tokens with the answer's last characters *and* a newline (".\n" in Llama 3): they end the answer too,
                        and its text is cut at the newline
    end_token_id        what training puts after an answer: the end token of the assistant's turn, else eos; other tools stop
                        there as well

Padding is told by position, never by id: pad = eos in many LLaMAs. Used by: prompt.py.
"""

from __future__ import annotations

from qa.errors import UserError


def find_end_tokens(tokenizer, after_answer: str) -> tuple[int, list[int], list[int]]:
    """end_token_id, end_token_ids, closing_token_ids. `after_answer`: what the chat template writes there; "" without one.

    Tokens beyond the embeddings, such as a <pad> that somebody added, do not end an answer: the model cannot write them.
    """
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    limit = getattr(tokenizer, "num_embeddings", len(tokenizer))  # model.py notes those of its model
    special = {id: text for id, text in special.items() if id < limit}
    turn_ends = [id for id, text in special.items() if after_answer.strip().startswith(text)]
    if not turn_ends and tokenizer.eos_token_id not in special:
        raise UserError(f"--model {tokenizer.name_or_path}: its tokenizer names no end-of-text token that has an embedding")
    alone = [[id] for id in range(min(len(tokenizer), limit))]
    texts = tokenizer.backend_tokenizer.decode_batch(alone, skip_special_tokens=False)
    before_newline = {id: text.split("\n")[0].strip() for id, text in enumerate(texts) if "\n" in text}
    newlines = {id for id, before in before_newline.items() if not before}
    closing = before_newline.keys() - newlines - special.keys()
    return (turn_ends or [tokenizer.eos_token_id])[0], sorted(special.keys() | newlines), sorted(closing)
