"""The toy world: seeded, its taste in the reviews alone and in no column, and what decides later choices."""

import pytest

from ulmrec_hf.data.synthetic import KINDS, NEXT_KIND, STYLES, synthetic_interactions

WORD_STYLE = {word: style for style, words in STYLES.items() for word in words}


@pytest.fixture(scope="module")
def world():
    interactions, items = synthetic_interactions(600, seed=3)
    table = interactions.to_pandas().merge(items.to_pandas(), on="item_id", how="left", sort=False)
    table["style"], table["kind"] = zip(*table["title"].str.split(), strict=True)
    table["expressed"] = [
        next(WORD_STYLE[word] for word in review.replace(",", "").replace(".", "").split() if word in WORD_STYLE)
        for review in table["review"]
    ]
    table["from_end"] = table.groupby("user_id").cumcount(ascending=False)
    return table


def test_a_seed_gives_the_same_world_and_another_seed_another():
    first, again, other = (synthetic_interactions(50, seed) for seed in (0, 0, 1))
    assert first[0].equals(again[0]) and first[1].equals(again[1])
    assert not first[0].equals(other[0])
    assert synthetic_interactions(7, 0)[0]["user_id"].unique().to_pylist() == [f"user-{user}" for user in range(7)]


def test_columns_are_those_of_real_data_and_hold_no_taste(world):
    interactions, items = synthetic_interactions(50, 0)
    assert interactions.column_names == ["user_id", "item_id", "timestamp", "rating", "summary", "review"]
    assert items.column_names == ["item_id", "title"] and len(set(items["title"].to_pylist())) == items.num_rows
    # ids of users and items give no style away
    assert not any(style in value for style in STYLES for value in (*world["user_id"], *world["item_id"]))


def test_every_review_tells_the_same_taste(world):
    assert (world.groupby("user_id")["expressed"].nunique() == 1).all()
    assert world.groupby("expressed")["user_id"].nunique().min() >= 15  # all styles have users


def test_taste_decides_the_held_out_choices_and_not_the_early_ones(world):
    match = world["style"] == world["expressed"]
    assert match[world["from_end"] < 2].mean() > 0.6
    assert match[world["from_end"] >= 3].mean() < 0.12  # about one in sixteen: the crowd
    assert world.loc[match, "rating"].mean() > 4 > 3.5 > world.loc[~match, "rating"].mean()


def test_two_users_with_the_same_recent_kind_choose_differently(world):
    test = world[world["from_end"] == 0]
    for kind in KINDS[:4]:
        chosen = test[test["kind"] == kind]
        assert chosen["style"].nunique() >= 5


def test_the_next_kind_follows_the_sequence(world):
    before = world.groupby("user_id")["kind"].shift(1)
    follows = [NEXT_KIND[one] == two for one, two in zip(before, world["kind"], strict=True) if isinstance(one, str)]
    assert 0.7 < sum(follows) / len(follows) < 0.85


def test_no_user_buys_an_item_twice_and_times_increase(world):
    assert not world.duplicated(["user_id", "item_id"]).any()
    assert (world.groupby("user_id")["timestamp"].diff().dropna() > 0).all()


def test_a_world_without_users_is_refused():
    with pytest.raises(ValueError, match="synthetic_users is 0"):
        synthetic_interactions(0)
