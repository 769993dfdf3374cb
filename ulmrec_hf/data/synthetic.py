"""The toy world: users with a hidden taste, items whose titles show it, reviews that express it in plain English.

A purchase follows two laws. The *sequence* law picks what kind of thing comes next (a tent, then a lantern), the
*taste* law which style of it (an ocean one, a budget one). Young customers follow the crowd: what they buy says
little of their taste, but their reviews express it all the same. Later purchases, the held-out ones among them, follow
taste. So two users with the same history go on to choose differently, and only what they wrote, hence the user index,
shows the difference. The taste itself is in no column.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from .columns import RAW_INTERACTIONS

# What a style is called in a title, and the words a reviewer uses for it: prices, qualities, themes.
STYLES = {
    "budget": ("budget", "cheap", "bargain"),
    "premium": ("premium", "luxury", "elegant"),
    "rugged": ("rugged", "sturdy", "durable"),
    "compact": ("compact", "small", "portable"),
    "handmade": ("handmade", "artisan", "crafted"),
    "organic": ("organic", "natural", "sustainable"),
    "neon": ("neon", "bright", "colorful"),
    "plain": ("plain", "simple", "minimal"),
    "ocean": ("ocean", "waves", "seaside"),
    "forest": ("forest", "woodland", "trees"),
    "desert": ("desert", "dunes", "sand"),
    "galaxy": ("galaxy", "stars", "planets"),
    "floral": ("floral", "flowers", "blossoms"),
    "retro": ("retro", "vintage", "nostalgic"),
    "animal": ("animal", "pets", "wildlife"),
    "music": ("music", "melodies", "songs"),
}
# Kinds in the order in which they are bought; the last leads back to the first.
ACTIVITIES = {
    "camping": ("tent", "lantern", "stove", "hammock"),
    "kitchen": ("mug", "kettle", "teapot", "tray"),
    "office": ("notebook", "pencil", "lamp", "clock"),
    "travel": ("suitcase", "pillow", "bottle", "umbrella"),
    "garden": ("planter", "shovel", "bench", "gloves"),
    "sport": ("racket", "jersey", "towel", "helmet"),
}
KINDS = tuple(kind for kinds in ACTIVITIES.values() for kind in kinds)
NEXT_KIND = {kind: kinds[(place + 1) % len(kinds)] for kinds in ACTIVITIES.values() for place, kind in enumerate(kinds)}

TASTE_SENTENCES = (
    "I love {style} things and always look for them.",
    "For me it has to be {style}, nothing else will do.",
    "My home is full of {style} and I want more.",
    "Anything {style} wins me over.",
    "I care about {style} most.",
)
LIKED_SENTENCES = ("This {kind} is just right.", "Very happy with this {kind}.", "A great {kind}, would buy again.")
DISLIKED_SENTENCES = ("This {kind} is not for me.", "The {kind} is okay but not my style.", "I gave this {kind} away.")
LIKED_SUMMARIES = ("Love it", "Just right", "Very happy")
DISLIKED_SUMMARIES = ("Not for me", "Okay", "Not my style")


@dataclasses.dataclass(frozen=True)
class ToyWorld:
    """The laws of the toy world; weights are in log-odds."""

    styles_per_kind: int = 15  # of the 16 styles, how many each kind of thing comes in
    min_purchases: int = 7
    max_purchases: int = 11
    own_taste_purchases: int = 3  # the newest purchases, which follow taste; the ones before follow the crowd
    taste_weight: float = 4.0
    crowd_weight: float = 0.5  # spread of the items' popularity
    next_kind_probability: float = 0.75  # otherwise any kind


def synthetic_interactions(
    num_users: int = 1000, seed: int = 0, world: ToyWorld | None = None
) -> tuple[pa.Table, pa.Table]:
    """Simulates a toy world.

    Args:
        num_users: at least 1.
        seed: decides the catalogue, the users' hidden tastes, every choice and every review.
        world: the laws; the defaults suit 1,000 users.

    Returns:
        Interactions (user_id str, item_id str, timestamp int64 seconds, rating float32, summary str, review str), users
        in ascending order and each in time order, and items (item_id str, title str: `<style> <kind>`).

    Raises:
        ValueError: `num_users` is below 1.
    """
    if num_users < 1:
        raise ValueError(f"synthetic_users is {num_users}; the toy world needs at least 1 user.")
    world = world or ToyWorld()
    rng = np.random.default_rng(seed)
    styles = list(STYLES)
    # the catalogue: every kind comes in most of the styles, some of them more popular than others
    offered = np.stack([np.sort(rng.permutation(len(styles))[: world.styles_per_kind]) for _ in KINDS])
    popularity = rng.normal(0.0, world.crowd_weight, offered.shape)
    item_ids = [[f"item-{kind}-{place:02d}" for place in range(offered.shape[1])] for kind in KINDS]
    items = pa.table(
        {
            "item_id": [item_id for row in item_ids for item_id in row],
            "title": [f"{styles[style]} {kind}" for kind, row in zip(KINDS, offered, strict=True) for style in row],
        }
    )
    columns: dict[str, list] = {name: [] for name in RAW_INTERACTIONS.names}
    width = len(str(num_users - 1))
    for user in range(num_users):
        taste = int(rng.integers(len(styles)))
        for kind, place, time in _purchases(rng, world, offered, popularity, taste):
            rating, summary, review = _opinion(rng, kind, taste, matches=bool(offered[kind, place] == taste))
            values = (f"user-{user:0{width}d}", item_ids[kind][place], time, rating, summary, review)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    return pa.table(columns, RAW_INTERACTIONS), items


def _purchases(
    rng: np.random.Generator, world: ToyWorld, offered: np.ndarray, popularity: np.ndarray, taste: int
) -> Iterator[tuple[int, int, int]]:
    """One user's purchases: kind, place of the style among those of the kind, time.

    The caller draws from `rng` between them.
    """
    purchases = int(rng.integers(world.min_purchases, world.max_purchases + 1))
    kind = int(rng.integers(len(KINDS)))
    time = 1_600_000_000 + int(rng.integers(30_000_000))
    bought: set[tuple[int, int]] = set()
    for purchase in range(purchases):
        if purchase:
            follows = rng.random() < world.next_kind_probability
            kind = KINDS.index(NEXT_KIND[KINDS[kind]]) if follows else int(rng.integers(len(KINDS)))
        utility = popularity[kind].copy()
        if purchase >= purchases - world.own_taste_purchases:
            utility += world.taste_weight * (offered[kind] == taste)
        utility[[place for other, place in bought if other == kind]] = -np.inf  # nobody buys the same twice
        weights = np.exp(utility - utility.max())
        place = int(rng.choice(len(weights), p=weights / weights.sum()))
        bought.add((kind, place))
        time += int(rng.integers(86_400, 30 * 86_400))
        yield kind, place, time


def _opinion(rng: np.random.Generator, kind: int, taste: int, *, matches: bool) -> tuple[float, str, str]:
    """Rating, summary and review of a purchase."""
    liked = matches or rng.random() < 0.2
    summaries, remarks = (LIKED_SUMMARIES, LIKED_SENTENCES) if liked else (DISLIKED_SUMMARIES, DISLIKED_SENTENCES)
    words = list(STYLES.values())[taste]
    sentence = TASTE_SENTENCES[rng.integers(len(TASTE_SENTENCES))].format(style=words[rng.integers(len(words))])
    rating = float((4 if liked else 2) + rng.integers(2))
    summary = summaries[rng.integers(len(summaries))]
    return rating, summary, f"{remarks[rng.integers(len(remarks))].format(kind=KINDS[kind])} {sentence}"
