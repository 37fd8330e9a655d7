"""``se-retrofit push DIR REPO``: upload a saved network to the Hugging Face hub."""

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
    license: Annotated[str | None, typer.Option(help="license to put on the card, such as apache-2.0")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the card without uploading anything")] = False,
    private: Annotated[bool | None, typer.Option(help="whether a newly created repository is private")] = None,
    revision: Annotated[str | None, typer.Option(help="the branch to push to, created if it does not exist")] = None,
) -> None:
    """Upload a saved network to the Hugging Face hub with a model card: base, licence, size, classes, scores and plan.

    The account is that of `hf auth login` or of the environment variable HF_TOKEN.
    """
    from ..saving.hub import model_card, push_to_hub

    if dry_run:
        say(Console(), f"{model_card(folder, repo, license=license)}\nNothing was uploaded to {repo}: a dry run.")
        return
    url = push_to_hub(folder, repo, license=license, private=private, revision=revision)
    say(Console(), f"uploaded to {url}")
