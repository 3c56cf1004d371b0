"""The Hub, from end to end: the real commands and the real client against a loopback Hub, over HTTP.

The client reads its settings when it is imported. So one Hub serves all tests, emptied before each, and the commands
are forks of one process that has imported the client for it; what needs other settings is a fresh process.

Why this way: what matters (one commit, resumed uploads, lost replies, which refusal becomes which sentence) is settled
between the client and the wire. After each test no output, no file and no upload may hold the token: `hub_run` checks.

    python -m pytest tests/test_hub.py
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import BIN, Warm, assert_refused, run_command, run_python
from helpers.loopback_hub import LoopbackHub

from stocha_hf.conversion.convert import convert
from stocha_hf.spec import MODELING_FILE

pytestmark = pytest.mark.slow  # every test starts processes
Done = subprocess.CompletedProcess[str]
WRONG_TOKEN = "hf_of_somebody_else"
STRAYS = ("optimizer.pt", "pytorch_model.bin", "notes.txt", "checkpoint-10/model.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub") / "hf-home"


@pytest.fixture(scope="module")
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def warm(server: LoopbackHub, home: Path) -> Iterator[Warm]:
    warm = Warm("huggingface_hub.hf_api", env=server.env(home))
    yield warm
    warm.close()


@pytest.fixture
def hub(server: LoopbackHub) -> LoopbackHub:
    server.reset()
    return server


@pytest.fixture
def hub_run(hub: LoopbackHub, warm: Warm, home: Path, tmp_path: Path) -> Iterator[Callable[..., Done]]:
    """hub_run(command or code, *arguments, token=..., **settings): a process whose Hub is the loopback one."""
    outputs: list[str] = []
    shutil.rmtree(home, ignore_errors=True)

    def run(what: str, *args: object, token: str | None = "", **settings: str) -> Done:
        env, command = hub.env(home, token) | settings, what.startswith("stocha-")
        if settings:
            done = (run_command if command else run_python)(what, *args, env=env)
        else:
            name = what.removeprefix("stocha-")
            done = warm.run(f"from stocha_hf.cli.{name} import main; main()" if command else what, *args, env=env)
        outputs.append(done.stdout + done.stderr)
        return done

    yield run
    kept = [path.read_bytes() for folder in (tmp_path, home) for path in folder.rglob("*") if path.is_file()]
    kept += [data for repo in hub.repos.values() for data in repo.blobs.values()]
    for token in (hub.token, WRONG_TOKEN):
        assert not any(token in output for output in outputs)
        assert not any(token.encode() in data for data in kept)


def succeeded(done: Done) -> Any:
    """The JSON that a command printed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def upload(source: Path) -> dict[str, bytes]:
    """A folder's files, for LoopbackHub.add_repo."""
    return {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()}


def put_aside(folder: Path) -> None:
    """Files that belong to no checkpoint."""
    for name in STRAYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for the Hub")


def paths(hub: LoopbackHub, *methods: str) -> list[str]:
    return [path for method, path in hub.requests if method in methods]


def snippet(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


# Publishing.


def test_one_commit_holds_the_whole_checkpoint_and_nothing_else(checkpoint, hub, hub_run, tmp_path):
    convert(checkpoint(max_shard_size="20KB"), tmp_path / "stocha")
    put_aside(tmp_path / "stocha")
    before = upload(tmp_path / "stocha")
    done = succeeded(hub_run("stocha-publish", tmp_path / "stocha", "user/model", "--private", "--json"))

    initial = hub.commits("user/model")[1:]
    assert len(initial) == 1 and hub.commits("user/model")[0] == done["commit"]
    assert hub.repos["user/model"].private and hub.tags("user/model") == {done["tag"]: done["commit"]}
    published = hub.files("user/model")
    assert set(published) == {".gitattributes", *done["files"]} == {".gitattributes", *before} - set(STRAYS)
    assert {name.split("-0")[0] for name in done["files"]} == {
        "model", "model.safetensors.index.json", "config.json", "generation_config.json", "modeling_stocha.py",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "README.md",
    }  # fmt: skip
    assert all(published[name] == before[name] for name in done["files"] if name != "README.md")
    assert published["modeling_stocha.py"] == MODELING_FILE.read_bytes()
    assert upload(tmp_path / "stocha") == before


def test_a_repo_without_namespace_is_the_users_own_and_named_in_full(checkpoint, hub, hub_run, tmp_path):
    convert(checkpoint(), tmp_path / "stocha")
    done = hub_run("stocha-publish", tmp_path / "stocha", "model")
    commit, tag = hub.commits("user/model")[0], next(iter(hub.tags("user/model")))
    assert done.stdout == f"{hub.url}/user/model at {tag} ({commit})\n"
    assert not hub.repos["user/model"].private
    assert '"user/model"' in snippet(hub.files("user/model")["README.md"].decode())


def test_publishing_an_unchanged_folder_again_makes_no_commit(checkpoint, hub, hub_run, tmp_path):
    convert(checkpoint(), tmp_path / "stocha")
    first, second = (succeeded(hub_run("stocha-publish", tmp_path / "stocha", "user/model", "--json")) for _ in "12")
    assert first == second
    assert len(hub.commits("user/model")) == 2 and len(hub.uploads) == 1


def test_a_space_shows_the_published_model_with_the_package_beside_it(checkpoint, hub, hub_run, tmp_path):
    convert(checkpoint(), tmp_path / "stocha")
    done = succeeded(hub_run("stocha-publish", tmp_path / "stocha", "user/model", "--space", "user/demo", "--json"))
    assert done["space"] == f"{hub.url}/spaces/user/demo"
    sent = hub.files("user/demo")
    assert '"MODEL", "user/model"' in sent["app.py"].decode() and done["tag"] in sent["app.py"].decode()
    compile(sent["app.py"], "app.py", "exec")
    metadata = yaml.safe_load(sent["README.md"].decode().split("---")[1])
    assert (metadata["sdk"], metadata["app_file"], metadata["models"]) == ("gradio", "app.py", ["user/model"])
    package = MODELING_FILE.parent
    code = {f"stocha_hf/{path.relative_to(package)}" for path in package.rglob("*.py")}
    assert code <= sent.keys() and sent["stocha_hf/modeling_stocha.py"] == MODELING_FILE.read_bytes()


def test_shards_of_an_earlier_publication_go_in_the_same_commit(checkpoint, hub, hub_run, tmp_path):
    """Left behind, an old model.safetensors would be loaded in place of the new shards."""
    own = {"models/model.safetensors": b"theirs", "model-fp8.safetensors": b"theirs", "figure.png": b"theirs"}
    hub.add_repo("user/model", own)
    single = convert(checkpoint(), tmp_path / "single").files
    sharded = convert(checkpoint(name="other", max_shard_size="20KB"), tmp_path / "sharded").files
    for number, (folder, files) in enumerate((("single", single), ("sharded", sharded), ("single", single)), 1):
        assert hub_run("stocha-publish", tmp_path / folder, "user/model").returncode == 0
        assert set(hub.files("user/model")) == {".gitattributes", *own, *files}
        assert len(hub.commits("user/model")) == 2 + number


def test_convert_publishes_what_it_wrote(checkpoint, hub, hub_run, tmp_path):
    done = succeeded(
        hub_run("stocha-convert", checkpoint(), tmp_path / "out", "--push-to-hub", "user/model", "--private", "--json")
    )
    assert done["published"]["repo"] == "user/model" and hub.repos["user/model"].private
    assert done["published"]["commit"] == hub.commits("user/model")[0]
    assert hub.files("user/model")["config.json"] == (tmp_path / "out" / "config.json").read_bytes()


def test_a_publication_that_fails_after_a_conversion_names_the_command_that_finishes_it(
    checkpoint, hub, hub_run, tmp_path
):
    out = tmp_path / "out"
    hub.fail_status["POST", "/commit/"] = (403, 1)
    done = hub_run("stocha-convert", checkpoint(), out, "--push-to-hub", "user/model", "--private")
    assert_refused(done, "403", f"stocha-publish {out} user/model --private")
    assert succeeded(hub_run("stocha-publish", out, "user/model", "--private", "--json"))["repo"] == "user/model"


# Interruptions.


def test_a_killed_upload_is_taken_up_where_it_ended(checkpoint, hub, hub_run, home, tmp_path):
    convert(checkpoint(max_shard_size="40KB"), tmp_path / "stocha")
    shards = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "stocha").glob("*.safetensors")}
    missing = min(shards)
    hub.fail_status["PUT", missing] = (503, 100)  # which the client tries again, with pauses that grow
    command = [BIN / "stocha-publish", tmp_path / "stocha", "user/model"]
    env = os.environ | hub.env(home)
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        give_up = time.monotonic() + 60
        while {oid for oid, _ in hub.uploads} != shards - {missing} and time.monotonic() < give_up:
            time.sleep(0.02)
        process.kill()
    assert len(shards) > 1 and {oid for oid, _ in hub.uploads} == shards - {missing}
    assert len(hub.commits("user/model")) == 1

    hub.fail_status.clear()
    hub.uploads.clear()
    hub.cut_uploads = [100]  # a connection that drops after 100 bytes: the client itself tries again
    done = succeeded(hub_run("stocha-publish", tmp_path / "stocha", "user/model", "--json"))
    assert [oid for oid, _ in hub.uploads] == [missing]
    assert hub.commits("user/model")[0] == done["commit"] and len(hub.commits("user/model")) == 2


KILLED = """
import os, signal, sys
from huggingface_hub import HfApi
from stocha_hf.publishing.upload import publish
folder, step = sys.argv[1:]
real = getattr(HfApi, step)

def killed(*args, **kwargs):
    real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(HfApi, step, killed)
publish(folder, "user/model")
"""


@pytest.mark.parametrize(("step", "commits"), [("create_repo", 1), ("create_commit", 2), ("create_tag", 2)])
def test_a_publication_that_was_killed_is_finished_by_the_next(checkpoint, hub, hub_run, tmp_path, step, commits):
    convert(checkpoint(), tmp_path / "stocha")
    before = upload(tmp_path / "stocha")
    assert hub_run(KILLED, tmp_path / "stocha", step).returncode == -signal.SIGKILL
    assert len(hub.commits("user/model")) == commits and upload(tmp_path / "stocha") == before
    done = succeeded(hub_run("stocha-publish", tmp_path / "stocha", "user/model", "--json"))
    assert len(hub.commits("user/model")) == 2 and len(hub.uploads) == 1
    assert hub.tags("user/model") == {done["tag"]: hub.commits("user/model")[0]}
    assert upload(tmp_path / "stocha") == before


def test_an_upload_that_fails_is_one_sentence_and_commits_nothing(checkpoint, hub, hub_run, tmp_path):
    convert(checkpoint(max_shard_size="40KB"), tmp_path / "stocha")
    hub.fail_status["PUT", "/lfs/"] = (403, 1)  # an upload link that has run out; the client does not try it again
    done = hub_run("stocha-publish", tmp_path / "stocha", "user/model")
    assert_refused(done, "user/model", "broke off", "run the command again")
    assert len(hub.commits("user/model")) == 1

    arrived = len(hub.uploads)
    assert hub_run("stocha-publish", tmp_path / "stocha", "user/model").returncode == 0
    oids = [oid for oid, _ in hub.uploads]
    assert arrived < len(oids) == len(set(oids)) and len(hub.commits("user/model")) == 2


def test_a_lost_reply_makes_no_second_commit(checkpoint, hub, hub_run, tmp_path):
    convert(checkpoint(), tmp_path / "stocha")
    hub.lose_commit_reply = 1
    first, second = (succeeded(hub_run("stocha-publish", tmp_path / "stocha", "user/model", "--json")) for _ in "12")
    assert first == second and hub.lose_commit_reply == 0
    assert len(hub.commits("user/model")) == 2 and len(hub.uploads) == 1
    assert hub.tags("user/model") == {first["tag"]: hub.commits("user/model")[0]}


def test_a_tag_that_could_not_be_set_is_set_by_the_next_run(checkpoint, hub, hub_run, tmp_path):
    convert(checkpoint(), tmp_path / "stocha")
    hub.fail_status["POST", "/tag/"] = (503, 1)
    assert_refused(hub_run("stocha-publish", tmp_path / "stocha", "user/model"), "503", "again")
    done = succeeded(hub_run("stocha-publish", tmp_path / "stocha", "user/model", "--json"))
    assert hub.tags("user/model") == {done["tag"]: hub.commits("user/model")[0]}
    assert len(hub.commits("user/model")) == 2


# Pulling.

PULL = """
import sys
import torch
from transformers import AutoModelForCausalLM
repo, revision, folder, card = sys.argv[1:]
ids = torch.arange(3, 19)[None]
local = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
remote = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
native = AutoModelForCausalLM.from_pretrained(repo, revision=revision)
print(type(remote).__name__, type(remote).__module__)
print(type(native).__name__, type(native).__module__)
with torch.no_grad():
    assert torch.equal(local(ids).logits, remote(ids).logits)
    assert torch.equal(local(ids).logits, native(ids).logits)
    with local.stocha_mode("relu"), remote.stocha_mode("relu"):
        assert torch.equal(local(ids).logits, remote(ids).logits)
        assert not torch.equal(native(ids).logits, remote(ids).logits)
exec(open(card).read())
"""


def test_a_pulled_checkpoint_is_the_published_one(checkpoint, hub, hub_run, tmp_path):
    """With remote code the stocha class, without the native one; the card's own snippet runs, too."""
    convert(checkpoint(), tmp_path / "stocha")
    done = succeeded(hub_run("stocha-publish", tmp_path / "stocha", "user/model", "--private", "--json"))
    (tmp_path / "snippet.py").write_text(snippet(hub.files("user/model")["README.md"].decode()))
    pulled = hub_run(PULL, "user/model", done["tag"], tmp_path / "stocha", tmp_path / "snippet.py")
    assert pulled.returncode == 0, pulled.stderr
    remote, native, generated = pulled.stdout.splitlines()
    assert remote.startswith("StochaLlamaForCausalLM transformers_modules.") and done["commit"] in remote
    assert native.startswith("LlamaForCausalLM transformers.models.llama.") and generated


REVISIONS = """
import sys
from transformers import AutoModelForCausalLM
for revision in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained("user/model", revision=revision, trust_remote_code=True)
    print(type(model).__name__, model.config.stocha["p"], model.model.layers[0].mlp.p)
"""


def test_an_older_revision_stays_what_it_was_by_tag_and_by_commit(checkpoint, hub, hub_run, tmp_path):
    source, output, published = checkpoint(), tmp_path / "stocha", []
    for p in ("0.25", "0.75"):
        assert hub_run("stocha-convert", source, output, "--p", p, "--overwrite").returncode == 0
        published.append(succeeded(hub_run("stocha-publish", output, "user/model", "--json")))
    revisions = [done[key] for done in published for key in ("tag", "commit")]
    assert len(set(revisions)) == 4
    loaded = hub_run(REVISIONS, *revisions)
    assert loaded.returncode == 0, loaded.stderr
    expected = [f"StochaLlamaForCausalLM {p} {p}" for p in (0.25, 0.25, 0.75, 0.75)]
    assert loaded.stdout.splitlines() == expected
    for done in published:
        code = snippet(hub.files("user/model", done["commit"])["README.md"].decode())
        assert code.count(f'"user/model", revision="{done["tag"]}"') == 2


# The card.

CARD = """
import json, sys
from huggingface_hub import ModelCard
print(json.dumps(ModelCard.load(sys.argv[1]).data.to_dict()))
"""


def test_the_card_states_source_revision_licence_and_languages(checkpoint, hub, hub_run, tmp_path):
    source = upload(checkpoint())
    source["README.md"] = b"---\nlicense: other\nlicense_name: tiny\nlanguage:\n- en\n- no\ntags: [x]\n---\n# Source"
    commit = hub.add_repo("org/source", source)
    done = hub_run("stocha-convert", "org/source", tmp_path / "out", "--push-to-hub", "user/model", "--json")
    tag = succeeded(done)["published"]["tag"]

    assert succeeded(hub_run(CARD, "user/model")) == {
        "base_model": "org/source",
        "language": ["en", "no"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "tiny",
        "pipeline_tag": "text-generation",
        "tags": ["stocha", "activation-sparsity", "llama"],
    }
    assert "/api/validate-yaml" in paths(hub, "POST")
    card = hub.files("user/model")["README.md"].decode()
    assert commit in card and card.count(tag) == 2 and "Licence of the source: tiny" in card
    assert not re.search(r"\$\w|REPO_ID|REVISION|None", card)


def test_a_card_that_was_edited_is_published_as_edited(checkpoint, hub, hub_run, tmp_path):
    card = tmp_path / "stocha" / "README.md"
    convert(checkpoint(), card.parent)
    card.write_text(card.read_text() + "\nOur own words.\n")
    first = succeeded(hub_run("stocha-publish", card.parent, "user/model", "--json"))
    published = hub.files("user/model")["README.md"].decode()
    assert published == card.read_text().replace("REPO_ID", "user/model").replace("REVISION", first["tag"])

    card.write_text("---\nlicense: [\n---\n")
    assert_refused(hub_run("stocha-publish", card.parent, "user/model"), "README.md", "metadata")
    card.unlink()  # as training with the native class leaves a folder
    (card.parent / "modeling_stocha.py").unlink()
    second = succeeded(hub_run("stocha-publish", card.parent, "user/model", "--json"))
    published = hub.files("user/model")["README.md"].decode()
    assert second["tag"] == first["tag"] and snippet(published).count(first["tag"]) == 2


# Converting from the Hub.


def test_convert_takes_any_revision_of_a_hub_model_and_states_its_commit(checkpoint, hub, hub_run, tmp_path):
    old = hub.add_repo("org/source", upload(checkpoint(name="old", rms_norm_eps=0.125)))
    new = hub.add_repo("org/source", upload(checkpoint(name="new", rms_norm_eps=0.25)))
    hub.repos["org/source"].point("heads", "draft/1", old)
    hub.repos["org/source"].point("tags", "v1", old)
    for revision, commit in ((None, new), (old, old), ("draft/1", old), ("v1", old)):
        chosen = [] if revision is None else ["--revision", revision]
        done = succeeded(hub_run("stocha-convert", "org/source", tmp_path / "out", *chosen, "--overwrite", "--json"))
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["stocha"]["source"] == done["source"] == {"id": "org/source", "revision": commit}
        assert config["rms_norm_eps"] == {old: 0.125, new: 0.25}[commit]


def test_convert_downloads_the_shards_and_neither_pickles_nor_strays(checkpoint, hub, hub_run, tmp_path):
    source = checkpoint(max_shard_size="20KB")
    put_aside(source)
    hub.add_repo("org/source", upload(source), private=True)
    done = succeeded(hub_run("stocha-convert", "org/source", tmp_path / "out", "--json"))
    shards = [path.name for path in source.glob("*.safetensors")]
    assert len(shards) > 2 and set(shards) < set(done["files"])
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in shards)
    assert not [path for path in paths(hub, "GET", "HEAD") if path.endswith(STRAYS)]


def test_a_download_that_stays_partial_is_refused(checkpoint, hub, hub_run, tmp_path):
    """Without a list of files the client may give what is in its cache: here config.json alone, read before."""
    hub.add_repo("org/source", upload(checkpoint()))
    hub.fail_status["GET", "/tree/"] = (403, 1)
    done = hub_run("stocha-convert", "org/source", tmp_path / "out")
    assert done.returncode == 2 and "reading org/source failed" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert hub_run("stocha-convert", "org/source", tmp_path / "out").returncode == 0


def test_a_converted_hub_model_keeps_its_first_source_when_converted_again(checkpoint, hub, hub_run, tmp_path):
    commit = hub.add_repo("org/source", upload(checkpoint()))
    options = ("--push-to-hub", "user/model", "--json")
    assert hub_run("stocha-convert", "org/source", tmp_path / "first", *options).returncode == 0
    done = succeeded(hub_run("stocha-convert", "user/model", tmp_path / "second", "--activation", "relu", "--json"))
    assert done["source"] == {"id": "org/source", "revision": commit}
    card = (tmp_path / "second" / "README.md").read_text()
    assert "base_model: org/source" in card and "REPO_ID" in card and "license: apache-2.0" in card


# Refusals: one sentence, nothing written.


@pytest.mark.parametrize(
    ("source", "options", "token", "words"),
    [
        ("org/nothing", [], "", ["org/nothing", "no such repo"]),
        ("org/open", ["--revision", "nowhere"], "", ["org/open", "no such revision"]),
        ("org/two--dashes", [], "", ["org/two--dashes", "not a valid Hub id"]),
        ("org/open", [], WRONG_TOKEN, ["org/open", "401", "HF_TOKEN"]),
        ("org/private", [], None, ["org/private", "private", "hf auth login"]),
        ("org/gated", [], None, ["org/gated", "gated", "hf auth login"]),
        ("org/closed", [], "", ["org/closed", "gated", "ask for access"]),
        ("org/pickled", [], "", ["org/pickled", "only pickle weights"]),
        ("org/empty", [], "", ["org/empty", "no config.json"]),
        ("org/open", ["--push-to-hub", "user/two--dashes"], "", ["user/two--dashes", "expected a Hub id"]),
        ("org/open", ["--push-to-hub", "user/model"], None, ["user/model", "no token", "hf auth login"]),
    ],
)
def test_a_source_that_cannot_be_had_is_refused(checkpoint, hub, hub_run, tmp_path, source, options, token, words):
    files = upload(checkpoint())
    hub.add_repo("org/open", files)
    hub.add_repo("org/private", files, private=True)
    hub.add_repo("org/gated", files, gated=True)
    hub.add_repo("org/closed", files, gated="manual")
    hub.add_repo("org/pickled", {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"})
    hub.add_repo("org/empty", {})
    assert_refused(hub_run("stocha-convert", source, tmp_path / "out", *options, token=token), *words)
    assert not (tmp_path / "out").exists() and "user/model" not in hub.repos
    assert not [path for path in paths(hub, "GET") if path.endswith((".safetensors", ".bin"))]


def test_a_hub_out_of_reach_is_refused(checkpoint, hub, hub_run, tmp_path):
    convert(checkpoint(), tmp_path / "stocha")
    with socket.socket() as closed:  # bound, so nobody else's, but not listening
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        words = "cannot be reached", "HF_ENDPOINT"
        assert_refused(hub_run("stocha-convert", "org/source", tmp_path / "out", HF_ENDPOINT=endpoint), *words)
        assert_refused(hub_run("stocha-publish", tmp_path / "stocha", "user/model", HF_ENDPOINT=endpoint), *words)
    offline = hub_run("stocha-convert", "org/source", tmp_path / "out", HF_HUB_OFFLINE="1")
    assert_refused(offline, "HF_HUB_OFFLINE", "local folder")
    assert not (tmp_path / "out").exists() and hub.requests == []


def test_a_publisher_without_a_valid_token_is_refused(checkpoint, hub, hub_run, tmp_path):
    convert(checkpoint(), tmp_path / "stocha")
    done = hub_run("stocha-publish", tmp_path / "stocha", "user/model", token=None)
    assert_refused(done, "user/model", "no token", "hf auth login")
    done = hub_run("stocha-publish", tmp_path / "stocha", "user/model", token=WRONG_TOKEN)
    assert_refused(done, "user/model", "401", "HF_TOKEN")
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("step", "status", "words"),
    [
        (("POST", "/repos/create"), 403, ["403", "Injected failure", "write access"]),
        (("POST", "/commit/"), 403, ["403", "Injected failure", "write access"]),
        (("POST", "/commit/"), 412, ["412", "changed meanwhile", "run the command again"]),
        (("POST", "/commit/"), 500, ["500", "run the command again"]),
    ],
)
def test_a_commit_that_the_hub_refuses_is_one_sentence(checkpoint, hub, hub_run, tmp_path, step, status, words):
    convert(checkpoint(), tmp_path / "stocha")
    hub.fail_status[step] = (status, 1)
    assert_refused(hub_run("stocha-publish", tmp_path / "stocha", "user/model"), "user/model", *words)
    assert not hub.repos or (len(hub.commits("user/model")) == 1 and hub.tags("user/model") == {})


def test_a_folder_that_is_no_whole_stocha_checkpoint_is_refused_unsent(checkpoint, hub, hub_run, tmp_path):
    source, stocha = checkpoint(), tmp_path / "stocha"
    convert(checkpoint(name="sharded", max_shard_size="20KB"), stocha)
    config = json.loads((stocha / "config.json").read_text())
    shard = sorted(stocha.glob("*.safetensors"))[0]

    assert_refused(hub_run("stocha-publish", source, "user/model"), "not a stocha checkpoint", "stocha-convert")
    assert_refused(hub_run("stocha-publish", tmp_path / "absent", "user/model"), "absent", "does not exist")
    (stocha / "config.json").write_text(json.dumps(config | {"stocha": config["stocha"] | {"p": 7}}))
    assert_refused(hub_run("stocha-publish", stocha, "user/model"), "p is 7", "between 0 and 1")
    (stocha / "config.json").write_text(json.dumps(config))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(hub_run("stocha-publish", stocha, "user/model"), shard.name, "truncated", "download it again")
    shard.unlink()
    assert_refused(hub_run("stocha-publish", stocha, "user/model"), shard.name, "missing")
    assert hub.requests == []


# From Python.

PUSH = """
import sys
import torch
from transformers import AutoModelForCausalLM
from stocha_hf import StochaConfig, patch
ids = torch.arange(3, 19)[None]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
patch(model, StochaConfig(p=0.125, inference="relu"))
model.push_to_hub("user/patched", private=True)
torch.save(model(ids).logits, sys.argv[2])
"""
LOAD_AND_PUSH = """
import sys
import torch
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 19)[None]
model = AutoModelForCausalLM.from_pretrained("user/patched", trust_remote_code=True)
print(type(model).__name__, type(model).__module__, model.config.stocha["p"])
assert torch.equal(model(ids).logits, torch.load(sys.argv[1]))
model.push_to_hub("user/again")
"""


def test_a_model_pushed_from_python_loads_with_its_own_code(checkpoint, hub, hub_run, tmp_path):
    """push_to_hub of a patched model, and of one that a Hub's code was loaded for."""
    pushed = hub_run(PUSH, checkpoint(), tmp_path / "logits.pt")
    assert pushed.returncode == 0, pushed.stderr
    loaded = hub_run(LOAD_AND_PUSH, tmp_path / "logits.pt")
    assert loaded.returncode == 0, loaded.stderr
    name, module, p = loaded.stdout.split()
    assert name == "StochaLlamaForCausalLM" and module.startswith("transformers_modules.user.patched") and p == "0.125"
    for repo in ("user/patched", "user/again"):
        files = hub.files(repo)
        config = json.loads(files["config.json"])
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_stocha.StochaLlamaForCausalLM"
        assert config["architectures"] == ["StochaLlamaForCausalLM"] and config["hidden_act"] == "relu"
        assert files["modeling_stocha.py"] == MODELING_FILE.read_bytes()
        assert len(hub.commits(repo)) == 2
