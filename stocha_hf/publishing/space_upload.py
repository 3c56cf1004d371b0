"""A Space that shows a published model: the page of space/app.py, with this package beside it.

A Space's folder is on its Python path, so the package's own files are sent along, and what runs there is the version
that published the model. The Space names the model by its tag.

    publish_space("user/smollm2-relu-demo", "user/smollm2-relu", "stocha-0123456789ab").url
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stocha_hf.hub import check_login, hub_errors

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

PACKAGE = Path(__file__).parents[1]
FILES = Path(__file__).with_name("space")
SENT = (".py", ".cpp", ".h", ".md", ".yaml", ".txt", ".typed")
GRADIO = "6.31.0"  # that the page was tested with
APP = '''"""Shows {model}. The page is stocha_hf/publishing/space/app.py."""

import os

os.environ.setdefault("MODEL", "{model}")
os.environ.setdefault("REVISION", "{revision}")

from stocha_hf.publishing.space.app import main  # noqa: E402

main()
'''


def publish_space(space: str, model: str, revision: str, *, private: bool = False) -> str:
    """Make the Space, or renew it, in one commit; returns its address.

    Args:
        space: The Space's repo id.
        model: The model that it shows, a repo id on the Hub.
        revision: A tag or commit of it.
        private: Make a new Space private; an existing one stays as it is.

    Raises:
        StochaError: For what the Hub refuses.
    """
    api = check_login(space)
    with hub_errors("publishing to", space):
        space = api.create_repo(
            space, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True
        ).repo_id
        api.create_commit(
            space, list(_additions(model, revision)), repo_type="space", commit_message=f"Show {model} at {revision}"
        )
    return f"{api.endpoint}/spaces/{space}"


def _additions(model: str, revision: str) -> Iterator[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    told = {"TITLE": f"Neurons of {model.rpartition('/')[2]}", "SDK_VERSION": GRADIO, "MODEL_ID": model}
    readme = (FILES / "README.md").read_text(encoding="utf-8")
    for name, value in told.items():
        readme = readme.replace(name, value)
    yield CommitOperationAdd("README.md", readme.encode())
    yield CommitOperationAdd("app.py", APP.format(model=model, revision=revision).encode())
    for name in ("requirements.txt", "packages.txt"):
        yield CommitOperationAdd(name, str(FILES / name))
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and path.suffix in SENT:
            yield CommitOperationAdd(f"stocha_hf/{path.relative_to(PACKAGE).as_posix()}", str(path))
