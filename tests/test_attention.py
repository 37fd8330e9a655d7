"""SEAttention, against the module of the seed written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import ON_CUDA
from torch import Tensor, nn

from se_retrofit import RetrofitError, SEAttention


class SeedSE(nn.Module):
    """The function and the keys that SEAttention has to reproduce."""

    def __init__(self, channel: int, reduction: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        return x * self.fc(y).view(b, c, 1, 1).expand_as(x)


def _draw(module: nn.Module) -> nn.Module:
    """Weights large enough for gates that differ from 1/2."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_a_weight_file_of_the_seed_loads_and_gives_the_same_function(device: str, tmp_path: Path) -> None:
    seed = _draw(SeedSE(64, 8)).to(device)
    torch.save(seed.state_dict(), tmp_path / "seed.pt")
    se = SEAttention(channel=64, reduction=8).to(device)
    assert list(se.state_dict()) == list(seed.state_dict()) == ["fc.0.weight", "fc.2.weight"]
    se.load_state_dict(torch.load(tmp_path / "seed.pt", weights_only=True))
    x = torch.randn(1, 64, 32, 32, device=device)
    torch.testing.assert_close(se(x), seed(x))
    assert not torch.allclose(se(x), x / 2, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "channel", "hidden"),
    [
        ({}, 32, 4),
        ({"channel": 64, "reduction": 8}, 64, 8),
        ({"channel": 16, "min_hidden": 4}, 16, 4),
        ({"channel": 4, "reduction": 8}, 4, 1),
        ({"channel": 16, "reduction": 4, "bias": True, "device": "meta", "dtype": torch.float16}, 16, 4),
    ],
)
def test_layers_are_those_of_the_seed_or_as_asked_for(options: dict[str, Any], channel: int, hidden: int) -> None:
    se = SEAttention(**options)
    assert isinstance(se.fc[3], nn.Sigmoid)
    biases = [(hidden,), (channel,)] if "bias" in options else []
    assert sorted(tuple(p.shape) for p in se.parameters()) == sorted([(hidden, channel), (channel, hidden), *biases])
    like = (torch.device(options.get("device", "cpu")), options.get("dtype", torch.float32))
    assert {(p.device, p.dtype) for p in se.parameters()} == {like}


def test_the_initialisation_of_the_seed_really_runs() -> None:
    se = SEAttention(channel=512, reduction=2)
    for layer in (se.fc[0], se.fc[2]):
        assert layer.weight.std().item() == pytest.approx(0.001, rel=0.05)
        assert layer.weight.mean().abs().item() < 1e-4
    biased = SEAttention(channel=64, bias=True)
    assert not biased.fc[0].bias.any()
    assert not biased.fc[2].bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_identity_gate_starts_as_an_exact_identity_with_a_gradient(dtype: torch.dtype, bias: bool) -> None:
    se = SEAttention(16, 4, gate="identity", bias=bias, dtype=dtype)
    x = torch.randn(3, 16, 5, 5, dtype=dtype, requires_grad=True)
    y = se(x)
    assert y.dtype == dtype
    assert torch.equal(y, x)
    upstream = torch.randn_like(x)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream)
    assert se.fc[2].weight.grad.count_nonzero() > 0
    assert not se.fc[2].weight.any()


def test_half_of_the_hidden_units_are_alive_for_any_input() -> None:
    """A narrow bottleneck may not be dead: all of the last layer's gradient would be zero for good."""
    for seed in range(20):
        torch.manual_seed(seed)
        se = SEAttention(64, 16, gate="identity")
        hidden = se.fc[1](se.fc[0](torch.randn(5, 64)))
        assert ((hidden > 0).sum(1) == se.hidden // 2).all()


@pytest.mark.parametrize("spatial", [(7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
@pytest.mark.parametrize("last", [False, True])
def test_any_number_of_spatial_dims_with_channels_first_or_last(
    spatial: tuple[int, ...], gate: str, last: bool
) -> None:
    se = _draw(SEAttention(8, 2, gate=gate, bias=True, channel_dim=-1 if last else 1))
    x = torch.randn(3, 8, *spatial)
    pooled = x.flatten(2).mean(-1)
    hidden = (pooled @ se.fc[0].weight.T + se.fc[0].bias).clamp(min=0)
    gates = torch.sigmoid(hidden @ se.fc[2].weight.T + se.fc[2].bias) * (2 if gate == "identity" else 1)
    expected = x * gates.reshape(3, 8, *(1 for _ in spatial))
    y = se(x.movedim(1, -1)).movedim(-1, 1) if last else se(x)
    torch.testing.assert_close(y, expected)


def test_inputs_without_a_batch_or_without_spatial_dims() -> None:
    se, from_the_end = (_draw(SEAttention(8, 2, channel_dim=dim)) for dim in (1, -3))
    x = torch.randn(8, 4, 5)
    torch.testing.assert_close(from_the_end(x), from_the_end(x[None])[0])
    y = torch.randn(3, 8)
    torch.testing.assert_close(se(y), se(y[..., None])[..., 0])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_without_a_gradient_the_values_are_the_same_bit_for_bit(
    layout: torch.memory_format, gate: str, inplace: bool
) -> None:
    se = _draw(SEAttention(16, 4, gate=gate, bias=True, inplace=inplace))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 16, 9, 7).to(dtype).to(memory_format=layout)
        wanted = se.to(dtype)(x)
        assert wanted.requires_grad
        for no_grad in (torch.no_grad, torch.inference_mode):
            with no_grad():
                given = x.clone()
                got = se(given)
            assert got.equal(wanted)
            assert got.stride() == wanted.stride() == x.stride()
            assert (got.data_ptr() == given.data_ptr()) is inplace
            assert inplace or given.equal(x)


@pytest.mark.parametrize(
    ("options", "error", "fact"),
    [
        ({"channel": 0}, RetrofitError, "channel .*0"),
        ({"channel": 8.0}, TypeError, "channel .*8.0"),
        ({"reduction": -2}, RetrofitError, "reduction .*-2"),
        ({"gate": "relu"}, RetrofitError, "gate .*'identity', 'sigmoid', .*'relu'"),
        ({"channel_dim": 0}, RetrofitError, "is the batch"),
        ({"channel_dim": 1.0}, TypeError, "channel_dim"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], error: type[Exception], fact: str) -> None:
    with pytest.raises(error, match=fact):
        SEAttention(**options)  # type: ignore[arg-type]
