"""Publishing a stocha checkpoint folder: one atomic commit, and a tag that names its contents.

Only the weights, the files on the fixed list of checkpoints/companions.py and the measurements are sent; links are
followed within the folder only, and the modeling file is ours.

    stocha_hf.publish("smollm2-relu", "user/smollm2-relu", private=True).url
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocha_hf.checkpoints import inspection
from stocha_hf.checkpoints.companions import TOKENIZER_CONFIG, check_links, companion_files, dump, without_code
from stocha_hf.checkpoints.entry import code_keys, read_entry, with_keys
from stocha_hf.checkpoints.inspection import CARD, CONFIG, INDEX
from stocha_hf.checkpoints.modeling_file import CODE_FILES, MLX_FILE, code_files, is_ours, version_of
from stocha_hf.checkpoints.paths import local_path
from stocha_hf.errors import StochaError
from stocha_hf.hub import check_login, hub_errors
from stocha_hf.publishing import card
from stocha_hf.publishing.measurements import FOLDER as MEASUREMENTS
from stocha_hf.publishing.space_upload import publish_space
from stocha_hf.spec import class_names

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

# What transformers would load: a stale single file wins over new shards, stale shards only fill the repo.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_MEASUREMENT = re.compile(rf"{MEASUREMENTS}/[a-z0-9][\w-]*\.(json|png)")


@dataclass(frozen=True)
class Published:
    """Where a folder was published: repo, its address, the commit's hash, the tag of its contents, the files sent.

    `space` is the address of the Space that shows it, if one was asked for.
    """

    repo: str
    url: str
    commit: str
    tag: str
    files: list[str]
    space: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as the command's --json prints them."""
        return asdict(self)


def publish(folder: str | Path, repo: str, *, private: bool = False, space: str | None = None) -> Published:
    """Publish a stocha checkpoint folder to a Hub repo in one commit, and tag it.

    Stale weight files of an earlier publication are removed in the same commit. A modeling_stocha.py that no release
    of this package wrote is left where it is, with a warning, and the package's own is published.

    Args:
        folder: a folder that stocha-convert or a training run wrote.
        repo: the Hub repo, which is made if it does not exist.
        private: make a new repo private; an existing one stays as it is.
        space: a Space to make or renew, which shows what the model's neurons do.

    Returns:
        Where it was published. The same contents always have the same tag.

    Raises:
        StochaError: before anything is uploaded if the folder is not a whole stocha checkpoint, and for what the Hub
            refuses.
    """
    from huggingface_hub import CommitOperationDelete

    folder = local_path(folder)
    files = _publishable(folder)
    api = check_login(repo)
    with hub_errors("publishing to", repo):
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        head = api.model_info(repo)
    additions = _additions(folder, files, repo)
    stale = {sibling.rfilename for sibling in head.siblings or []} - {item.path_in_repo for item in additions}
    deletions = [CommitOperationDelete(name) for name in sorted(stale) if _WEIGHTS.fullmatch(name)]
    tag = _tag(additions)
    with hub_errors("publishing to", repo), _reading(folder):
        commit = _commit_once(api, repo, [*additions, *deletions], str(head.sha), f"Publish {tag}")
        api.create_tag(repo, tag=tag, revision=commit, exist_ok=True)
    shown = publish_space(space, repo, tag, private=private) if space is not None else None
    return Published(repo, f"{api.endpoint}/{repo}", commit, tag, [item.path_in_repo for item in additions], shown)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """One sentence where a file that was checked cannot be read any more; the Hub's errors pass through."""
    try:
        yield
    except OSError as error:
        if not error.filename:
            raise
        raise StochaError(
            f"cannot read {error.filename} ({error.strerror}): expected {folder} to stay as it is meanwhile"
        ) from error


def _publishable(folder: Path) -> list[str]:
    """The names of a stocha checkpoint's files, after checking that they are whole."""
    names = inspection.list_files(folder)
    code = {file.name for file in CODE_FILES}
    check_links(folder, ({CONFIG, INDEX, CARD} | code) & set(names))
    config = card.stocha_config(folder)
    inspection.check_config(config, str(folder))
    read_entry(config, str(folder))
    weights = inspection.weight_files(names, lambda: inspection.read_json(folder / INDEX, "an index"), str(folder))
    found = [
        CONFIG,
        *weights,
        *companion_files(names),
        *sorted(name for name in names if _MEASUREMENT.fullmatch(name)),
    ]
    check_links(folder, found)
    inspection.check_weights(folder, weights, config)
    card.check_card(folder)
    return found


def _additions(folder: Path, files: list[str], repo: str) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(name, _content(folder, name, files)) for name in files]
    code = _code(folder, _config(folder))
    for file in (folder / file.name for file in code):
        if file.exists() and not (file.is_file() and is_ours(file)):
            warnings.warn(
                f"{file} is not a file that stocha_hf wrote, so the package's own {file.name} is published in its "
                "place; the folder's stays as it is",
                stacklevel=3,
            )
    additions += [CommitOperationAdd(file.name, str(file)) for file in code]
    text = card.published_card(folder, repo, _tag(additions))
    return [*additions, CommitOperationAdd(CARD, text.encode())]


def _content(folder: Path, name: str, files: list[str]) -> str | bytes:
    """What is sent of a file: the file as it is, but no name of code in a config that could be given one."""
    if name == CONFIG:
        config = _config(folder)
        return str(folder / name) if config == inspection.read_config(folder) else dump(config).encode()
    if name == TOKENIZER_CONFIG:
        settings = inspection.read_json(folder / name, "a tokenizer's settings")
        cleaned = without_code(folder, files, settings)
        return str(folder / name) if cleaned == settings else dump(cleaned).encode()
    return str(folder / name)


def _config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, with what it should say of code and classes."""
    config = inspection.read_config(folder)
    code = code_keys(config["model_type"], config, read_entry(config, str(folder)))
    if version_of(_code(folder, config)[0]) == "0.1.0":
        del code["auto_map"]["AutoConfig"]  # its modeling file has no such class
        code["architectures"] = class_names(code["architectures"], common=True)  # which its classes would not find
    return with_keys(config, code)


def _code(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The code files to send, the modeling file first.

    Those that import one another are the folder's own if one version of the package wrote them all, else the
    package's: a native class saves none.
    """
    ours = code_files(config)
    linked = [folder / file.name for file in ours if file != MLX_FILE]
    versions = {version_of(file) if file.is_file() else None for file in linked}
    return ours if None in versions or len(versions) > 1 else [*linked, *(file for file in ours if file == MLX_FILE)]


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
