"""How the kernels of a GPU's decode step are divided into programs: rows, columns and warps of each.

A product's program has ROWS rows and BLOCK columns at a time, UP of the up projection; FETCH says whether it brings
its rows into the cache while it waits. PROGRAMS is about how many there are, where tiles do not say it. SPLITS and
TILE are those of attention; of the sparse down product, TILE are rows.
"""

from __future__ import annotations

# Found on an H100 (docs/experiments/decoding.md)
TILES: dict[str, dict[str, int]] = {
    "qkv": {"ROWS": 4, "BLOCK": 512, "FETCH": 1, "num_warps": 1},
    "o": {"ROWS": 1, "BLOCK": 2048, "FETCH": 1, "num_warps": 4},
    "hidden": {"ROWS": 2, "BLOCK": 1024, "UP": 1024, "num_warps": 4},
    "list": {"ROWS": 4, "BLOCK": 256, "num_warps": 1},
    "listed": {"PROGRAMS": 2112, "BLOCK": 4096, "num_warps": 4},
    "dense": {"ROWS": 2, "BLOCK": 1024, "UP": 1024, "num_warps": 4},
    "dense down": {"ROWS": 2, "BLOCK": 1024, "FETCH": 0, "num_warps": 2},
    "down": {"PROGRAMS": 512, "TILE": 128, "BLOCK": 64, "num_warps": 4},
    "attention": {"SPLITS": 16, "TILE": 64, "num_warps": 4},
    "head": {"ROWS": 4, "BLOCK": 256, "num_warps": 1},
}
SEVERAL = {"ROWS": 4, "BLOCK": 256, "UP": 256, "num_warps": 1}  # of a product with several tokens, but for these:
ONE_BY_ONE = ("attention", "down", "list", "listed")


def tiles_for(tokens: int) -> dict[str, dict[str, int]]:
    """Return each kernel's tile for a step of so many tokens."""
    if tokens == 1:
        return TILES
    found = {}
    for name, tile in TILES.items():
        found[name] = tile if name in ONE_BY_ONE else {key: SEVERAL.get(key, value) for key, value in tile.items()}
    return found | {"down": {"PROGRAMS": 512 * tokens, "TILE": 32, "BLOCK": 64, "num_warps": 4}}
