"""Publish a stocha checkpoint folder to the Hub: weights, tokenizer, modeling file and card in one atomic commit.

example:
  stocha-publish smollm2-relu user/smollm2-relu --private
  stocha-publish smollm2-relu user/smollm2-relu --space user/smollm2-relu-demo

Running it again uploads only what is missing and makes no commit where nothing changed.
"""

from __future__ import annotations

import argparse

from stocha_hf.cli import Parser, hub_id, path_or_id, run, show


def parser() -> Parser:
    verb = Parser("stocha-publish", __doc__)
    verb.add_argument(
        "folder", type=path_or_id, metavar="FOLDER", help="folder that stocha-convert or a training run wrote"
    )
    verb.add_argument("repo", type=hub_id, metavar="REPO", help="Hub repo, made if it does not exist")
    verb.add_argument("--private", action="store_true", help="make REPO private if it is new")
    verb.add_argument("--space", type=hub_id, help="also make a Space that shows which neurons the model uses")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    return verb


def main() -> None:
    run(parser(), publish)


def publish(args: argparse.Namespace) -> None:
    from stocha_hf.publishing.upload import publish as publish_folder

    done = publish_folder(args.folder, args.repo, private=args.private, space=args.space).to_dict()
    text = f"{done['url']} at {done['tag']} ({done['commit']})"
    show(done, f"{text}\nshown at {done['space']}" if done["space"] else text, args.json)


if __name__ == "__main__":
    main()
