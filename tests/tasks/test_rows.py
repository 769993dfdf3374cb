"""The six tasks: rendered text, tokens with loss, negatives, leaks, lengths."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.tasks.world import ITEMS, USERS, K, make_world, only, section
from ulmrec_hf.tables import LeaveOneOut
from ulmrec_hf.tasks.collators import ULMRecCollator
from ulmrec_hf.tasks.dataset import write_tasks
from ulmrec_hf.tasks.records import TASKS
from ulmrec_hf.tokenization_user import UserTokenizer
from ulmrec_hf.user_index import EarlierCodes, UserIndex


def _history(items):
    return "\n".join(f"- thing {item}" for item in items)


# ---------------------------------------------------------------- the text of each task


def test_next_item_test_row(rows, world):
    items = world.items(1)
    row = only(rows, "next_item", "test", 1)
    shown = "\n".join(f"{letter}. thing {item}" for letter, item in zip("ABCDEF", row["candidates"], strict=True))
    assert row["prompt"] == (
        "### Task:\nWhich item will this user buy next? Answer with its letter.\n"
        "### User:\n<a_0><b_1><c_3><d_7>\n"
        f"### History:\n{_history(items[-5:-1])}\n"
        f"### Candidates:\n{shown}\n"
        "### Answer:\n"
    )
    assert row["target"] == items[-1]
    assert row["completion"] == "ABCDEF"[row["label"]]
    assert row["candidates"][row["label"]] == items[-1]


def test_index_to_preference_row(rows, world):
    row = only(rows, "index_to_preference", "train", 2)
    assert row["prompt"] == ("### Task:\nWhat does this user prefer?\n### User:\n<a_0><b_2><c_3><d_7>\n### Answer:\n")
    assert row["completion"] == f"likes thing {world.items(2)[-3]}"  # of the whole train part
    assert (row["candidates"], row["label"], row["target"]) == ([], -1, 0)


def test_preference_to_index_row(rows, world):
    row = only(rows, "preference_to_index", "train", 2)
    assert row["prompt"] == (
        f"### Task:\nWhich user has this preference?\n### Preference:\nlikes thing {world.items(2)[-3]}\n### Answer:\n"
    )
    assert row["completion"] == "<a_0><b_2><c_3><d_7>"


def test_history_to_index_row(rows, world):
    row = only(rows, "history_to_index", "train", 2)
    items = world.items(2)
    assert row["prompt"] == (
        f"### Task:\nWhich user has this history?\n### History:\n{_history(items[-6:-2])}\n### Answer:\n"
    )
    assert row["completion"] == "<a_0><b_2><c_3><d_7>"


def test_rating_row(rows, world):
    items = world.items(3)
    row = only(rows, "rating", "train", 3)
    position = len(items) - 4  # the older of the two newest train positions
    past = "\n".join(f"- thing {item}: {item % 5 + 1}" for item in items[max(0, position - 4) : position])
    assert row["prompt"] == (
        "### Task:\nHow will this user rate the last item, from 1 to 5?\n"
        "### User:\n<a_0><b_3><c_3><d_7>\n"
        f"### Preference:\nlikes thing {items[position - 1]}\n"
        f"### History:\n{past}\n- thing {items[position]}: ?\n### Answer:\n"
    )
    assert row["completion"] == f"{items[position] % 5 + 1}"
    assert (row["target"], row["label"], row["candidates"]) == (items[position], -1, [])


def test_intent_next_item_row(rows, world):
    items = world.items(1)
    row = only(rows, "intent_next_item", "validation", 1)
    shown = "\n".join(f"{letter}. thing {item}" for letter, item in zip("ABCDEF", row["candidates"], strict=True))
    assert row["prompt"] == (
        "### Task:\nWhich item fits this preference best? Answer with its letter.\n"
        f"### Preference:\nlikes thing {items[-3]}\n### Candidates:\n{shown}\n### Answer:\n"
    )
    assert row["completion"] == "ABCDEF"[row["candidates"].index(items[-2])]


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_falls_on_the_completion_and_the_end_token_alone(rows, tokenizer, task):
    row = next(rows.rows(task, "train"))
    batch = ULMRecCollator(tokenizer)([row])
    supervised = batch["labels"][0][batch["labels"][0] != -100].tolist()
    if task in ("preference_to_index", "history_to_index"):
        expected = tokenizer.encode_user((0, 0, 3, 7))
    else:  # the tokenizer has one token a byte
        expected = [tokenizer.convert_tokens_to_ids(byte if byte != " " else "Ġ") for byte in row["completion"]]
    assert supervised == [*expected, tokenizer.eos_token_id]
    assert batch["input_ids"][0, -len(supervised) :].tolist() == supervised


# ---------------------------------------------------------------- positions and candidates


def test_train_rows_are_the_newest_positions_of_the_train_part(world, tokenizer):
    for setting, count in ((2, 2), (0, None), (100, None)):
        rows = world.rows(tokenizer, train_positions=setting)
        for user in range(USERS):
            train = len(world.items(user)) - 2
            targets = [row["target"] for row in rows.rows("next_item", "train") if row["user"] == user]
            assert targets == world.items(user)[max(1, train - (count or train)) : train]


def test_a_miss_is_kept_with_label_minus_1_and_no_letter(rows, world):
    for split, place in (("validation", -2), ("test", -1)):
        evaluated = list(rows.rows("next_item", split))
        assert [row["user"] for row in evaluated] == list(range(USERS))
        misses = [row for row in evaluated if row["label"] == -1]
        assert misses
        for row in evaluated:
            target = world.items(row["user"])[place]
            assert row["target"] == target
            assert (row["label"] == -1) == (target not in row["candidates"])
            assert bool(row["completion"]) == (row["label"] >= 0)


def test_the_retriever_s_order_is_kept_or_shuffled_by_the_seed(world, rows, tokenizer):
    retrieved = world.candidates.filter(pc.equal(world.candidates["split"], "test"))["items"].to_pylist()
    assert [row["candidates"] for row in rows.rows("next_item", "test")] == retrieved
    shuffled = [
        [row["candidates"] for row in shuffled_rows.rows("next_item", "test")]
        for seed in (1, 1, 2)
        for shuffled_rows in [world.rows(tokenizer, evaluation_order="shuffled", task_seed=seed)]
    ]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert shuffled[0] != retrieved
    assert [sorted(items) for items in shuffled[0]] == [sorted(items) for items in retrieved]


@pytest.mark.parametrize(("share", "hard"), [(0.0, 0), (0.4, 2), (1.0, 5)])
def test_negatives_are_hard_and_random_in_the_stated_share(world, tokenizer, share, hard):
    rows = world.rows(tokenizer, hard_negatives=share, train_positions=0)
    retrieved = {
        (row["user"], row["position"]): set(row["items"])
        for row in world.candidates.to_pylist()
        if row["split"] == "train"
    }
    from_retriever, places = [], []
    for (user, position), row in zip(
        rows.keys("next_item", "train").tolist(), rows.rows("next_item", "train"), strict=True
    ):
        history = set(world.items(user)[:position])
        assert len(set(row["candidates"])) == K
        assert row["target"] in row["candidates"] and not history & set(row["candidates"])
        found = retrieved[user, position] - {row["target"]}
        assert len(found & set(row["candidates"])) >= min(hard, len(found))
        from_retriever.append(len(found & set(row["candidates"])))
        places.append(row["label"])
    assert abs(np.mean(from_retriever) - hard - (5 - hard) * 5 / 35) < 0.6
    assert set(places) == set(range(K))  # the target's letter is permuted


def test_a_small_catalogue_gives_fewer_negatives(world, tokenizer):
    row = next(world.rows(tokenizer, num_candidates=52, hard_negatives=0.0).rows("next_item", "train"))
    position = world.items(0).index(row["target"])
    assert sorted([*row["candidates"], *world.items(0)[:position]]) == list(range(1, ITEMS + 1))


def test_random_negatives_do_not_avoid_what_the_user_chooses_later(tokenizer):
    world = make_world(users=60)
    rows = world.rows(tokenizer, hard_negatives=0.0)
    later = 0
    for (user, position), row in zip(
        rows.keys("next_item", "train").tolist(), rows.rows("next_item", "train"), strict=True
    ):
        later += len(set(world.items(user)[position + 1 :]) & set(row["candidates"]))
    assert later > 20  # about 0.36 a row by chance, and 0 if the future were looked at


# ---------------------------------------------------------------- ratings and preferences


def test_unknown_ratings_are_skipped_counted_and_reported(world, tokenizer, tmp_path, caplog):
    ratings = [[float(item % 5 + 1) for item in world.items(user)] for user in range(USERS)]
    ratings[0][-3] = None  # user 0's newest train target
    ratings[1][-1] = float("nan")  # user 1's test target
    ratings[2][-3] = 3.5
    changed = make_world(ratings=ratings)
    rows = changed.rows(tokenizer)
    counts = write_tasks(rows, tmp_path)
    assert counts["rating"] == {"train": 2 * USERS - 1, "validation": USERS, "test": USERS - 1}
    assert "rating, train: 1 rows left out: the target's rating is unknown" in caplog.text
    assert "- 1 rows of rating, test: the target's rating is unknown." in (tmp_path / "README.md").read_text()
    validation = only(rows, "rating", "validation", 0)
    assert f"- thing {world.items(0)[-3]}: unknown\n- thing {world.items(0)[-2]}: ?" in validation["prompt"]
    assert [row["completion"] for row in rows.rows("rating", "train") if row["user"] == 2][-1] == "3.5"


def test_a_test_row_does_not_show_the_validation_item_s_rating(rows, world):
    items = world.items(0)
    prompt = only(rows, "rating", "test", 0)["prompt"]
    assert f"- thing {items[-2]}: unknown\n- thing {items[-1]}: ?\n" in prompt
    assert f"- thing {items[-3]}: {items[-3] % 5 + 1}\n" in prompt


def test_a_source_without_ratings_has_no_rating_rows(tokenizer):
    world = make_world(ratings=[[None] * (7 + user % 3) for user in range(USERS)])
    rows = world.rows(tokenizer)
    assert list(rows.rows("rating", "train")) == []
    assert len(list(rows.rows("next_item", "train"))) == 2 * USERS


def test_a_mixture_without_any_row_is_refused(tokenizer):
    world = make_world(ratings=[[None] * (7 + user % 3) for user in range(USERS)])
    with pytest.raises(ValueError, match=r"mixture is \{'rating': 1.0\}, but these tasks have no training rows"):
        next(world.rows(tokenizer, mixture={"rating": 1.0}).rows("mixture", "train"))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_training_rows_with_a_target_leaves_the_index_out(world, tokenizer, share):
    rows = world.rows(tokenizer, anonymous_share=share, train_positions=0)
    kept = world.rows(tokenizer, train_positions=0)
    for task in ("next_item", "rating", "index_to_preference"):
        found = list(rows.rows(task, "train"))
        left_out = [section(row["prompt"], "User") == "" for row in found]
        expected = 0 if task == "index_to_preference" else share
        assert np.mean(left_out) == pytest.approx(expected, abs=0.25 if 0 < share < 1 else 0)
        for row, other, empty in zip(found, kept.rows(task, "train"), left_out, strict=True):
            user = section(other["prompt"], "User")
            assert user and row["prompt"] == (other["prompt"].replace(user, "") if empty else other["prompt"])
    for split in ("validation", "test"):
        assert list(rows.rows("next_item", split)) == list(kept.rows("next_item", split))


def test_users_without_a_preference_get_no_preference_rows(world, tokenizer):
    rows = world.with_preferences(" ", user=0).rows(tokenizer)
    assert [row["user"] for row in rows.rows("index_to_preference", "train")] == [1, 2, 3, 4, 5]
    assert rows.skipped["index_to_preference"] == {"train": 1}
    assert section(only(rows, "intent_next_item", "test", 0)["prompt"], "Preference") == "(none)"


def test_preferences_come_from_before_the_target(rows, world):
    for task in ("rating", "intent_next_item"):
        for split in ("train", "validation", "test"):
            for (user, position), row in zip(rows.keys(task, split).tolist(), rows.rows(task, split), strict=True):
                items = world.items(user)
                last_seen = items[min(position, len(items) - 2) - 1]
                assert section(row["prompt"], "Preference") == f"likes thing {last_seen}"


def test_a_training_row_spells_the_index_before_its_target(world, tokenizer):
    lengths = [len(world.items(user)) - 3 for user in range(USERS)]  # targets of the train part
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    place = np.concatenate([np.arange(1, count + 1) for count in lengths])
    codes = np.stack([np.full(len(place), 7), place, place, place], axis=1)
    users = UserIndex(world.users.user_ids, world.users.codes, 8, earlier=EarlierCodes(offsets, codes))
    rows = replace(world, users=users).rows(tokenizer, train_positions=0)
    for task in ("next_item", "rating"):
        for split in ("train", "validation", "test"):
            for (user, position), row in zip(rows.keys(task, split).tolist(), rows.rows(task, split), strict=True):
                before = max(0, len(world.items(user)) - 2 - position)
                expected = f"<a_7><b_{before}><c_{before}><d_{before}>" if before else users.spell(f"u{user}")
                assert bool(before) == (split == "train") and section(row["prompt"], "User") == expected
    for task in ("history_to_index", "preference_to_index"):
        assert [row["completion"] for row in rows.rows(task, "train")] == [users.spell(user) for user in users]
    few = UserIndex(users.user_ids, users.codes, 8, earlier=EarlierCodes(np.arange(USERS + 1), codes[:USERS]))
    with pytest.raises(ValueError, match=r"user 'u0' has no codes without the newest 2 .*raise train_positions"):
        list(replace(world, users=few).rows(tokenizer).rows("next_item", "train"))
    codes[-1, 2] = 9  # the tokenizer has eight a level
    larger = UserIndex(users.user_ids, users.codes, 16, earlier=EarlierCodes(offsets, codes))
    with pytest.raises(ValueError, match="the tokenizer has no token <c_9> of this user index"):
        replace(world, users=larger).rows(tokenizer)


# ---------------------------------------------------------------- length


def test_a_long_prompt_loses_its_oldest_history_first(world, tokenizer, rows):
    row = only(rows, "next_item", "test", 0)
    length = len(tokenizer(row["prompt"])["input_ids"]) + 2
    shorter = world.rows(tokenizer, max_length=length - 1)
    cut = only(shorter, "next_item", "test", 0)
    items = world.items(0)
    assert cut["prompt"] == row["prompt"].replace(_history(items[-5:-1]), _history(items[-4:-1]))
    assert cut["candidates"] == row["candidates"]
    exact = world.rows(tokenizer, max_length=length)
    assert only(exact, "next_item", "test", 0)["prompt"] == row["prompt"]
    for task in TASKS:
        for row in shorter.rows(task, "train"):
            assert len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 <= length - 1


def test_the_rated_item_is_never_dropped(world, tokenizer, rows):
    row = only(rows, "rating", "train", 0)
    fixed = len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1
    past = section(row["prompt"], "History").rsplit("\n", 1)[0]
    shorter = world.rows(tokenizer, max_length=fixed - len(past) + 3)
    target = row["target"]
    key = shorter.keys("rating", "train").tolist()[0]
    assert section(shorter.row("rating", "train", *key)["prompt"], "History") == f"- thing {target}: ?"


def test_a_row_that_cannot_fit_names_max_length(world, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"max_length is 100, but the next_item row of user 'u0' has \d+ tokens"):
        write_tasks(world.rows(tokenizer, max_length=100), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_history_everything_else_stays(world, tokenizer, rows):
    without = world.rows(tokenizer, max_history=0)
    for full, bare in zip(rows.rows("next_item", "test"), without.rows("next_item", "test"), strict=True):
        assert section(bare["prompt"], "History") == "(none)"
        assert bare["prompt"] == full["prompt"].replace(section(full["prompt"], "History"), "(none)")
        assert {**bare, "prompt": ""} == {**full, "prompt": ""}


def test_a_prompt_without_history_is_counted_with_what_stands_for_it(world, tokenizer):
    rows = world.rows(tokenizer, max_history=0)
    row = only(rows, "next_item", "test", 0)
    length = len(tokenizer(row["prompt"])["input_ids"]) + 2
    assert only(world.rows(tokenizer, max_history=0, max_length=length), "next_item", "test", 0) == row
    with pytest.raises(ValueError, match=f"has {length} tokens even without history"):
        only(world.rows(tokenizer, max_history=0, max_length=length - 1), "next_item", "test", 0)


def test_tables_that_do_not_fit_together_are_refused(world, tokenizer, tmp_path):
    def render(task="next_item", **changes):
        list(replace(world, **changes).rows(tokenizer).rows(task, "train"))

    with pytest.raises(ValueError, match="candidates: user 'u0' has no train row for position"):
        render(candidates=world.candidates.slice(8))
    with pytest.raises(ValueError, match="preferences: user 'u0' has no row for position"):
        render("rating", preferences=world.preferences.slice(5))
    with pytest.raises(ValueError, match="user_index: user 'u0' has no index"):
        render(users=UserIndex(["u9"], np.array([[0, 0, 0, 0]], np.uint16), 8))
    short = pa.table({"user": pa.array([0], pa.int32()), "user_id": ["u0"], "items": [[1, 2]]})
    with pytest.raises(ValueError, match="1 users have fewer than 3 items and cannot be split, the first is 'u0'"):
        render(data=LeaveOneOut({**world.data._tables, "sequences": short}))
    templates = tmp_path / "templates.yaml"
    templates.write_text(
        "\n".join(f"{task}: {{prompt: 'x {{colour}}', completion: y}}" for task in TASKS), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"names the field \{colour\}"):
        world.rows(tokenizer, prompt_templates=str(templates))


@pytest.mark.data
def test_plain_llama_2_titles_are_cut_at_32_tokens(shared):
    llama = UserTokenizer.from_base(shared / "models" / "llama2_tokenizer", codebook_size=8)
    title = "Ultra " * 60
    rows = make_world(titles={1: title}).rows(llama, max_length=2000)
    assert len(llama(rows._titles[1], add_special_tokens=False)["input_ids"]) <= 32
    assert title.startswith(rows._titles[1]) and len(rows._titles[1]) > 60
