"""Copy the marked parts of modules without torch into the files that ship with checkpoints and have to work alone.

python .ci/copy_spec.py           # writes the copies
python .ci/copy_spec.py --check   # exits 1 where a copy differs, or a marker is missing
"""

import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "stocha_hf"
PARTS = (
    ("rules.py", "modeling_stocha.py"),
    ("spec.py", "modeling_stocha.py"),
    ("cuts.py", "cuts_stocha.py"),
    ("quantization.py", "quantization_stocha.py"),
)


def main() -> None:
    """Write the copies, or with --check say whether they are current."""
    for source, target in PARTS:
        text = (PACKAGE / target).read_text(encoding="utf-8")
        part = marked(source, f"# --- copied into {target} from here ---\n").group()
        copy = marked(target, f"# --- stocha_hf/{source}, from here ---\n")
        if "--check" in sys.argv[1:] and copy.group() != part:
            sys.exit(f"stocha_hf/{target} holds an old copy of {source}: run make style")
        (PACKAGE / target).write_text(text[: copy.start()] + part + text[copy.end() :], encoding="utf-8")


def marked(name: str, marker: str) -> re.Match[str]:
    """Return the part of a file between this marker and the next end."""
    text = (PACKAGE / name).read_text(encoding="utf-8")
    found = [*re.finditer(rf"(?<={re.escape(marker)}).*?(?=# --- to here ---)", text, re.DOTALL)]
    if len(found) != 1:
        sys.exit(f"stocha_hf/{name} has {len(found)} parts that begin with {marker.strip()!r}: expected one")
    return found[0]


if __name__ == "__main__":
    main()
