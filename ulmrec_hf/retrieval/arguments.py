"""The settings of the retrieval stage."""

from dataclasses import dataclass, field, fields

from ..stages import check_types

SYSTEMS = ("popularity", "item_knn", "text", "lrurec", "narm", "bert4rec", "sasrec", "hybrid")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class RetrieverArguments:
    """Which retriever brings the candidates, how many, and how it is fitted."""

    retriever: str = field(
        default="lrurec", metadata={"help": "Whose candidates are ranked later.", "choices": list(SYSTEMS)}
    )
    num_candidates: int = field(default=20, metadata={"help": "Candidates per row, the retriever's top k."})
    train_positions: int = field(
        default=5, metadata={"help": "Newest positions of every user's train part that get candidates; 0 = all."}
    )
    max_history: int = field(default=50, metadata={"help": "Newest history items that a retriever reads."})
    refit: bool = field(
        default=False,
        metadata={
            "help": "For test rows, count item statistics (popularity, item_knn) in the train and validation items; "
            "learned weights stay."
        },
    )
    cross_fit: int = field(
        default=0,
        metadata={
            "help": "Folds of users: candidates of a fold's train positions come from a retriever fitted without its "
            "users, which costs a fit for each fold; 0 = from the retriever itself, which has learned from them."
        },
    )

    knn_window: int = field(
        default=50, metadata={"help": "item_knn: items at most this many steps apart count as neighbours."}
    )
    knn_backward_weight: float = field(
        default=0.5, metadata={"help": "item_knn: weight of the item before, where the item after weighs 1."}
    )
    knn_recency: float = field(
        default=0.6, metadata={"help": "item_knn: weight of a history item for each step back from the newest."}
    )
    knn_popularity_exponent: float = field(
        default=0.3,
        metadata={"help": "item_knn: each history item's weights are divided by its train count to this power."},
    )

    text_encoder: str = field(
        default="tfidf", metadata={"help": 'What reads the titles: "tfidf", or a sentence-transformers model.'}
    )
    text_recency: float = field(
        default=0.6, metadata={"help": "text: weight of a history item for each step back from the newest."}
    )
    text_neighbours: int = field(default=200, metadata={"help": "text: similar items that are kept for each item."})

    hybrid_components: list[str] = field(
        default_factory=lambda: ["lrurec", "sasrec", "item_knn", "text"],
        metadata={"help": "hybrid: the retrievers that it combines, each with the settings here."},
    )

    start_from_titles: bool = field(
        default=False,
        metadata={"help": "Neural retrievers: item embeddings start from the titles instead of from chance."},
    )
    hidden_size: int = field(default=64, metadata={"help": "Neural retrievers: width of embeddings and layers."})
    num_layers: int = field(default=2, metadata={"help": "Neural retrievers: number of blocks."})
    num_heads: int = field(default=2, metadata={"help": "bert4rec and sasrec: attention heads."})
    mask_probability: float = field(
        default=0.6, metadata={"help": "bert4rec: how probably an item is masked in training; one of a row always is."}
    )
    dropout: float = field(default=0.5, metadata={"help": "Neural retrievers: dropout probability."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Neural retrievers: peak learning rate of AdamW."})
    lr_scheduler_type: str = field(
        default="constant",
        metadata={
            "help": "Neural retrievers: course of the learning rate: constant, or linear or cosine, which fall to 0 "
            "all epochs (then let patience be as high).",
            "choices": list(SCHEDULES),
        },
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Neural retrievers: weight decay of AdamW."})
    batch_size: int = field(
        default=128, metadata={"help": "Neural retrievers: sequences per training step, on average."}
    )
    epochs: int = field(default=100, metadata={"help": "Neural retrievers: most epochs to train."})
    patience: int = field(
        default=5,
        metadata={
            "help": "Neural retrievers: stop after this many epochs without a better validation NDCG@10 and keep the "
            "best epoch; 0 = no validation, all epochs, the last one is kept."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of initial weights, dropout and the order of batches."})

    def __post_init__(self):
        check_types(self)
        if self.retriever not in SYSTEMS:
            raise ValueError(f"retriever must be one of {', '.join(SYSTEMS)}; got {self.retriever!r}.")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type must be in {', '.join(SCHEDULES)}; got {self.lr_scheduler_type!r}.")
        unknown = sorted(set(self.hybrid_components) - set(SYSTEMS[:-1]))
        if unknown:
            raise ValueError(f"hybrid_components holds {', '.join(unknown)}; it may hold {', '.join(SYSTEMS[:-1])}.")
        if not self.hybrid_components or len(set(self.hybrid_components)) < len(self.hybrid_components):
            raise ValueError(f"hybrid_components is {self.hybrid_components}; it must name some retrievers, each once.")
        if self.cross_fit == 1:
            raise ValueError("cross_fit must be 0 or at least 2: one fold would leave no users to fit on.")
        lowest = {"train_positions": 0, "patience": 0, "seed": 0, "cross_fit": 0}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type is int and value < lowest.get(item.name, 1):
                raise ValueError(f"{item.name} must be at least {lowest.get(item.name, 1)}; got {value}.")
            if item.type is float and not 0 <= value < float("inf"):
                raise ValueError(f"{item.name} must be a finite number of at least 0; got {value}.")
        for name in ("knn_recency", "text_recency"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1; got {getattr(self, name)}.")
        trained = self.hybrid_components if self.retriever == "hybrid" else [self.retriever]
        if {"bert4rec", "sasrec"} & set(trained) and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads; got {self.hidden_size}, {self.num_heads}.")
        for name in ("dropout", "mask_probability"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1; got {getattr(self, name)}.")
