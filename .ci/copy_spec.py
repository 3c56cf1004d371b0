"""Copy the marked parts of modules without torch into the files that ship with checkpoints and have to work alone.

python .ci/copy_spec.py           # writes the copies
python .ci/copy_spec.py --check   # exits 1 where a copy differs
"""

import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "stocha_hf"
COPIES = {"spec.py": "modeling_stocha.py", "quantization.py": "quantization_stocha.py"}
PART = re.compile(r"(?<=from here ---\n)(.*?)(?=# --- to here ---)", re.DOTALL)


def main() -> None:
    """Write the copies, or with --check say whether they are current."""
    for source, target in COPIES.items():
        part = PART.search((PACKAGE / source).read_text(encoding="utf-8"))
        before = (PACKAGE / target).read_text(encoding="utf-8")
        if part is None:
            sys.exit(f"stocha_hf/{source} has no marked part")
        after = PART.sub(lambda _, text=part[1]: text, before)
        if "--check" in sys.argv[1:] and before != after:
            sys.exit(f"stocha_hf/{target} holds an old copy of {source}: run make style")
        (PACKAGE / target).write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
