"""ULMRecTrainer by itself: what it trains at which rate, how it ranks, and the ranker it gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import TrainerCallback, set_seed

from tests.tiny_llama import make_base
from ulmrec_hf import ULMRecTrainer, ULMRecTrainingArguments, UserIndex, load_base
from ulmrec_hf.tasks.records import TASKS
from ulmrec_hf.verbalizer import LetterVerbalizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
USERS = UserIndex(["u1", "u2"], np.array([[1, 2], [3, 4]]), 8)


def rows(count: int = 12) -> Dataset:
    """Rows of which the right letter follows from the user."""
    columns = {"prompt": [], "completion": [], "candidates": [], "label": []}
    for place in range(count):
        label = place % 2
        user = USERS.spell(USERS.user_ids[label])
        columns["prompt"].append(f"### User:\n{user}\n### Candidates:\nA. red soap\nB. green tea\n### Answer:\n")
        columns["completion"].append("AB"[label])
        columns["candidates"].append([1, 2])
        columns["label"].append(label)
    return Dataset.from_dict(columns)


@pytest.fixture
def parts(tmp_path):
    model, tokenizer = load_base(str(make_base(tmp_path / "base", tied=True)), USERS, lora_r=4)
    arguments = {"use_cpu": True, "bf16": False, "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    arguments |= {"load_best_model_at_end": False, "per_device_train_batch_size": 4, "logging_strategy": "no"}

    def make(train_dataset=None, **settings):
        return ULMRecTrainer(
            model,
            ULMRecTrainingArguments(str(tmp_path / "out"), **{**arguments, **settings}),
            train_dataset=rows() if train_dataset is None else train_dataset,
            eval_dataset=rows(4),
            processing_class=tokenizer,
        )

    return model, tokenizer, make


def trained_rows(model):
    return {name: weight for name, weight in model.named_parameters() if "trainable_tokens" in name}


def test_user_tokens_learn_at_their_own_rate(parts):
    model, _, make = parts
    trainer = make(learning_rate=1e-4, user_token_learning_rate=0.5)
    groups = trainer.create_optimizer().param_groups
    (own,) = [group for group in groups if group["lr"] == 0.5]
    assert {id(weight) for weight in own["params"]} == {id(weight) for weight in trained_rows(model).values()}
    assert own["weight_decay"] == 0 and {group["lr"] for group in groups} == {1e-4, 0.5}
    assert len({id(weight) for group in groups for weight in group["params"]}) == sum(
        weight.requires_grad for weight in model.parameters()
    )


def test_tuning_moves_user_tokens_and_no_other_row(parts):
    model, tokenizer, make = parts
    before = model.get_input_embeddings().weight.detach().clone()
    tuned = {name: weight.detach().clone() for name, weight in trained_rows(model).items()}
    make(learning_rate=1e-4, user_token_learning_rate=0.05, max_steps=3).train()
    assert all(not torch.equal(weight, tuned[name]) for name, weight in trained_rows(model).items())
    merged = model.merge_and_unload().get_input_embeddings().weight
    new = [token for level in tokenizer.user_token_ids for token in level]
    old = [token for token in range(len(tokenizer)) if token not in set(new)]
    assert torch.equal(merged[old], before[old])


def test_what_the_user_decides_is_learned_and_evaluated_by_letters(parts):
    _, tokenizer, make = parts
    trainer = make(learning_rate=1e-3, user_token_learning_rate=0.2, max_steps=30)
    assert trainer.verbalizer.ids == LetterVerbalizer(tokenizer, rows(1)[0]["prompt"], 2).ids
    trainer.train()
    metrics = trainer.evaluate(rows(6))  # rows that are still text
    assert metrics["eval_recall@5"] == 1 and metrics["eval_ndcg@10"] == pytest.approx(1)
    assert trainer.evaluate() == pytest.approx(trainer.evaluate(rows(4)), rel=1e3)  # but for the times
    scores = trainer.rank(rows(5))
    assert scores.shape == (5, 2) and scores.dtype == np.float32
    assert scores.argmax(1).tolist() == [0, 1, 0, 1, 0]


def test_a_trainer_without_evaluation_rows_reads_the_letters_when_it_ranks(parts, tmp_path):
    model, tokenizer, _ = parts
    args = ULMRecTrainingArguments(
        str(tmp_path / "ranking"), use_cpu=True, bf16=False, eval_strategy="no", load_best_model_at_end=False
    )
    trainer = ULMRecTrainer(model, args, processing_class=tokenizer)
    assert trainer.verbalizer is None
    assert trainer.rank(rows(3)).shape == (3, 2) and len(trainer.verbalizer.ids) == 2


def test_the_embedded_base_has_a_name():
    model, tokenizer = load_base("embedded", USERS)
    assert tokenizer.encode_user([1, 2]) == tokenizer("<a_1><b_2>")["input_ids"]
    assert model.config.max_position_embeddings >= 4096


def test_every_token_of_a_completion_counts_the_same_but_for_the_weight_of_its_task(parts):
    _, tokenizer, make = parts
    names = ["rating", "next_item"]
    columns = {"prompt": ["who?\n"] * 2, "completion": ["A", "red soap"], "task": [0, 1]}
    features = Features({"prompt": Value("string"), "completion": Value("string"), "task": ClassLabel(names=names)})
    mixture = Dataset.from_dict(columns, features=features)
    model = SimpleNamespace(logits=None)
    for weights in ({}, {"next_item": 3.0}):
        trainer = make(train_dataset=mixture, loss_weights=weights)
        batch = trainer.data_collator(list(trainer.train_dataset))
        labels = batch["labels"]
        model.logits = torch.randn(*labels.shape, len(tokenizer), generator=torch.Generator().manual_seed(0))
        log, losses, total = model.logits.log_softmax(-1), 0.0, 0.0
        for row, weight in enumerate((1.0, weights.get("next_item", 1.0))):
            for place in range(1, labels.shape[1]):
                if labels[row, place] != -100:
                    losses = losses - weight * log[row, place - 1, labels[row, place]]
                    total += weight
        count = trainer._get_num_items_in_batch([{"passes": [batch]}], labels.device)
        assert count == total
        shares = trainer.loss_shares()
        assert shares["next_item"] == pytest.approx(1 - 2 / total) and sum(shares.values()) == pytest.approx(1)
        loss = trainer.compute_loss(lambda **inputs: model, batch, num_items_in_batch=count)
        torch.testing.assert_close(loss, losses / total)


def test_passes_change_the_loss_and_the_gradient_by_rounding_alone(parts):
    model, _, make = parts
    found = []
    for most in (4, 1):
        trainer = make(per_device_train_batch_size=most, gradient_accumulation_steps=4 // most)
        step = next(iter(trainer.get_train_dataloader()))
        assert len(step["passes"]) >= 4 // most
        model.zero_grad()
        count = trainer._get_num_items_in_batch([step], model.device)
        loss = trainer.training_step(model, step, count)
        found.append((loss, {name: weight.grad.clone() for name, weight in trained_rows(model).items()}))
    (loss, gradients), (other, others) = found
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-6)


class Killed(Exception):
    """Instead of a signal."""


class KillAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("killed", [2, 5, 8], ids=["first epoch", "second epoch", "third epoch"])
def test_a_killed_training_resumes_exactly(tmp_path, killed):
    base = str(make_base(tmp_path / "base", tied=True))
    arguments = {"use_cpu": True, "bf16": False, "eval_strategy": "no", "disable_tqdm": True, "num_train_epochs": 3}
    arguments |= {"load_best_model_at_end": False, "per_device_train_batch_size": 4, "save_steps": 1}

    def train(folder, callbacks=(), resume=None):
        set_seed(0)
        model, tokenizer = load_base(base, USERS, lora_r=4, lora_dropout=0.3)
        args = ULMRecTrainingArguments(str(folder), learning_rate=0.01, **arguments)
        parts = {"train_dataset": rows(), "processing_class": tokenizer, "callbacks": [*callbacks]}
        ULMRecTrainer(model, args, **parts).train(resume_from_checkpoint=resume)
        return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}

    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", [KillAfter(killed)])
    torch.manual_seed(99)  # a new process starts with another random state
    resumed = train(tmp_path / "killed", resume=str(tmp_path / "killed" / f"checkpoint-{killed - 1}"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_setting(parts):
    model, _, make = parts
    trainer = make(max_steps=2)
    with torch.no_grad():
        next(iter(trained_rows(model).values())).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"The loss of step 1 is nan: lower learning_rate \(0.0001\)"):
        trainer.train()


def test_weights_of_tasks_need_rows_that_name_theirs(parts):
    _, _, make = parts
    with pytest.raises(ValueError, match=r"loss_weights is .*the training rows have no column task"):
        make(loss_weights={"next_item": 2.0})
    with pytest.raises(ValueError, match=r"loss_weights is .*must give a number for some of next_item"):
        make(loss_weights='{"nonsense": 2}')


def test_a_step_of_tasks_that_do_not_count_teaches_nothing(parts):
    model, _, make = parts
    features = Features({"prompt": Value("string"), "completion": Value("string"), "task": ClassLabel(names=[*TASKS])})
    columns = {"prompt": ["who?\n"] * 8, "completion": ["A"] * 8, "task": [0] * 4 + [1] * 4}
    half, none = ({**columns, "task": tasks} for tasks in (columns["task"], [1] * 8))
    weights = {[*TASKS][1]: 0.0}
    trainer = make(train_dataset=Dataset.from_dict(half, features=features), loss_weights=weights)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4, 8)])
    count = trainer._get_num_items_in_batch([{"passes": [batch]}], model.device)
    assert trainer.training_step(model, {"passes": [batch]}, count) == 0
    with pytest.raises(ValueError, match=r"loss_weights is .*so that no training row counts"):
        make(train_dataset=Dataset.from_dict(none, features=features), loss_weights=weights)


def test_a_task_without_training_rows_is_refused(parts):
    _, _, make = parts
    with pytest.raises(ValueError, match="There is nothing to train on"):
        make(train_dataset=rows().select([])).train()


def test_batches_that_nothing_would_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train_sampling_strategy is 'group_by_length'"):
        ULMRecTrainingArguments(str(tmp_path), train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="max_tokens_per_pass is -1"):
        ULMRecTrainingArguments(str(tmp_path), max_tokens_per_pass=-1)
