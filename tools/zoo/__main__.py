from se_retrofit.cli.app import run

from .command import app

run(app)
