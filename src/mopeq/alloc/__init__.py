"""Allocators: costs and weights of items by formats -> one format an item. Arrays in, arrays out, no model."""

from mopeq.tables import Row

ALLOCATORS: dict[str, Row] = {
    "knapsack": Row("mopeq.alloc.choose:knapsack", "least summed cost at the exact budget"),
    "kmeans": Row("mopeq.alloc.choose:kmeans", "the paper's: one cluster of scores per width; has no budget"),
    "uniform": Row("mopeq.alloc.choose:uniform", "one width for every expert"),
    "random": Row("mopeq.alloc.choose:random", "the lower width and seeded random upgrades, at the exact budget"),
    "inverted": Row("mopeq.alloc.choose:inverted", "the knapsack with the scores turned round: a control"),
}

NO_BUDGET = ("kmeans",)
