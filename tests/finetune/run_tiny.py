"""A fine-tune for the tests that need a process of its own: ``python run_tiny.py OUTPUT FIELDS [resume]``."""

from __future__ import annotations

import json
import sys

import torch
from tiny import tiny_config, tiny_data, tiny_network

from se_retrofit.finetune import finetune

if __name__ == "__main__":
    torch.set_num_threads(1)
    output, fields, *flags = sys.argv[1:]
    data = tiny_data()
    finetune(
        tiny_network(), data.train, data.val, config=tiny_config(**json.loads(fields)), output_dir=output, resume="resume" in flags
    )
