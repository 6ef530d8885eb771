"""Both continuations of a pair in one piece: the shared prefix is computed once.

A piece holds `[prefix, chosen, rejected]`. The rejected branch starts again at the prefix's last position and attends
to the prefix and itself, never to the chosen branch (a 4-D attention mask), so its log-probabilities are those of the
row `[prefix, rejected]` by itself. Several pieces share a row where that leaves less padding; none sees another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class BranchCollator:
    """Collates rows of token ids (`prompt_ids`, `chosen_ids`, `rejected_ids`, `index`, `offset`) into rows of pieces.

    `offset`: where an example's positions begin in a table of all examples' positions, one after the other.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns `input_ids`, `position_ids`, `source` (entry in the table, -1: padding) [rows, width],
        `attention_mask` bool [rows, 1, width, width], `index` [pairs], and of each predicted token `pair` (its place in
        `examples`), `row`, `column`, `target`, `side` (0 chosen, 1 rejected)."""
        rows = pack([_length(e) for e in examples])
        width = max(sum(_length(examples[i]) for i in row) for row in rows)
        ids = torch.full((len(rows), width), self._pad)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        source = torch.full((len(rows), width), -1)
        # What is padding sees itself: a row that may attend to nothing is not a number.
        mask = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1, 1)
        flat: list[tuple[int, int, int, int, int]] = []
        for number, row in enumerate(rows):
            start = 0
            for i in row:
                prefix, chosen, rejected = (examples[i][k] for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
                p, c, r = len(prefix), len(chosen), len(rejected)
                end = start + p + c + r
                ids[number, start:end] = torch.tensor(prefix + chosen + rejected)
                positions[number, start:end] = torch.tensor([*range(p + c), *range(p, p + r)])
                source[number, start:end] = torch.arange(p + c + r) + examples[i]["offset"]
                mask[number, 0, start:end, start:end] = torch.ones(p + c + r, p + c + r, dtype=torch.bool).tril()
                mask[number, 0, start + p + c : end, start + p : start + p + c] = False
                last = start + p - 1
                flat += [(i, number, last + k, token, 0) for k, token in enumerate(chosen)]
                flat += [(i, number, last + (c + k if k else 0), token, 1) for k, token in enumerate(rejected)]
                start = end
        pair, at, column, target, side = torch.tensor(flat).T
        return {
            "input_ids": ids, "position_ids": positions, "attention_mask": mask, "source": source,
            "index": torch.tensor([e["index"] for e in examples]),
            "pair": pair, "row": at, "column": column, "target": target, "side": side,
        }  # fmt: skip


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Which pieces share a row: the longest first, each into the emptiest of as many rows as take the least positions.

    No row is more than twice the longest piece: attention costs the square of a row's width.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best, fewest = [[i] for i in range(len(lengths))], max(lengths) * len(lengths)
    for count in range(len(lengths) - 1, 0, -1):
        rows: list[list[int]] = [[] for _ in range(count)]
        widths = [0] * count
        for i in order:
            emptiest = widths.index(min(widths))
            rows[emptiest].append(i)
            widths[emptiest] += lengths[i]
        if max(widths) <= 2 * max(lengths) and max(widths) * count < fewest:
            best, fewest = rows, max(widths) * count
    return best


def _length(example: dict[str, Any]) -> int:
    return len(example["prompt_ids"]) + len(example["chosen_ids"]) + len(example["rejected_ids"])
