"""Copy the marked part of stocha_hf/spec.py into stocha_hf/modeling_stocha.py, which has to work alone.

python .ci/copy_spec.py           # writes the copy
python .ci/copy_spec.py --check   # exits 1 where the copy differs
"""

import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "stocha_hf"
PART = re.compile(r"(?<=from here ---\n)(.*?)(?=# --- to here ---)", re.DOTALL)


def main() -> None:
    """Write the copy, or with --check say whether it is current."""
    spec = PART.search((PACKAGE / "spec.py").read_text(encoding="utf-8"))
    target = PACKAGE / "modeling_stocha.py"
    before = target.read_text(encoding="utf-8")
    if spec is None:
        sys.exit("stocha_hf/spec.py has no marked part")
    after = PART.sub(lambda _: spec[1], before)
    if "--check" in sys.argv[1:]:
        sys.exit("stocha_hf/modeling_stocha.py holds an old copy of spec.py: run make style" if before != after else 0)
    target.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
