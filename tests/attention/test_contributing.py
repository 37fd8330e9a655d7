"""The worked example of CONTRIBUTING.md: a stranger adds an attention in one file and one row."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from attentions import Network, inputs, inserted

from se_retrofit import add_se, load_retrofitted, save_retrofitted
from se_retrofit.attention import ATTENTIONS
from se_retrofit.inspection import GateLogger

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_one_file_and_one_row_are_all_that_an_attention_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, row = re.findall(r"```python\n(.*?)```", TEXT[TEXT.index("## Add an attention") :], re.DOTALL)[:2]
    (tmp_path / "effective_se.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "effective_se", importlib.import_module("effective_se"))
    monkeypatch.setitem(ATTENTIONS, "ese", None)  # so that it goes again
    exec(row, {"ATTENTIONS": ATTENTIONS, "EffectiveSE": sys.modules["effective_se"].EffectiveSE})

    for last in (False, True):
        network, x = Network(last=last).eval(), inputs()
        model = add_se(network, attention="ese", example_inputs=x)
        assert torch.equal(model(x), network(x))
        assert {type(module).__name__ for module in inserted(model).values()} == {"EffectiveSE"}
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
        with GateLogger(model) as gates:
            model(x)
            assert len(gates.summary()) == 2
        again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=network)
        assert torch.equal(again(x), model(x))
