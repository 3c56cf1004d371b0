"""How the kernels of a GPU's decode step are divided into programs: rows, columns and warps of each.

A product's program has ROWS rows and BLOCK columns at a time, UP of the up projection. PROGRAMS is about how many
there are, where tiles do not say it. SPLITS and TILE are those of attention; TILE are also rows of the sparse down
product.

Found on an H200, by the time of the whole step: TILES with a Llama of 1B shape, LARGE with one of 8B. To bring a
product's rows into the L2 cache before it waits for x made the step slower, by up to 9%.
"""

from __future__ import annotations

TILES: dict[str, dict[str, int]] = {
    "qkv": {"ROWS": 2, "BLOCK": 1024, "num_warps": 4},
    "o": {"ROWS": 2, "BLOCK": 1024, "num_warps": 4},
    "hidden": {"ROWS": 2, "BLOCK": 1024, "UP": 1024, "num_warps": 4},
    "list": {"ROWS": 16, "BLOCK": 128, "num_warps": 2},
    "listed": {"PROGRAMS": 1320, "ROWS": 2, "BLOCK": 1024, "num_warps": 4},
    "dense": {"ROWS": 2, "BLOCK": 1024, "UP": 1024, "num_warps": 4},
    "dense down": {"ROWS": 2, "BLOCK": 2048, "num_warps": 4},
    "down": {"PROGRAMS": 1024, "TILE": 128, "BLOCK": 32, "num_warps": 2},
    "attention": {"SPLITS": 16, "TILE": 64, "num_warps": 8},
    "head": {"ROWS": 4, "BLOCK": 2048, "num_warps": 4},
}
LARGE: dict[str, dict[str, int]] = {  # from a hidden size of 4096 on
    "qkv": {"ROWS": 4, "BLOCK": 512, "num_warps": 1},
    "o": {"ROWS": 1, "BLOCK": 2048, "num_warps": 4},
    "hidden": {"ROWS": 4, "BLOCK": 1024, "UP": 1024, "num_warps": 4},
    "dense": {"ROWS": 8, "BLOCK": 1024, "UP": 1024, "num_warps": 4},
    "dense down": {"ROWS": 2, "BLOCK": 1024, "num_warps": 2},
    "down": {"PROGRAMS": 512, "TILE": 128, "BLOCK": 64, "num_warps": 4},
    "attention": {"SPLITS": 16, "TILE": 64, "num_warps": 4},
    "head": {"ROWS": 4, "BLOCK": 256, "num_warps": 1},
}
CUT: dict[str, dict[str, int]] = {  # products that read some inputs' rows only
    "cut qkv": {"SPLITS": 16, "TILE": 32, "BLOCK": 64, "num_warps": 4},
    "cut o": {"SPLITS": 16, "TILE": 32, "BLOCK": 64, "num_warps": 4},
    "cut hidden": {"SPLITS": 8, "TILE": 32, "BLOCK": 128, "num_warps": 4},
    "cut down": {"SPLITS": 16, "TILE": 32, "BLOCK": 128, "num_warps": 4},
}
SEVERAL: dict[str, dict[str, int]] = {  # for 2 to 4 tokens, by tensor cores
    "qkv": {"ROWS": 16, "BLOCK": 256, "num_warps": 4, "num_stages": 4},
    "o": {"ROWS": 16, "BLOCK": 256, "num_warps": 4, "num_stages": 4},
    "hidden": {"ROWS": 64, "BLOCK": 128, "TILE": 32, "num_warps": 4, "num_stages": 4},
    "dense": {"ROWS": 32, "BLOCK": 128, "TILE": 32, "num_warps": 4, "num_stages": 4},
    "dense down": {"ROWS": 16, "BLOCK": 256, "num_warps": 4, "num_stages": 4},
    "head": {"ROWS": 32, "BLOCK": 128, "num_warps": 4, "num_stages": 4},
}


def tiles_for(tokens: int, size: int) -> dict[str, dict[str, int]]:
    """Return each kernel's tile for a step of so many tokens, in a model of this hidden size."""
    tiles = TILES | CUT | (LARGE if size >= 4096 else {})
    if tokens == 1:
        return tiles
    return tiles | SEVERAL | {"down": {"PROGRAMS": 512 * tokens, "TILE": 32, "BLOCK": 64, "num_warps": 4}}
