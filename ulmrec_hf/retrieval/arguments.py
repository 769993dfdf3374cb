"""The settings of the retrieval stage, and the names of the retrievers."""

from dataclasses import dataclass, field, fields

from ..registry import Registry
from ..stages import check_types, setting

# each by the `model_type` in its config.json; they stand here, since settings are checked without importing torch
RETRIEVERS = Registry(
    "retriever",
    popularity=f"{__package__}.popularity:Popularity",
    item_knn=f"{__package__}.item_knn:ItemKNN",
    text=f"{__package__}.text:TitleText",
    lrurec=f"{__package__}.lrurec:LRURec",
    narm=f"{__package__}.narm:NARM",
    bert4rec=f"{__package__}.bert4rec:BERT4Rec",
    sasrec=f"{__package__}.sasrec:SASRec",
    hybrid=f"{__package__}.hybrid:Hybrid",
)
# which no retriever reads
STAGE_SETTINGS = {"retriever", "num_candidates", "train_positions", "refit", "cross_fit", "id_only"}
_NOT_FROM_TITLES = {"popularity", "item_knn", "text", "hybrid"}  # start_from_titles is not for them
SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class RetrieverArguments:
    """Which retriever finds the candidates, how many per row, and how it is fitted.

    Raises:
        ValueError: a setting is unknown to the registry, out of its range, or of the wrong type.
    """

    retriever: str = setting(
        "lrurec",
        "The retriever that finds the candidates: popularity, item_knn, text, lrurec, narm, bert4rec, sasrec, hybrid, "
        "or a registered one.",
    )
    num_candidates: int = setting(20, "Candidates per row: the retriever's top k.")
    train_positions: int = setting(5, "How many of the newest train positions of each user get candidates; 0 = all.")
    max_history: int = setting(50, "How many of the newest history items a retriever reads.")
    refit: bool = setting(
        False,
        "For test rows, recount item statistics (popularity, item_knn) over the train and validation items; learned "
        "weights stay.",
    )
    cross_fit: int = setting(
        0,
        "Folds of users: candidates of a fold's train positions come from a retriever fitted without its users, at "
        "the cost of one more fit per fold; 0 = from the retriever itself, which was trained on them.",
    )
    id_only: bool = setting(
        False,
        "Also fit and rank the same retriever without titles (start_from_titles off), for comparison, at the cost of "
        "one more fit; reports call it <retriever>_ids.",
    )

    knn_window: int = setting(50, "item_knn: items at most this far apart are neighbours.")
    knn_backward_weight: float = setting(
        0.5, "item_knn: weight of the preceding item; the following item has weight 1."
    )
    knn_recency: float = setting(0.6, "item_knn: factor on a history item's weight per step back from the newest.")
    knn_popularity_exponent: float = setting(
        0.3, "item_knn: a history item's weights are divided by its count to this power."
    )

    text_encoder: str = setting("tfidf", 'Encoder of the titles: "tfidf", or a sentence-transformers model.')
    text_recency: float = setting(0.6, "text: factor on a history item's weight per step back from the newest.")
    text_neighbours: int = setting(200, "text: how many similar items are kept per item.")

    hybrid_components: list[str] = field(
        default_factory=lambda: ["lrurec", "sasrec", "item_knn", "text"],
        metadata={"help": "hybrid: the retrievers it combines, each fitted with the settings here."},
    )

    start_from_titles: bool = setting(
        False, "Neural retrievers: initialise item embeddings from titles, not at random."
    )
    hidden_size: int = setting(64, "Neural retrievers: width of embeddings and layers.")
    num_layers: int = setting(2, "Neural retrievers: number of blocks.")
    num_heads: int = setting(2, "bert4rec and sasrec: attention heads.")
    mask_probability: float = setting(
        0.6, "bert4rec: probability of masking an item in training (at least one per row)."
    )
    dropout: float = setting(0.5, "Neural retrievers: dropout probability.")
    learning_rate: float = setting(1e-3, "Neural retrievers: peak learning rate of AdamW.")
    lr_scheduler_type: str = setting(
        "constant",
        "Neural retrievers: learning rate schedule: constant, or linear or cosine, which decay to 0 over all epochs "
        "(set patience to the number of epochs then).",
        choices=list(SCHEDULES),
    )
    weight_decay: float = setting(0.01, "Neural retrievers: weight decay of AdamW.")
    batch_size: int = setting(128, "Neural retrievers: mean sequences per training step.")
    epochs: int = setting(100, "Neural retrievers: maximum number of epochs.")
    patience: int = setting(
        5,
        "Neural retrievers: stop after this many epochs without a better validation NDCG@10 and keep the best epoch; "
        "0 = no validation: train all epochs and keep the last.",
    )
    seed: int = setting(42, "Seed of initial weights, dropout and the order of batches.")

    def __post_init__(self):
        check_types(self)
        RETRIEVERS.check(self.retriever)
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type must be in {', '.join(SCHEDULES)}; got {self.lr_scheduler_type!r}.")
        allowed = [name for name in RETRIEVERS if name != "hybrid"]
        unknown = sorted(set(self.hybrid_components) - set(allowed))
        if unknown:
            raise ValueError(f"hybrid_components holds {', '.join(unknown)}; it may hold {', '.join(allowed)}.")
        if not self.hybrid_components or len(set(self.hybrid_components)) < len(self.hybrid_components):
            raise ValueError(f"hybrid_components is {self.hybrid_components}; it must name some retrievers, each once.")
        if self.cross_fit == 1:
            raise ValueError("cross_fit must be 0 or at least 2: one fold would leave no users to fit on.")
        if self.id_only and (not self.start_from_titles or self.retriever in _NOT_FROM_TITLES):
            raise ValueError(
                "id_only fits a retriever without titles too: it needs one neural retriever with start_from_titles "
                f"true; got {self.retriever} with start_from_titles {str(self.start_from_titles).lower()}."
            )
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
