import torch

from ulmrec_hf.retrieval.lrurec import LinearRecurrentUnit, LRURec, LRURecConfig

CONFIG = {"num_items": 20, "hidden_size": 16, "num_layers": 2}


def make_model() -> LRURec:
    torch.manual_seed(0)
    return LRURec(LRURecConfig(**CONFIG)).eval()


def test_recurrence_equals_the_complex_loop():
    torch.manual_seed(0)
    layer = make_model().blocks[0].recurrence
    x = torch.randn(3, 11, 16)
    eigenvalues = torch.exp(torch.complex(-torch.exp(layer.nu), torch.exp(layer.theta)))
    real, imag = layer.input(x).chunk(2, dim=-1)
    inputs = torch.complex(real, imag) * torch.exp(layer.log_gamma)
    state, states = torch.zeros(3, 32, dtype=torch.complex64), []
    for place in range(x.shape[1]):
        state = eigenvalues * state + inputs[:, place]
        states.append(state)
    states = torch.stack(states, 1)
    expected = layer.output(torch.cat([states.real, states.imag], -1))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_initial_eigenvalues_lie_in_the_ring():
    layer = make_model().blocks[1].recurrence
    assert isinstance(layer, LinearRecurrentUnit)
    radius = torch.exp(-torch.exp(layer.nu))
    assert ((radius >= 0.8 - 1e-4) & (radius <= 0.99 + 1e-4)).all()
