"""Which errors become a sentence on the Hub, and which keep their own truth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from stocha_hf import hub
from stocha_hf.errors import StochaError

HTTP_ERROR: Any = errors.HfHubHTTPError.__bases__[0]


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """What leaves hub_errors."""
    with pytest.raises((type(error), StochaError)) as caught, hub.hub_errors("reading", "org/model"):
        raise error from cause
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        OSError(28, "No space left on device"),
        FileNotFoundError("./nope"),
        ValueError("expected one threshold per layer"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        KeyError("added_tokens"),
        MemoryError(),
    ],
)
def test_errors_of_other_origin_pass_through(error):
    assert raised(error) is error
    assert raised(error, ValueError("of no Hub")) is error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (errors.LocalTokenNotFoundError("none"), "there is no token"),
        (errors.LocalEntryNotFoundError("none"), "the Hub cannot be reached"),
        (errors.HFValidationError("id"), "not a valid Hub id"),
        (errors.FileMetadataError("no etag"), "FileMetadataError; run the command again"),
        (HTTP_ERROR("hf_secret at https://signed"), "the Hub cannot be reached; check the network"),
    ],
)
def test_the_hubs_own_errors_become_a_sentence_and_stay_the_cause(error, words):
    found = raised(error)
    assert isinstance(found, StochaError) and found.__cause__ is error
    assert str(found).startswith("reading org/model failed: ") and words in str(found)
    assert "secret" not in str(found) and "signed" not in str(found)


def test_a_name_in_a_folder_that_exists_is_told_as_a_path_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    found = raised(errors.OfflineModeIsEnabled("offline"))
    assert str(found).startswith("the folder org/model does not exist, and reading it from the Hub failed: HF_HUB")


def test_what_the_hubs_errors_caused_is_told_by_its_cause():
    broken = raised(RuntimeError("Error while uploading 'x' to the Hub."), HTTP_ERROR("reset"))
    assert "the transfer broke off; run the command again" in str(broken)
    card = raised(ValueError("Invalid metadata in README.md. license is wrong"), HTTP_ERROR("400"))
    assert "Invalid metadata in README.md. license is wrong" in str(card)
    nested = raised(OSError("cannot load"), errors.OfflineModeIsEnabled("offline"))
    assert "HF_HUB_OFFLINE is set" in str(nested)


def test_a_cache_that_cannot_be_written_is_told_as_that(monkeypatch):
    info = SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename="config.json")])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: info)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(StochaError, match=r"cannot write the Hub's cache .*\(No space left on device\): free space"):
        hub.fetch("org/model", None)


@pytest.mark.parametrize(
    ("repo", "revision"), [("org/x\n#", None), ("../x", None), ("org/x", "a b"), ("org/x", "-x`")]
)
def test_names_that_cannot_be_are_refused_before_the_hub_is_asked(monkeypatch, repo, revision):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(StochaError, match=r"not a valid Hub id|expected a branch"):
        hub.fetch(repo, revision)
