import torch
from transformers import AutoConfig, AutoModel

from ulmrec_hf.retrieval.lrurec import LinearRecurrentUnit, LRURecConfig, LRURecModel

CONFIG = {"num_items": 20, "hidden_size": 16, "num_layers": 2}


def make_model() -> LRURecModel:
    torch.manual_seed(0)
    return LRURecModel(LRURecConfig(**CONFIG)).eval()


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


def test_padding_is_inert():
    model = make_model()
    ids = torch.tensor([[3, 1, 4]])
    padded = torch.tensor([[3, 1, 4, 0, 0, 0, 0]])
    torch.testing.assert_close(model(padded).logits, model(ids).logits, atol=1e-6, rtol=1e-5)
    labels = torch.tensor([[1, 4, 5]])
    padded_labels = torch.tensor([[1, 4, 5, 0, 0, 0, 0]])
    torch.testing.assert_close(model(padded, labels=padded_labels).loss, model(ids, labels=labels).loss)


def test_no_position_sees_its_future():
    model = make_model()
    past = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    for place in range(past.shape[1] - 1):
        changed = past.clone()
        changed[:, place + 1 :] = 7
        torch.testing.assert_close(model.encode(changed)[:, : place + 1], model.encode(past)[:, : place + 1])


def test_loss_is_full_cross_entropy_over_real_items():
    model = make_model()
    ids, labels = torch.tensor([[3, 1], [2, 0]]), torch.tensor([[1, 4], [9, 0]])
    logits = model.encode(ids) @ model.item_embedding.weight[1:].T + model.item_bias[1:]
    expected = torch.nn.functional.cross_entropy(logits[labels > 0], labels[labels > 0] - 1)
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_padding_row_gets_no_gradient():
    model = make_model().train()
    model(torch.tensor([[3, 1, 0]]), labels=torch.tensor([[1, 4, 0]])).loss.backward()
    assert not model.item_embedding.weight.grad[0].any()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_scoring_leaves_the_mode_and_drops_nothing_out():
    model = make_model().train()
    assert torch.equal(model.score([[1, 2, 3]]), model.score([[1, 2, 3]]))
    assert model.training


def test_loads_by_the_auto_classes(tmp_path):
    model = make_model()
    assert not list(model.buffers())  # PreTrainedModel would corrupt non-persistent ones on reload
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LRURecConfig)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, LRURecModel)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    ids = torch.tensor([[1, 2, 3]])
    # the loaded weights lie in memory at other alignments, which changes the last bit of sums
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-6)
