"""How the kernels of a GPU's decode step are divided into programs: rows, columns and warps of each.

A product's program has ROWS rows and BLOCK columns at a time, UP of the up projection. PROGRAMS is about how many
there are, where tiles do not say it. A program of the list has TOTAL rows, ROWS at a time. SPLITS and TILE are those
of attention; TILE are also rows of the sparse down product. A product that cuts its inputs has SPLITS of them, and
DEPTH rows that a warp reads at a time; without SPLITS it reads its matrices whole.

Found on an H200, by the time of the whole step: TILES with a Llama of 1B shape; LARGE and FOUR with one of 8B. The
list's tile, and the stages of FOUR's hidden, are of an H100. EIGHT and SIXTEEN were not searched for. Tiles of
products that cut their inputs were found by the time of each product: LARGE's at 8B, SMALL's at 0.5B; those of TILES
were reckoned from these. To bring a product's rows into the L2 cache before it waits for x made the step slower, by up
to 9%.
"""

from __future__ import annotations

TILES: dict[str, dict[str, int]] = {
    "qkv": {"ROWS": 2, "BLOCK": 1024, "num_warps": 4},
    "o": {"ROWS": 2, "BLOCK": 1024, "num_warps": 4},
    "hidden": {"ROWS": 2, "BLOCK": 1024, "UP": 1024, "num_warps": 4},
    "list": {"TOTAL": 32, "ROWS": 8, "num_warps": 4},
    "listed": {"PROGRAMS": 2112, "ROWS": 1, "BLOCK": 4096, "num_warps": 4},
    "dense": {"ROWS": 2, "BLOCK": 1024, "UP": 1024, "num_warps": 4},
    "dense down": {"ROWS": 2, "BLOCK": 2048, "num_warps": 4},
    "down": {"PROGRAMS": 1024, "TILE": 128, "BLOCK": 32, "num_warps": 2},
    "attention": {"SPLITS": 16, "TILE": 64, "num_warps": 8},
    "head": {"ROWS": 4, "BLOCK": 2048, "num_warps": 4},
    "cut qkv": {"ROWS": 2, "BLOCK": 1024, "num_warps": 4},
    "cut o": {"ROWS": 2, "BLOCK": 1024, "num_warps": 4},
    "cut hidden": {"SPLITS": 8, "DEPTH": 4, "BLOCK": 512, "num_warps": 4},
    "cut down": {"ROWS": 2, "BLOCK": 2048, "num_warps": 4},
}
SMALL: dict[str, dict[str, int]] = {  # below a hidden size of 1536
    "cut qkv": {"ROWS": 1, "BLOCK": 1024, "num_warps": 1},
    "cut o": {"ROWS": 1, "BLOCK": 1024, "num_warps": 1},
    "cut hidden": {"ROWS": 2, "BLOCK": 1024, "num_warps": 4},
    "cut down": {"ROWS": 2, "BLOCK": 1024, "num_warps": 4},
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
    "cut qkv": {"SPLITS": 11, "DEPTH": 4, "BLOCK": 128, "num_warps": 4},
    "cut o": {"ROWS": 1, "BLOCK": 2048, "num_warps": 4},
    "cut hidden": {"SPLITS": 14, "DEPTH": 4, "BLOCK": 512, "num_warps": 4},
    "cut down": {"SPLITS": 32, "DEPTH": 4, "BLOCK": 512, "num_warps": 8},
}
TWO = {"ROWS": 4, "BLOCK": 512, "UP": 512, "num_warps": 2}  # of a product with two tokens, but for these:
ONE_BY_ONE = ("attention", "down", "list", "listed")
FOUR: dict[str, dict[str, int]] = {  # by tensor cores
    "qkv": {"ROWS": 64, "BLOCK": 128, "num_warps": 4, "num_stages": 4},
    "o": {"ROWS": 32, "BLOCK": 128, "num_warps": 4, "num_stages": 6},
    "hidden": {"ROWS": 64, "BLOCK": 128, "TILE": 32, "num_warps": 4, "num_stages": 5},
    "dense": {"ROWS": 64, "BLOCK": 128, "TILE": 32, "num_warps": 4, "num_stages": 4},
    "dense down": {"ROWS": 32, "BLOCK": 128, "num_warps": 4, "num_stages": 6},
    "down": {"PROGRAMS": 1024, "TILE": 32, "BLOCK": 64, "num_warps": 2},
    "head": {"ROWS": 64, "BLOCK": 128, "num_warps": 4, "num_stages": 4},
}
EIGHT: dict[str, dict[str, int]] = {  # more warps than FOUR's, for what a program keeps of each token
    "down": {"PROGRAMS": 1024, "TILE": 32, "BLOCK": 64, "num_warps": 4},
    "attention": {"SPLITS": 16, "TILE": 64, "num_warps": 8},
}
SIXTEEN: dict[str, dict[str, int]] = {  # fewer rows and splits at a time, so that a program's sums fit its registers
    "down": {"PROGRAMS": 1024, "TILE": 16, "BLOCK": 64, "num_warps": 8},
    "attention": {"SPLITS": 8, "TILE": 64, "num_warps": 8},
}


def tiles_for(tokens: int, size: int) -> dict[str, dict[str, int]]:
    """Return each kernel's tile for a step of 1, 2, 4, 8 or 16 tokens, in a model of this hidden size."""
    tiles = TILES | (LARGE if size >= 4096 else SMALL if size < 1536 else {})
    if tokens == 1:
        return tiles
    if tokens > 2:
        return tiles | FOUR | (SIXTEEN if tokens > 8 else EIGHT if tokens > 4 else {})
    found = {}
    for name, tile in tiles.items():
        found[name] = tile if name in ONE_BY_ONE else {key: TWO.get(key, value) for key, value in tile.items()}
    return found | {"down": {"PROGRAMS": 1024, "TILE": 32, "BLOCK": 64, "num_warps": 4}}
