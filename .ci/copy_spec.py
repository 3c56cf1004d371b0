"""Copy the marked parts of modules without torch into the files that ship with checkpoints and have to work alone.

python .ci/copy_spec.py           # writes the copies
python .ci/copy_spec.py --check   # exits 1 where a copy differs
"""

import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "stocha_hf"
SOURCES = ("spec.py", "quantization.py")
MARKED = re.compile(r"# --- copied into (\S+) from here ---\n(.*?)(?=# --- to here ---)", re.DOTALL)


def main() -> None:
    """Write the copies, or with --check say whether they are current."""
    for source in SOURCES:
        copy = re.compile(rf"(?<=# --- stocha_hf/{source}, from here ---\n).*?(?=# --- to here ---)", re.DOTALL)
        for target, part in MARKED.findall((PACKAGE / source).read_text(encoding="utf-8")):
            before = (PACKAGE / target).read_text(encoding="utf-8")
            after, copies = copy.subn(lambda _, text=part: text, before)
            if copies != 1:
                sys.exit(f"stocha_hf/{target} has no marked place for its part of {source}")
            if "--check" in sys.argv[1:] and before != after:
                sys.exit(f"stocha_hf/{target} holds an old copy of {source}: run make style")
            (PACKAGE / target).write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
