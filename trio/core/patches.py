"""Which patches of the vision tower a visual token stands for: what joins a tower's signals to the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PatchMap:
    """The patches behind the visual tokens of one image (newlines are in neither).

    n tokens, p patches each; tensors are int64 on the CPU.

    Attributes:
        patches: ``(n, p)``, counted over the patches of the image's own tower inputs, in the order in which the tower
            gives them.
        tile: ``(n,)``, the input of the tower that the token comes from: a tile, a frame; from 0.
        total: patches of all the image's tower inputs.
    """

    patches: torch.Tensor
    tile: torch.Tensor
    total: int

    @classmethod
    def runs(cls, tokens: int, *, patches: int = 1, inputs: int = 1) -> PatchMap:
        """Tokens in the order of the tower, each of `patches` neighbours in that order, spread evenly over inputs."""
        index = torch.arange(tokens * patches).view(tokens, patches)
        return cls(index, torch.arange(tokens) // (tokens // inputs), tokens * patches)


def join(maps: list[PatchMap]) -> PatchMap:
    """The map of an image whose tokens come from several groups of tower inputs, one behind the other."""
    patches, tiles, total, first = [], [], 0, 0
    for one in maps:
        patches.append(one.patches + total)
        tiles.append(one.tile + first)
        total += one.total
        first += int(one.tile.max()) + 1
    return PatchMap(torch.cat(patches), torch.cat(tiles), total)


def tiled(rows: torch.Tensor, columns: torch.Tensor, *, tiles: tuple[int, int], side: int) -> PatchMap:
    """Tokens on a grid that was put together from square tiles.

    Args:
        rows: int64 ``(n, p)``, rows of patches on the whole grid of tiles, from 0.
        columns: likewise.
        tiles: rows and columns of tiles.
        side: patches along a side of a tile.
    """
    tile = rows // side * tiles[1] + columns // side
    patches = tile * side**2 + rows % side * side + columns % side
    return PatchMap(patches, tile[:, 0], tiles[0] * tiles[1] * side**2)
