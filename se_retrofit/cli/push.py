"""``se-retrofit push DIR REPO``: a saved network on the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .app import app, say
from .options import Folder


@app.command("push")
def push_command(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="created if it does not exist")],
    private: Annotated[bool | None, typer.Option(help="whether a newly created repository is private")] = None,
    revision: Annotated[str | None, typer.Option(help="the branch to push to")] = None,
) -> None:
    """Upload a saved network to the Hugging Face hub, with a model card that contains the table of the plan.

    The account is that of `hf auth login`, or of the environment variable HF_TOKEN.
    """
    from ..saving.hub import push_to_hub

    say(Console(), f"uploaded to {push_to_hub(folder, repo, private=private, revision=revision)}")
