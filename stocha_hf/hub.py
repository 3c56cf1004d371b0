"""The Hub: fetching a source, and publishing a checkpoint folder as one atomic commit.

Why this way: `create_commit` with every file in one list is atomic, uploads only blobs that the Hub lacks, and makes
no commit where nothing changed, so running again after an interruption does the rest. The commit names the parent it
was made on, and when its reply is lost the repo is asked whether the commit landed. A card cannot hold the hash of the
commit that holds the card, so its snippet pins a tag that is derived from the files' contents and set right after the
commit.

    stocha-publish FOLDER user/repo --private
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from stocha_hf import checkpoint, report
from stocha_hf.checkpoint import CARD, CONFIG
from stocha_hf.config import MODELING_FILE, StochaConfig
from stocha_hf.errors import StochaError
from stocha_hf.measured import FOLDER as MEASUREMENTS

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

# What transformers would load: a stale single file wins over new shards, stale shards only fill the repo.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_HINTS = {
    400: "correct what it names",
    401: "log in with `hf auth login` or set HF_TOKEN to a valid token",
    403: "use a token with write access",
    404: "check the id and HF_ENDPOINT",
    409: "another upload is under way; run the command again",
    412: "the repo changed meanwhile; run the command again",
}


@contextmanager
def hub_errors(doing: str, repo: str) -> Iterator[None]:
    """Turn the Hub client's exceptions into a StochaError of one sentence, which holds no token.

    Exceptions of the HTTP library are shown by kind only, since their text may hold headers or signed addresses.
    """
    from huggingface_hub import errors

    http_error = errors.HfHubHTTPError.__bases__[0]  # the root of whichever HTTP library the client uses
    sentences: list[tuple[type[BaseException], str]] = [  # subclasses before their bases
        (errors.GatedRepoError, "it is gated; ask for access on its page, then run `hf auth login`"),
        (
            errors.RepositoryNotFoundError,
            "there is no such repo, or it is private; check the id, or run `hf auth login`",
        ),
        (errors.RevisionNotFoundError, "it has no such revision; expected one of its branches, tags or commit hashes"),
        (errors.LocalTokenNotFoundError, "there is no token; run `hf auth login` or set HF_TOKEN"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it, or give a local folder"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached; check the network and HF_ENDPOINT"),
        (errors.EntryNotFoundError, "a file is missing; expected a transformers checkpoint"),
        (errors.HFValidationError, "it is no valid Hub id; expected one such as org/name"),
        (errors.HfHubHTTPError, "{answer}"),
        (http_error, "the Hub cannot be reached; check the network and HF_ENDPOINT, then run the command again"),
        (RuntimeError, "the transfer broke off; run the command again, which does only what is missing"),
        (OSError, "{text}; check the disk and the network, then run the command again"),
        (ValueError, "{text}; correct README.md if it is named here, else check HF_ENDPOINT and HF_TOKEN"),
    ]
    try:
        yield
    except StochaError:
        raise
    except tuple(kind for kind, _ in sentences) as error:
        sentence = next(text for kind, text in sentences if isinstance(error, kind))
        reason = sentence.format(answer=_answer(error), text=shorten(str(error), 400))
        raise StochaError(f"{doing} {repo} failed: {reason}") from None


def _answer(error: BaseException) -> str:
    """What the Hub answered: status, its own words if any, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    words = shorten(str(getattr(error, "server_message", None) or ""), 200)
    said = f" ({words.rstrip('.')})" if words else ""
    return f"the Hub answered {status}{said}; {_HINTS.get(status, 'run the command again later')}"


def fetch(repo: str, revision: str | None) -> tuple[Path, str]:
    """Download what a conversion needs of a Hub repo; returns its folder in the cache and the commit hash.

    Config and index are checked before the first weight is downloaded. Raises StochaError.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    with hub_errors("reading", repo):
        info = HfApi().model_info(repo, revision=revision)
        sha = str(info.sha)
        names = [sibling.rfilename for sibling in info.siblings or []]

        def read(name: str) -> dict[str, Any]:
            return checkpoint.read_json(Path(hf_hub_download(repo, name, revision=sha)), "a JSON object")

        if CONFIG not in names:
            raise StochaError(
                f"{repo} has no {CONFIG}: expected a transformers checkpoint, or the path of a .gguf file"
            )
        checkpoint.check_config(read(CONFIG), repo)
        weights = checkpoint.weight_files(names, lambda: read(checkpoint.INDEX), repo)
        wanted = [CONFIG, *({CARD} & set(names)), *weights, *checkpoint.companion_files(names)]
        folder = Path(snapshot_download(repo, revision=sha, allow_patterns=wanted))
    # Where the list of files cannot be had, the client returns what the cache holds, whole or not.
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise StochaError(f"reading {repo} failed: {missing[0]} did not arrive; run the command again")
    return folder, sha


def check_login(repo: str) -> HfApi:
    """The Hub client, after checking that `repo` is a valid id and that the Hub accepts the user's token.

    Raises StochaError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    api = HfApi()
    with hub_errors("publishing to", repo):
        validate_repo_id(repo)
        api.whoami()
    return api


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
    config = report.stocha_config(folder)
    row = checkpoint.check_config(config, str(folder))
    try:
        StochaConfig.from_dict(config["stocha"]).resolve(row.act)
    except ValueError as error:
        raise StochaError(f"{folder / CONFIG} cannot be published: {error}") from None
    names = checkpoint.list_files(folder)
    weights = checkpoint.weight_files(
        names, lambda: checkpoint.read_json(folder / checkpoint.INDEX, "an index"), str(folder)
    )
    checkpoint.check_weights(folder, weights, config)
    report.check_card(folder)
    measurements = sorted(name for name in names if Path(name).match(f"{MEASUREMENTS}/*"))
    return [CONFIG, *weights, *checkpoint.companion_files(names), *measurements]


def _additions(folder: Path, files: list[str], repo: str) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(name, str(folder / name)) for name in files]
    own = folder / MODELING_FILE.name  # absent where the native class saved the folder
    additions.append(CommitOperationAdd(own.name, str(own if own.exists() else MODELING_FILE)))
    card = report.published_card(folder, repo, _tag(additions))
    return [*additions, CommitOperationAdd(CARD, card.encode())]


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
