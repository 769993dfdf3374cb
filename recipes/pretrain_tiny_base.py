"""Makes the small Llama that ships with the package: a whole-word tokenizer and a seeded pretraining on toy language.

    python recipes/pretrain_tiny_base.py --output_dir tiny_base

The model reads what a language model would know before it meets any user: the words of the toy world, what follows
what, and how to answer with the letter of the line that fits a description. It never sees a toy user, a catalogue or a
user token. About a quarter of an hour on 2 cores.
"""

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import IterableDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import TrlParser

from ulmrec_hf.data import synthetic as toy
from ulmrec_hf.files import atomic_folder
from ulmrec_hf.prompts import NONE, render_history
from ulmrec_hf.tasks.records import TASKS
from ulmrec_hf.tasks.templates import PromptTemplates
from ulmrec_hf.verbalizer import LETTERS

IGNORED = -100
MOST = 20  # candidates of the longest lists
STYLES = list(toy.STYLES)
WORDS = [word for words in toy.STYLES.values() for word in words] + list(toy.KINDS)
TEMPLATES = PromptTemplates.from_yaml()
Segments = list[tuple[str, bool]]  # pieces of text, and whether they carry loss
Marks = list[tuple[bool, bool, bool]]  # for every candidate: is it the answer, does its style fit, does its kind fit
Exercise = tuple[Segments, Marks]


@dataclass
class TinyBaseArguments:
    """What decides the tiny base."""

    output_dir: str = field(default="tiny_base", metadata={"help": "Where model.safetensors and the tokenizer go."})
    steps: int = field(default=3000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=64, metadata={"help": "Exercises a step."})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak learning rate of AdamW, cosine decay."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    num_layers: int = field(default=4, metadata={"help": "Depth of the model."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and exercises."})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer over whole words, single characters and bytes; spaces belong to the word that follows."""
    words = set(WORDS)
    sentences = (*toy.TASTE_SENTENCES, *toy.LIKED_SENTENCES, *toy.DISLIKED_SENTENCES)
    sentences += (*toy.LIKED_SUMMARIES, *toy.DISLIKED_SUMMARIES, NONE)
    fields = dict.fromkeys(("user", "history", "candidates", "preference", "letter", "rating"), "")
    sentences += tuple(TEMPLATES.render(task, **fields)[0] for task in TASKS)
    for sentence in sentences:
        for mark in "{}.,:?#()":
            sentence = sentence.replace(mark, " ")
        words.update(sentence.split())
    words -= {word for word in words if len(word) == 1}
    characters = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    characters.remove(" ")
    vocab: list[tuple[str, float]] = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocab += [(f"<0x{byte:02X}>", -50.0) for byte in range(256)]
    vocab += [(character, -10.0) for character in characters]
    # a word is one token, with and without its leading space; so are the joints of the prompt format
    vocab += [(form, -5.0) for word in sorted(words) for form in (word, "▁" + word)]
    vocab += [(joint, -5.0) for joint in ("###", ":\n", "\n-", ".\n", "?\n")]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        model_max_length=4096,
    )


# Lessons in order: what they teach, with how many candidates, and the share right that leads to the next one.
LESSONS = (("copy", 12, 0.7), ("copy", MOST, 0.6), ("choose", MOST, 1.0))


class Exercises(IterableDataset):
    """Endless seeded exercises; `lesson` says how far the model has come, and is moved on by the trainer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int):
        self.tokenizer, self.seed, self.batch_size = tokenizer, seed, batch_size
        self.lesson = 0
        self.newline = tokenizer.convert_tokens_to_ids("\n")

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rng = random.Random(self.seed)
        while True:
            name, count, _ = LESSONS[self.lesson]
            draw = rng.random()
            if name == "copy" or draw < 0.1:
                exercise = copy
            elif draw < 0.14:
                exercise = review_text
            elif draw < 0.22:
                exercise = describe
            else:
                exercise = choose
            for _ in range(self.batch_size):  # a batch of one kind pads little
                yield self.tokenized(exercise(rng, rng.randint(count - 4, count)))

    def tokenized(self, exercise: Exercise) -> dict[str, list]:
        segments, marks = exercise
        input_ids, labels = [], []
        for text, carries_loss in segments:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            input_ids += ids
            labels += ids if carries_loss else [IGNORED] * len(ids)
        # a candidate's line is marked at its end; the candidates are the last lines of a prompt
        ends = [place for place, token in enumerate(input_ids) if token == self.newline][-len(marks) :] if marks else []
        return {"input_ids": input_ids, "labels": labels, "line_ends": ends, "marks": marks}


def random_titles(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Distinct (style, kind), most of one or two kinds, as a retriever would bring them."""
    kinds = rng.sample(toy.KINDS, rng.choice((1, 1, 2, 3, 6)))
    found: dict[tuple[str, str], None] = {}
    while len(found) < count:
        kind = kinds[0] if rng.random() < 0.6 else rng.choice(kinds)
        if rng.random() < 0.15 or len(found) > 12:
            kind = rng.choice(toy.KINDS)
        found[rng.choice(STYLES), kind] = None
    titles = list(found)
    rng.shuffle(titles)
    return titles


def lines(titles: list[tuple[str, str]]) -> list[str]:
    return [" ".join(words) for words in titles]


def lettered(rng: random.Random, titles: list[str]) -> tuple[str, list[str]]:
    """Candidate lines and their letters; in short lists any of the letters."""
    letters = sorted(rng.sample(LETTERS[:MOST], len(titles)), key=LETTERS.index)
    return "\n".join(f"{letter}. {title}" for letter, title in zip(letters, titles, strict=True)), letters


def marks_of(titles: list[tuple[str, str]], target: int, style: str | None, kind: str | None) -> Marks:
    return [(place == target, title[0] == style, title[1] == kind) for place, title in enumerate(titles)]


def copy(rng: random.Random, count: int) -> Exercise:
    """A style, a kind or both, a list of candidates, and the letter of the one line that they fit."""
    titles = random_titles(rng, count)
    target = rng.randrange(count)
    style, kind = titles[target]
    part = rng.choice(("style", "kind", "both"))
    if part == "style" and sum(title[0] == style for title in titles) == 1:
        kind = None
    elif part == "kind" and sum(title[1] == kind for title in titles) == 1:
        style = None
    words = [rng.choice(toy.STYLES[style])] if style else []
    words += [kind] if kind else []
    candidates, letters = lettered(rng, lines(titles))
    header = rng.choice(("### User:\n", "### Preference:\n"))
    prompt = f"{header} {' '.join(words)}\n### Candidates:\n{candidates}\n### Answer:\n"
    return [(prompt, False), (letters[target], True)], marks_of(titles, target, style, kind)


def choose(rng: random.Random, count: int) -> Exercise:
    """A prompt of the ranking tasks in which words of taste, the history or both single out a candidate."""
    while True:
        titles = random_titles(rng, count)
        style = rng.choice(titles)[0] if rng.random() < 0.85 else None
        following = rng.choice(titles)[1] if style is None or rng.random() < 0.6 else None
        values = [3.0 * (title[0] == style) + 2.0 * (title[1] == following) for title in titles]
        if values.count(max(values)) == 1:
            break
    history = None
    if following is not None:
        last = next(kind for kind, next_kind in toy.NEXT_KIND.items() if next_kind == following)
        history = lines([*random_titles(rng, rng.randint(0, 8)), (rng.choice(STYLES), last)])
    words = [] if style is None else rng.sample(toy.STYLES[style], rng.randint(1, 3))
    target = values.index(max(values))
    candidates, letters = lettered(rng, lines(titles))
    fields = {
        "candidates": candidates,
        "letter": letters[target],
        "history": render_history(history or []),
        # after a space a word is the token that titles have; a preference comes without one, so both are met
        "user": " " + " ".join(words),
        "preference": rng.choice(("", " ")) + ", ".join(words),
    }
    prompt, answer = TEMPLATES.render("next_item" if history or rng.random() < 0.5 else "intent_next_item", **fields)
    return [(prompt, False), (answer, True)], marks_of(titles, target, style, following)


def describe(rng: random.Random, count: int) -> Exercise:
    """The description tasks: say a user's words in other words, or rate an item by them."""
    style = rng.choice(STYLES)
    words, others = (rng.sample(toy.STYLES[style], rng.randint(1, 3)) for _ in range(2))
    last = (rng.choice((style, rng.choice(STYLES))), rng.choice(toy.KINDS))
    history = lines([*random_titles(rng, rng.randint(1, 6)), last])
    fields = {
        "user": " " + " ".join(words),
        "preference": ", ".join(others),
        "history": render_history(history, [*(str(rng.randint(2, 5)) for _ in history[:-1]), "?"]),
        "rating": str((4 if last[0] == style else 2) + rng.randint(0, 1)),
    }
    prompt, answer = TEMPLATES.render(rng.choice(("index_to_preference", "preference_to_index", "rating")), **fields)
    return [(prompt, False), (answer, True), ("</s>", True)], []


def review_text(rng: random.Random, count: int) -> Exercise:
    """Running text of the toy language."""
    style, kind = rng.choice(STYLES), rng.choice(toy.KINDS)
    remark = rng.choice(toy.LIKED_SENTENCES + toy.DISLIKED_SENTENCES).format(kind=kind)
    taste = rng.choice(toy.TASTE_SENTENCES).format(style=rng.choice(toy.STYLES[style]))
    text = f"{remark} {taste} After a {kind} comes a {toy.NEXT_KIND[kind]}."
    return [("<s>", False), (text, True), ("</s>", True)], []


class LessonTrainer(Trainer):
    """Trainer whose LM head runs at the labelled positions only, and which moves on when a lesson is learned."""

    share_right = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        states = model.model(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
        ).hidden_states
        carries_loss = labels != IGNORED
        logits = model.lm_head(states[-1][:, :-1][carries_loss])
        losses = torch.nn.functional.cross_entropy(logits, labels[carries_loss], reduction="none")
        if len(losses) == len(labels):  # one letter a row: the lessons' own exercises
            self.share_right += 0.05 * (
                (logits.argmax(-1) == labels[carries_loss]).float().mean().item() - self.share_right
            )
            exercises = self.train_dataset
            if self.share_right > LESSONS[exercises.lesson][2] and exercises.lesson + 1 < len(LESSONS):
                exercises.lesson += 1
                self.share_right = 0.0
                print(f"step {self.state.global_step}: lesson {LESSONS[exercises.lesson][:2]}", flush=True)
        # every exercise weighs the same, whether its answer is one letter or a text
        answers = carries_loss.sum(1, keepdim=True).expand_as(labels)[carries_loss]
        loss = (losses / answers).sum() / len(labels)
        if "marks" in inputs:
            loss = loss + self.line_loss(model, states[-2], inputs["line_ends"], inputs["marks"])
        return (loss, None) if return_outputs else loss

    def line_loss(self, model, states: torch.Tensor, ends: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        """What the state before the last layer must tell at the end of each candidate's line: which line is the answer,
        and whether style and kind fit. One letter a list teaches little; this is learned at every line. Its head is
        thrown away."""
        real = ends >= 0
        rows = torch.arange(len(ends))[:, None]
        answer, *fits = model.line_head(model.model.norm(states[rows, ends])).unbind(-1)
        answer = answer.masked_fill(~real, -torch.inf).log_softmax(-1)
        fits = torch.stack(fits, -1)[real]
        fit_loss = torch.nn.functional.binary_cross_entropy_with_logits(fits, marks[..., 1:][real].float())
        return fit_loss - answer[marks[..., 0] & real].mean()


def collate(rows: list[dict[str, list]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[value] * (longest - len(row[name])) + row[name] for row in rows])

    mask = [[0] * (longest - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORED),
        "attention_mask": torch.tensor(mask),
    }
    if all(row["marks"] for row in rows):
        most = max(len(row["marks"]) for row in rows)
        batch["line_ends"] = torch.full((len(rows), most), -1)
        batch["marks"] = torch.zeros((len(rows), most, 3), dtype=torch.bool)
        for number, row in enumerate(rows):
            ends = torch.tensor(row["line_ends"]) + longest - len(row["input_ids"])
            batch["line_ends"][number, : len(ends)] = ends
            batch["marks"][number, : len(ends)] = torch.tensor(row["marks"])
    return batch


@torch.inference_mode()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, exercise, count: int, rows: int = 200
) -> float:
    """Share of fresh exercises of `count` candidates whose first letter is the model's most likely token."""
    rng = random.Random(1_000_003)
    right = 0
    for _ in range(rows // 50):
        prompts, answers = [], []
        for _ in range(50):
            segments, _ = exercise(rng, count)
            first = next(place for place, (_, carries_loss) in enumerate(segments) if carries_loss)
            prompts.append("".join(text for text, _ in segments[:first]))
            answers.append(segments[first][0])
        batch = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        best = (
            model(batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1).logits[:, -1].argmax(-1)
        )
        right += sum(tokenizer.convert_ids_to_tokens(best.tolist())[i] == answers[i] for i in range(50))
    return right / (rows // 50 * 50)


class Exam(TrainerCallback):
    """Prints now and then how many exercises the model gets right."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 250 == 0 or state.global_step == state.max_steps:
            model.eval()
            results = [
                f"{exercise.__name__} {count}: {accuracy(model, self.tokenizer, exercise, count):.2f}"
                for exercise in (copy, choose)
                for count in (4, 20)
            ]
            model.train()
            print(f"step {state.global_step}, share right of candidates: {', '.join(results)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    (args,) = TrlParser([TinyBaseArguments]).parse_args_and_config(args=argv)
    set_seed(args.seed)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=args.hidden_size, intermediate_size=2 * args.hidden_size, num_hidden_layers=args.num_layers,
            num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=4096,
            # finding a word again far away wants slow rotations, which heads of 16 channels have few of
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            # the usual 0.02 leaves attention in so narrow a model uniform: it then learns no letter for very long
            initializer_range=args.hidden_size**-0.5,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.line_head = torch.nn.Linear(args.hidden_size, 3)
    with atomic_folder(Path(args.output_dir)) as folder:
        trainer = LessonTrainer(
            model,
            TrainingArguments(
                output_dir=str(folder / "trainer"), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=200, adam_beta2=0.98,
                weight_decay=0.01, logging_steps=50, save_strategy="no", report_to="none", seed=args.seed, use_cpu=True,
                remove_unused_columns=False, disable_tqdm=False,
            ),
            data_collator=collate,
            train_dataset=Exercises(tokenizer, args.seed, args.batch_size),
            callbacks=[Exam(tokenizer)],
        )  # fmt: skip
        trainer.train()
        del model.line_head
        model.eval()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.rmtree(folder / "trainer", ignore_errors=True)
    size = (Path(args.output_dir) / "model.safetensors").stat().st_size
    print(f"{args.output_dir}: {model.num_parameters():,} parameters, {size:,} bytes, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
