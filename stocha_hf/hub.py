"""The Hub: fetching a source, and publishing a checkpoint folder as one atomic commit.

Why this way: `create_commit` with every file in one list is atomic, uploads only blobs that the Hub lacks, and makes
no commit where nothing changed, so running again after an interruption does the rest. The commit names the parent it
was made on, and when its reply is lost the repo is asked whether the commit landed. A card cannot hold the hash of the
commit that holds the card, so its snippet pins a tag that is derived from the files' contents and set right after the
commit.

    stocha-publish FOLDER user/repo --private
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from stocha_hf.checkpoints import inspection
from stocha_hf.checkpoints.inspection import CARD, CONFIG
from stocha_hf.errors import StochaError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

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
            return inspection.read_json(Path(hf_hub_download(repo, name, revision=sha)), "a JSON object")

        if CONFIG not in names:
            raise StochaError(
                f"{repo} has no {CONFIG}: expected a transformers checkpoint, or the path of a .gguf file"
            )
        inspection.check_config(read(CONFIG), repo)
        weights = inspection.weight_files(names, lambda: read(inspection.INDEX), repo)
        wanted = [CONFIG, *({CARD} & set(names)), *weights, *inspection.companion_files(names)]
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
