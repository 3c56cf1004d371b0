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

from stocha_hf.checkpoints import inspection, names
from stocha_hf.checkpoints.companions import companion_files
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
    """Turn what the Hub or HTTP raised into a StochaError of one sentence, which holds no token.

    Wrap a request to the Hub in it, and nothing else. An error counts as the Hub's if it or what caused it is of the
    Hub client's or the HTTP library's own types; any other passes through. Exceptions of the HTTP library are shown by
    kind only, since their text may hold headers or signed addresses.
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
        (errors.HFValidationError, "it is not a valid Hub id; expected one such as org/name"),
        (errors.HfHubHTTPError, "{answer}"),
        (http_error, "the Hub cannot be reached; check the network and HF_ENDPOINT, then run the command again"),
    ]
    try:
        yield
    except StochaError:
        raise
    except Exception as error:
        own = _own(error, tuple(kind for kind, _ in sentences))
        if own is None:
            raise
        reason = next((text for kind, text in sentences if isinstance(own, kind)), "{kind}; run the command again")
        reason = reason.format(answer=_answer(own), kind=type(own).__name__)
        if isinstance(error, RuntimeError) and own is not error:  # how the client tells of an upload that failed
            reason = "the transfer broke off; run the command again, which does only what is missing"
        elif isinstance(error, ValueError) and own is not error:  # of a card that the Hub does not accept
            reason = shorten(str(error), 400)
        raise StochaError(f"{_attempt(doing, repo)} failed: {reason}") from error


def _attempt(doing: str, repo: str) -> str:
    """What failed; a name in a folder that exists here is more likely a mistyped path than a Hub id."""
    if doing == "reading" and "/" in repo and Path(repo).parent.is_dir():
        return f"the folder {repo} does not exist, and {doing} it from the Hub"
    return f"{doing} {repo}"


def _own(error: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The error, or the first of its causes, that is of these kinds or another of the Hub client's own."""
    seen: BaseException | None = error
    while seen is not None and not (isinstance(seen, kinds) or type(seen).__module__ == "huggingface_hub.errors"):
        seen = seen.__cause__
    return seen


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
    from huggingface_hub.utils import are_progress_bars_disabled, tqdm

    from stocha_hf.progress import Progress

    names.check_hub_id(repo, "the source")
    if revision is not None:
        names.check_revision(revision, "--revision")
    with hub_errors("reading", repo):
        info = HfApi().model_info(repo, revision=revision)
    sha = str(info.sha)
    present = [sibling.rfilename for sibling in info.siblings or []]

    def read(name: str) -> dict[str, Any]:
        with hub_errors("reading", repo), _cache_errors():
            path = Path(hf_hub_download(repo, name, revision=sha))
        return inspection.read_json(path, "a JSON object")

    if CONFIG not in present:
        raise StochaError(f"{repo} has no {CONFIG}: expected a transformers checkpoint, or the path of a .gguf file")
    inspection.check_config(read(CONFIG), repo)
    weights = inspection.weight_files(present, lambda: read(inspection.INDEX), repo)
    wanted = [CONFIG, *({CARD} & set(present)), *weights, *companion_files(present)]
    with hub_errors("reading", repo), _cache_errors():
        bar: Any = tqdm if are_progress_bars_disabled() else Progress  # less than the type that the client names
        folder = Path(snapshot_download(repo, revision=sha, allow_patterns=wanted, tqdm_class=bar))
    # Where the list of files cannot be had, the client returns what the cache holds, whole or not.
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise StochaError(f"reading {repo} failed: {missing[0]} did not arrive; run the command again")
    return folder, sha


@contextmanager
def _cache_errors() -> Iterator[None]:
    """One sentence where the Hub's cache cannot be written; what the Hub or HTTP raise passes through."""
    from huggingface_hub import constants, errors

    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, errors.HfHubHTTPError | errors.EntryNotFoundError):
            raise
        raise StochaError(
            f"cannot write the Hub's cache {constants.HF_HUB_CACHE} ({error.strerror}): free space or set HF_HOME"
        ) from error


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
