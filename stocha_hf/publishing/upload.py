"""Publishing a stocha checkpoint folder: one atomic commit, and a tag that names its contents.

publish("smollm2-relu", "user/smollm2-relu", private=True)
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocha_hf.checkpoints import inspection
from stocha_hf.checkpoints.inspection import CARD, CONFIG
from stocha_hf.errors import StochaError
from stocha_hf.hub import check_login, hub_errors
from stocha_hf.publishing import card
from stocha_hf.publishing.measurements import FOLDER as MEASUREMENTS
from stocha_hf.spec import MODELING_FILE, StochaConfig

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

# What transformers would load: a stale single file wins over new shards, stale shards only fill the repo.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def publish(folder: str | Path, repo: str, *, private: bool = False) -> dict[str, Any]:
    """Publish a stocha checkpoint folder to a Hub repo, which is made if it does not exist, in one commit.

    `private` concerns a new repo only. Stale weight files of an earlier publication are removed in the same commit.
    Returns repo, url, commit (hash), tag and files; the same contents always have the same tag. Raises StochaError,
    before anything is uploaded if the folder is no whole stocha checkpoint.
    """
    from huggingface_hub import CommitOperationDelete

    folder = Path(folder)
    files = _publishable(folder)
    api = check_login(repo)
    with hub_errors("publishing to", repo):
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        head = api.model_info(repo)
        additions = _additions(folder, files, repo)
        stale = {sibling.rfilename for sibling in head.siblings or []} - {item.path_in_repo for item in additions}
        deletions = [CommitOperationDelete(name) for name in sorted(stale) if _WEIGHTS.fullmatch(name)]
        tag = _tag(additions)
        commit = _commit_once(api, repo, [*additions, *deletions], str(head.sha), f"Publish {tag}")
        api.create_tag(repo, tag=tag, revision=commit, exist_ok=True)
    url = f"{api.endpoint}/{repo}"
    return {"repo": repo, "url": url, "commit": commit, "tag": tag, "files": [item.path_in_repo for item in additions]}


def _publishable(folder: Path) -> list[str]:
    """The names of a stocha checkpoint's files, after checking that they are whole."""
    config = card.stocha_config(folder)
    row = inspection.check_config(config, str(folder))
    try:
        StochaConfig.from_dict(config["stocha"]).resolve(row.act)
    except ValueError as error:
        raise StochaError(f"{folder / CONFIG} cannot be published: {error}") from None
    names = inspection.list_files(folder)
    weights = inspection.weight_files(
        names, lambda: inspection.read_json(folder / inspection.INDEX, "an index"), str(folder)
    )
    inspection.check_weights(folder, weights, config)
    card.check_card(folder)
    measurements = sorted(name for name in names if Path(name).match(f"{MEASUREMENTS}/*"))
    return [CONFIG, *weights, *inspection.companion_files(names), *measurements]


def _additions(folder: Path, files: list[str], repo: str) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(name, str(folder / name)) for name in files]
    own = folder / MODELING_FILE.name  # absent where the native class saved the folder
    additions.append(CommitOperationAdd(own.name, str(own if own.exists() else MODELING_FILE)))
    text = card.published_card(folder, repo, _tag(additions))
    return [*additions, CommitOperationAdd(CARD, text.encode())]


def _tag(additions: list[CommitOperationAdd]) -> str:
    """A name for the contents: every file but the card, whose snippet holds this very name."""
    lines = sorted(
        f"{item.path_in_repo} {item.upload_info.sha256.hex()}" for item in additions if item.path_in_repo != CARD
    )
    return f"stocha-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:12]}"


def _commit_once(api: HfApi, repo: str, operations: list[Any], parent: str, message: str) -> str:
    """Make the commit and return its hash; where its reply is lost, the repo is asked whether it landed."""
    try:
        return str(api.create_commit(repo, operations, commit_message=message, parent_commit=parent).oid)
    except Exception:
        head = api.list_repo_commits(repo)[0]
        if head.commit_id != parent and head.title == message:
            return head.commit_id
        raise
