"""Rows of stocha-answers as the tokens that the model read and wrote, with a mask of its answer.

trl reads a prompt and its completion as one text, in which a token can be of both, and ends every completion with the
tokenizer's EOS: also one that was cut at the longest, or that ends with another token, as Gemma's turns do. So these
rows become tokens here. Of other rows among them, whose `finished` is null, the text gets its EOS as trl gives it.

A model may draw two tokens whose text the tokenizer reads as one. Inside of an answer that cannot be told from text.

    answer_tokens(load_data("answers.jsonl"), tokenizer)     # input_ids, and completion_mask of 0 and 1
"""

from __future__ import annotations

from typing import Any

from stocha_hf.data.row_text import pair_ids

COLUMNS = {"prompt", "completion", "finished"}


def answer_tokens(data: Any, tokenizer: Any, processes: int | None = None) -> Any:
    """Return a data set with tokens in place of answers, or as it is where it has none.

    Args:
        data: A Dataset, or an IterableDataset.
        tokenizer: The model's.
        processes: That share the work on a Dataset.
    """
    first = next(iter(data))
    if not (set(first) >= COLUMNS and isinstance(first["prompt"], str)):
        return data
    options = {"num_proc": processes} if hasattr(data, "__len__") else {}
    return data.map(_tokens, fn_kwargs={"tokenizer": tokenizer}, remove_columns=sorted(COLUMNS), **options)


def _tokens(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    completion = row["completion"]
    if row["finished"] is None and not completion.endswith(tokenizer.eos_token):
        completion += tokenizer.eos_token
    prompt, answer = pair_ids(tokenizer, row["prompt"], completion)
    of_prompt = 0 if row["prompt"] else 1  # what the tokenizer puts before a text is no prompt
    return {"input_ids": prompt + answer, "completion_mask": [of_prompt] * len(prompt) + [1] * len(answer)}
