"""What lies below the first trained layer is frozen: the reference pass keeps its output, the epochs start from there.

A table holds the hidden state of every position of every row; `BranchCollator` says which entry stands where
(`source`). The layers that made it are taken out of the model, which frees more memory than the table takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class LowerLayers:
    """The frozen layers of one model; `positions`: how many entries the table has."""

    def __init__(self, layers: nn.ModuleList, first: int, positions: int) -> None:
        self._layers, self._first, self._positions = layers, first, positions
        self._table: Tensor | None = None
        self._removed: list[nn.Module] = []

    @classmethod
    def of(cls, causal: Any, positions: int) -> LowerLayers | None:
        """The layers below the first with a weight that trains; None where there are none, where they cannot be told,
        or where the table would be larger than they are."""
        layers = dict(causal.get_decoder().named_children()).get("layers")
        embeddings = causal.get_input_embeddings().weight
        if not isinstance(layers, nn.ModuleList) or embeddings.requires_grad:
            return None
        trained = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
        weights = sum(p.nbytes for layer in layers[: trained[0]] for p in layer.parameters()) if trained else 0
        return cls(layers, trained[0], positions) if positions * embeddings[0].nbytes < weights else None

    @contextlib.contextmanager
    def kept(self, source: Tensor) -> Iterator[None]:
        """While it is open, a forward pass over the rows of `source` [rows, width] fills its entries of the table."""

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self._table is None:
                self._table = hidden.new_zeros(self._positions, hidden.shape[-1])
            self._table[source[source >= 0]] = hidden[source >= 0]

        hook = self._layers[self._first].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def remove(self) -> None:
        """Takes the frozen layers out: from now on the model starts from `look_up`."""
        self._removed = list(self._layers[: self._first])
        for i in range(self._first):
            self._layers[i] = _Passed()

    def restore(self) -> None:
        """Puts them back, until `forget`."""
        for i, layer in enumerate(self._removed):
            self._layers[i] = layer

    def forget(self) -> None:
        """Frees what `remove` took out."""
        self._removed = []

    def look_up(self, source: Tensor) -> Tensor:
        """Hidden states [rows, width, d]; padding (-1) holds any entry."""
        if self._table is None:
            raise RuntimeError("no forward pass has filled the table")
        return self._table[source.clamp(min=0)]


class _Passed(nn.Module):
    """Stands in a removed layer's place, so that the others keep their numbers."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states
