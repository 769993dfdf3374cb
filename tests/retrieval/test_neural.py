"""What holds for every neural retriever, and the parts of single ones; what holds for all: see test_retrievers.py."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from ulmrec_hf.retrieval.arguments import RETRIEVERS
from ulmrec_hf.retrieval.attention import SelfAttention
from ulmrec_hf.retrieval.neural import NeuralRetriever
from ulmrec_hf.retrieval.rows import TrainingRows, collate
from ulmrec_hf.retrieval.sasrec import SASRec

CAUSAL = ("lrurec", "narm", "sasrec")
NEURAL = (*CAUSAL, "bert4rec")
MASK = 21  # BERT4Rec's, in a catalogue of 20 items


def make_model(name: str, **settings) -> NeuralRetriever:
    torch.manual_seed(0)
    # weights so large that a position which reads what it must not is seen to do so
    settings = {"num_items": 20, "hidden_size": 16, "num_layers": 2, "initializer_range": 0.3, **settings}
    model_class = RETRIEVERS[name]
    return model_class(model_class.config_class(**settings)).eval()


@pytest.fixture(params=NEURAL)
def model(request) -> NeuralRetriever:
    return make_model(request.param)


@pytest.fixture(params=CAUSAL)
def causal(request) -> NeuralRetriever:
    return make_model(request.param)


@pytest.mark.parametrize("name", NEURAL)
def test_loss_falls(name, sequences):
    model = make_model(name, num_items=sequences.num_items, initializer_range=0.02, dropout=0.1)
    rows = TrainingRows(sequences.train_part(), max_history=50)
    batch = collate([rows[index] for index in range(32)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with torch.no_grad():
        before = model(**batch).loss
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert model.eval()(**batch).loss < 0.8 * before


@pytest.mark.parametrize("name", NEURAL)
def test_fits_by_the_settings_and_the_seed(name, data):
    settings = {"hidden_size": 16, "num_layers": 1, "num_heads": 4, "max_history": 7, "dropout": 0.3}
    one, other = (RETRIEVERS[name].fit(data, epochs=1, patience=0, **settings) for _ in range(2))
    assert one.name == name and len(one.training_history) == 1
    for setting in set(settings) & set(one.config.to_dict()):
        assert getattr(one.config, setting) == settings[setting], setting
    assert all(torch.equal(weight, other.state_dict()[key]) for key, weight in one.state_dict().items())


def test_every_module_is_initialised(model):
    for name, parameter in model.named_parameters():
        if "bias" in name:
            assert not parameter.any(), name  # which torch's own initialisation would not leave at 0


def test_loads_by_the_auto_classes(model, tmp_path):
    assert not list(model.buffers())  # PreTrainedModel would corrupt non-persistent ones on reload
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    ids = torch.tensor([[1, 2, 3]])
    # the loaded weights lie in memory at other alignments, which changes the last bit of sums
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_padding_is_inert(model):
    ids = torch.tensor([[3, 1, 4]])
    padded = torch.tensor([[3, 1, 4, 0, 0, 0, 0]])
    torch.testing.assert_close(model(padded).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    labels = torch.tensor([[1, 4, 5]])
    padded_labels = torch.tensor([[1, 4, 5, 0, 0, 0, 0]])
    torch.testing.assert_close(model(padded, labels=padded_labels).loss, model(ids, labels=labels).loss)


def test_every_item_of_the_history_is_read(model):
    logits = model(torch.tensor([[3, 1, 4, 1, 5], [7, 1, 4, 1, 5], [3, 1, 7, 1, 5], [3, 1, 4, 1, 7]])).logits[:, 1:]
    assert ((logits[1:] - logits[0]).abs().amax(1) > 1e-3).all()


def test_no_position_sees_its_future(causal):
    past = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    for place in range(past.shape[1] - 1):
        changed = past.clone()
        changed[:, place + 1 :] = 7
        torch.testing.assert_close(causal.encode(changed)[:, : place + 1], causal.encode(past)[:, : place + 1])


def test_loss_is_full_cross_entropy_over_real_items(causal):
    ids, labels = torch.tensor([[3, 1], [2, 0]]), torch.tensor([[1, 4], [9, 0]])
    logits = causal.encode(ids) @ causal.item_embedding.weight[1:].T + causal.item_bias[1:]
    expected = torch.nn.functional.cross_entropy(logits[labels > 0], labels[labels > 0] - 1)
    torch.testing.assert_close(causal(ids, labels=labels).loss, expected)


def test_padding_row_gets_no_gradient(model):
    model.train()
    model(torch.tensor([[3, 1, 0]]), labels=torch.tensor([[1, 4, 0]])).loss.backward()
    assert not model.item_embedding.weight[0].any()
    assert not model.item_embedding.weight.grad[0].any()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_scoring_leaves_the_mode_and_drops_nothing_out(model):
    model.train()
    assert torch.equal(model.score([[1, 2, 3]]), model.score([[1, 2, 3]]))
    assert model.training


def test_bfloat16_autocast_agrees(model):
    histories = [[1, 2, 3], [], [7, 8, 9, 10, 11]]
    scores = model.score(histories)[:, 1:]
    ids, labels = torch.tensor([[3, 1, 4], [2, 0, 0]]), torch.tensor([[1, 4, 5], [9, 0, 0]])
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.score(histories)[:, 1:]
        loss = model(ids, labels=labels).loss
    assert (rough - scores).norm() < 0.05 * scores.norm()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(ids, labels=labels).loss, atol=0.05, rtol=0.05)


def test_narm_equals_its_equations():
    model = make_model("narm")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    h, _ = model.encoder(4 * model.item_embedding(ids))
    for t in range(ids.shape[1]):
        local = torch.zeros(16)
        for j in range(t + 1):
            local += model.energy(torch.sigmoid(model.query(h[0, t]) + model.key(h[0, j]))) * h[0, j]
        expected = model.bilinear(torch.cat([h[0, t], local]))
        torch.testing.assert_close(model.encode(ids)[0, t], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("readable", [None, [True, True, False, True, False]])
def test_attention_equals_its_equation(readable):
    torch.manual_seed(0)
    layer = SelfAttention(hidden_size=6, num_heads=2, dropout=0.5).eval()
    x = torch.randn(1, 5, 6)
    allowed = torch.ones(5, 5).tril().bool() if readable is None else torch.tensor([readable] * 5)
    query, key, value = layer.input(x[0]).split(6, dim=-1)
    heads = []
    for columns in (slice(0, 3), slice(3, 6)):
        fit = query[:, columns] @ key[:, columns].T / 3**0.5
        heads.append(fit.masked_fill(~allowed, -torch.inf).softmax(-1) @ value[:, columns])
    expected = layer.output(torch.cat(heads, dim=-1))
    found = layer(x, None if readable is None else torch.tensor([readable]))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads; got 16 and 3"):
        make_model("sasrec", num_heads=3)


def test_bert4rec_learns_the_last_item_as_it_scores_it():
    model = make_model("bert4rec")
    ids, labels = torch.tensor([[3, 1, 4], [2, 0, 0]]), torch.tensor([[1, 4, 5], [9, 0, 0]])
    scores = model.score([[3, 1, 4], [2]])[:, 1:]
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([5, 9]) - 1)
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_bert4rec_never_reads_an_item_behind_a_mask():
    model = make_model("bert4rec", mask_probability=0.3).train()
    read, asked = [], []
    model.item_embedding.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    cross_entropy = torch.nn.functional.linear_cross_entropy

    def spy(hidden, weight, labels, **options):
        asked.append(labels)
        return cross_entropy(hidden, weight, labels, **options)

    whole = torch.tensor([[3, 1, 4, 6, 5], [2, 9, 0, 0, 0], [8, 7, 6, 0, 0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear_cross_entropy", spy)
        for _ in range(20):
            model(whole[:, :-1].where(whole[:, 1:] > 0, 0), labels=whole[:, 1:])
    twice = whole.repeat(2, 1)
    for rows, targets in zip(read, asked, strict=True):
        masked = rows == MASK
        assert masked.any(1).all()
        assert torch.equal(rows[~masked], twice[~masked])
        assert torch.equal(targets, twice[masked])
        assert torch.equal(masked[3:], torch.tensor([[0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]).bool())
    assert len({tuple(rows[:3].flatten().tolist()) for rows in read}) > 10


def test_item_embeddings_can_start_from_the_titles(data):
    settings = {"start_from_titles": True, "epochs": 1, "patience": 0, "learning_rate": 1e-9}
    model = SASRec.fit(data, hidden_size=16, **settings)
    embeddings = model.item_embedding.weight[1:]
    similar = torch.nn.functional.cosine_similarity(embeddings[:, None], embeddings[None], dim=-1)
    assert similar[0, 3] > similar[0, 4] and similar[0, 1] > similar[0, 4]  # colour shared; thing shared; nothing
    assert embeddings.square().mean().sqrt().item() == pytest.approx(model.config.initializer_range, rel=0.01)
