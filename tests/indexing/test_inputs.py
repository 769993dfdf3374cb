import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from tests.data_stage import write_data_stage
from ulmrec_hf.files import write_table
from ulmrec_hf.indexing.encoder import TfidfEncoder
from ulmrec_hf.indexing.inputs import InputEncoder, TrainPart, item_vectors
from ulmrec_hf.tables import LeaveOneOut, Sequences


def make_sequences(lists, items=6):
    return Sequences.from_lists(lists, [f"item{item}" for item in range(1, items + 1)])


def make_train(lists, weights, **numbers):
    return TrainPart(
        weights,
        {},
        {name: np.array(values, float) for name, values in numbers.items()},
        [f"user{user}" for user in range(len(lists))],
        [f"item{item}" for item in range(1, 7)],
        make_sequences(lists),
    )


def test_items_of_the_same_users_are_near():
    vectors, _ = item_vectors(make_sequences([[1, 2], [1, 2], [1, 2, 3], [4, 5], [4, 5], [5, 4]]), 3, 50)
    np.testing.assert_allclose(np.linalg.norm(vectors[:5], axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > 0.9 > 0.3 > vectors[0] @ vectors[3]
    assert not vectors[5].any()  # nobody chose it


def test_only_the_newest_interactions_count():
    with_old, _ = item_vectors(make_sequences([[6, 1, 2], [6, 1, 2], [4, 5], [4, 5]]), 3, 2)
    assert not with_old[5].any() and with_old[0] @ with_old[1] > 0.9


def test_ratings_and_times_are_points_on_circles():
    encoder = InputEncoder({"ratings": 1.0, "times": 2.0}, ranges={"ratings": [1, 5], "times": [0.0, 1e9]})
    assert encoder.dim == 6
    vectors = encoder.encode(ratings=[1, 5, 3, float("nan")], times=[0, 1e9, 5e8, float("nan")])
    assert vectors.shape == (3, 6) and vectors.dtype == np.float32  # the last one has nothing
    np.testing.assert_allclose(vectors[0, :2], [1, 0], atol=1e-6)
    np.testing.assert_allclose(vectors[1, :2], [0, 1], atol=1e-6)
    np.testing.assert_allclose(vectors[2, :2], [0.5**0.5] * 2, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors[:, 2:], axis=1), 2, rtol=1e-5)
    half = encoder.encode(ratings=[1, float("nan")], times=[0, 5e8])
    assert len(half) == 2 and not half[1, :2].any() and half[1, 2:].any()
    year = 365.2425 * 86_400
    same_day = encoder.scale("times", np.array([10.0, 10.0 + year, 10.0 + year / 2]))[:, 2:]
    np.testing.assert_allclose(same_day[0], same_day[1], atol=1e-5)
    np.testing.assert_allclose(same_day[0], -same_day[2], atol=1e-5)


def test_new_users_get_the_vectors_that_training_users_got():
    weights = {"cooccurrence": 1.0, "ratings": 0.5, "times": 2.0}
    lists = [[1, 2, 3], [3, 2], [2, 1, 3]]
    train = make_train(lists, weights, ratings=[5, 1, 3, 2, 2, 4, 1, 1], times=range(8))
    encoder = TfidfEncoder(4).fit(["red lamp", "blue tent", "red tent"])
    fitted = InputEncoder.fit(train, None, cooccurrence_dim=2)
    rows = fitted.dataset(train).collate([0])["texts"][0]
    vectors = fitted.encode(cooccurrence=["item1", "item2", "item3"], ratings=[5, 1, 3], times=[0, 1, 2])
    np.testing.assert_allclose(vectors, rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        fitted.encode(cooccurrence=["never seen", "item1"]), fitted.encode(cooccurrence=["item1"])
    )
    texts = InputEncoder({"reviews": 1.0}, encoder, max_reviews=2)
    newest = texts.encode(reviews=["blue tent", "red lamp", " ", "red tent", ""])
    np.testing.assert_array_equal(newest, texts.encode(reviews=["red lamp", "red tent"]))
    assert len(newest) == 2 and texts.encode(reviews=[""]).shape == texts.encode().shape == (0, 3)


def test_values_as_people_have_them():
    titles = InputEncoder({"titles": 1.0}, TfidfEncoder(4).fit(["red lamp", "blue tent", "red tent"]))
    expected = titles.encode(titles=["red lamp", "blue tent"])
    for values in (["red lamp", None, "blue tent"], iter(["red lamp", float("nan"), "blue tent"])):
        np.testing.assert_array_equal(titles.encode(titles=values), expected)
    with pytest.raises(ValueError, match="titles must be strings, or None where one is missing; got 5"):
        titles.encode(titles=[5])
    ratings = InputEncoder({"ratings": 1.0, "times": 1.0}, ranges={"ratings": [1, 5], "times": [0.0, 1e9]})
    assert len(ratings.encode(ratings=[None, 4, None], times=[None, None, 5])) == 2
    assert not len(ratings.encode(times=[10**400]))
    for value in ("5", np.datetime64("2020-01-01")):
        with pytest.raises(ValueError, match="times must be numbers, or None where one is missing"):
            ratings.encode(times=[value])
    with pytest.raises(ValueError, match="ratings is one string; give a list"):
        ratings.encode(ratings="5")


def test_saves_and_loads_the_same(tmp_path):
    train = make_train([[1, 2, 3], [3, 2]], {"cooccurrence": 1.0, "ratings": 0.5}, ratings=[5, 1, 3, 2, 2])
    fitted = InputEncoder.fit(train, None, cooccurrence_dim=2, max_reviews=7, user_ids=True)
    fitted.save(tmp_path)
    again = InputEncoder.load(tmp_path)
    assert again.max_reviews == 7 and again.user_ids
    values = {"cooccurrence": ["item3"], "ratings": [4.5]}
    np.testing.assert_array_equal(again.encode(**values), fitted.encode(**values))
    assert again.dim == fitted.dim == 4
    with pytest.raises(ValueError, match=r"inputs\.json is missing"):
        InputEncoder.load(tmp_path / "nowhere")


def test_vectors_that_cannot_leave_a_user_out_are_refused(tmp_path):
    train = make_train([[1, 2, 3], [3, 2]], {"cooccurrence": 1.0})
    InputEncoder.fit(train, None, cooccurrence_dim=2).save(tmp_path)
    path = tmp_path / "item_vectors.safetensors"
    save_file({"item_vectors": load_file(path)["item_vectors"]}, path)
    with pytest.raises(ValueError, match=r"item_vectors.safetensors has no item_basis: index the users again"):
        InputEncoder.load(tmp_path)


def test_reads_the_train_part_alone(tmp_path):
    data = LeaveOneOut.load(write_data_stage(tmp_path / "data", 12))
    train = TrainPart.read(data, ["auto", "cooccurrence"])
    assert train.weights == {"reviews": 1.0, "cooccurrence": 1.0} and list(train.texts) == ["reviews"]
    assert len(train.sequences.items) == train.sequences.offsets[-1] == len(train.texts["reviews"].text_ids)
    other = LeaveOneOut.load(write_data_stage(tmp_path / "other", 12, other_held_out=True))
    assert np.array_equal(TrainPart.read(other, ["auto"]).sequences.items, train.sequences.items)


def test_the_order_of_the_inputs_does_not_reach_the_encoder(tmp_path):
    data = LeaveOneOut.load(write_data_stage(tmp_path / "data", 12))
    train = TrainPart.read(data, ["titles", "reviews"], [1.0, 0.5])
    assert list(train.weights.items()) == [("titles", 1.0), ("reviews", 0.5)] and list(train.texts) == [
        "reviews",
        "titles",
    ]


def test_users_of_other_data_get_the_vectors_that_training_users_got(tmp_path):
    train = make_train([[1, 2, 3], [3, 2]], {"cooccurrence": 1.0, "ratings": 0.5}, ratings=[5, 1, 3, 2, 2])
    fitted = InputEncoder.fit(train, None, cooccurrence_dim=2)
    item_ids = ["item3", "never seen", "item1"]
    sequences = Sequences.from_lists([[1, 2], [3]], item_ids)
    other = TrainPart(train.weights, {}, {"ratings": np.array([np.nan, 4, 1])}, ["new", "other"], item_ids, sequences)
    batch = fitted.dataset(other).collate([0, 1])
    expected = fitted.encode(cooccurrence=["item3", "never seen"], ratings=[None, 4])
    np.testing.assert_allclose(batch["texts"][0], expected, rtol=1e-6)
    np.testing.assert_allclose(batch["texts"][1, :1], fitted.encode(cooccurrence=["item1"], ratings=[1]), rtol=1e-6)


def test_ratings_that_some_lack_are_read(tmp_path):
    folder = write_data_stage(tmp_path / "data", 3)
    table = pq.read_table(folder / "sequences.parquet")
    ratings = [[4.0, None, *[5.0] * (len(items) - 2)] for items in table["items"].to_pylist()]
    table = table.drop_columns([name for name in ("ratings",) if name in table.column_names])
    write_table(folder / "sequences.parquet", table.append_column("ratings", pa.array(ratings, pa.list_(pa.float32()))))
    train = TrainPart.read(LeaveOneOut.load(folder), ["ratings"], [0.3])
    assert train.numbers["ratings"][0] == 4 and np.isnan(train.numbers["ratings"][1])
    dataset = InputEncoder.fit(train, None).dataset(train)
    counts = dataset.collate(range(len(dataset)))["mask"].sum(dim=1)
    assert counts[0] == train.sequences.offsets[1] - 1  # the one without a rating is left out
    assert isinstance(dataset.inputs[0].table, np.ndarray)
