"""User-aware recommendation with language models: users become tokens, a language model ranks their candidates.

The names below are imported when first used, so that importing the package is quick.
"""

__version__ = "0.1.0"
_MODULE_OF = {
    "AlignmentTasks": "tasks.dataset",
    "BERT4Rec": "retrieval.bert4rec",
    "Hybrid": "retrieval.hybrid",
    "Interactions": "data.interactions",
    "ItemKNN": "retrieval.item_knn",
    "KeyPhrases": "preferences.key_phrases",
    "LRURec": "retrieval.lrurec",
    "LeaveOneOut": "tables",
    "NARM": "retrieval.narm",
    "Popularity": "retrieval.popularity",
    "Recommender": "recommender",
    "Report": "report",
    "ResidualKMeans": "indexing.residual_kmeans",
    "SASRec": "retrieval.sasrec",
    "TitleText": "retrieval.text",
    "ULMRecTrainer": "trainer",
    "ULMRecTrainingArguments": "trainer",
    "UserIndex": "user_index",
    "UserIndexer": "indexing.indexer",
    "UserRanker": "ranker",
    "UserTokenizer": "tokenization_user",
    "load_base": "modeling",
    "load_retriever": "retrieval.base",
}
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
