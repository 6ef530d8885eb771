"""Both continuations of a pair in one row: the shared prefix is computed once.

A row holds `[prefix, chosen, rejected]`. The rejected branch starts again at the prefix's last position and attends to
the prefix and itself, never to the chosen branch (a 4-D attention mask), so its log-probabilities are those of the
row `[prefix, rejected]` by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BranchCollator:
    """Collates pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`, optional `ref_*_logps`) into branch rows."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns `input_ids`, `position_ids` [rows, width], `attention_mask` bool [rows, 1, width, width], and the
        flat indices `row`, `column`, `target`, `side` (0 chosen, 1 rejected) of every predicted token."""
        width = max(len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples)
        ids = torch.full((len(examples), width), self._pad)
        positions = torch.zeros((len(examples), width), dtype=torch.long)
        mask = torch.zeros((len(examples), 1, width, width), dtype=torch.bool)
        flat: list[tuple[int, int, int, int]] = []
        for i, example in enumerate(examples):
            prefix, chosen, rejected = example["prompt_ids"], example["chosen_ids"], example["rejected_ids"]
            p, c, r = len(prefix), len(chosen), len(rejected)
            ids[i, : p + c + r] = torch.tensor(prefix + chosen + rejected)
            positions[i, : p + c] = torch.arange(p + c)
            positions[i, p + c : p + c + r] = torch.arange(p, p + r)
            mask[i, 0] = torch.ones(width, width, dtype=torch.bool).tril()
            mask[i, 0, p + c : p + c + r, p : p + c] = False
            flat += [(i, p - 1 if k == 0 else p + k - 1, token, 0) for k, token in enumerate(chosen)]
            flat += [(i, p - 1 if k == 0 else p + c + k - 1, token, 1) for k, token in enumerate(rejected)]
        row, column, target, side = torch.tensor(flat).T
        batch = {
            "input_ids": ids, "position_ids": positions, "attention_mask": mask,
            "row": row, "column": column, "target": target, "side": side,
        }  # fmt: skip
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            if key in examples[0]:
                batch[key] = torch.tensor([e[key] for e in examples])
        return batch
