"""Two runs in one folder, and a folder that can't be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import config, network

from se_retrofit import RetrofitError
from se_retrofit.finetune import NamedData, finetune
from se_retrofit.finetune.lock import LOCK, alone_in

pytest.importorskip("fcntl", reason="only there folders are locked")

# a run, as far as others see it; without the package, whose import takes seconds
HOLDS = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(
    digits: NamedData, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"holds\n"
        with pytest.raises(RetrofitError, match=f"another process is running in {tmp_path}; wait"):
            finetune(network(), digits.train, config=config(epochs=1), output_dir=tmp_path, quiet=True)
        assert [file.name for file in tmp_path.iterdir()] == [LOCK]
        other.kill()
    # its file is still there, as after every kill, and holds nobody up
    finetune(network(), digits.train, config=config(epochs=1), output_dir=tmp_path, quiet=True)
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()  # as root, who may write everywhere
    with pytest.raises(RetrofitError, match="can't be written: Is a directory"), alone_in(tmp_path):
        pass
