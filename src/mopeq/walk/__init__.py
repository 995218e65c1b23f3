"""Models larger than memory: the model's own forward and backward, with one layer's weights resident at a time.

`parts.py` builds a model without weights and fetches one part's from the shards; `walking.py` leads all batches through
it together, part by part, forward and back; `borders.py` is what each leaves at a layer, and `curving.py` the same for
second derivatives; `shelf.py` keeps what waits at the borders, in memory or on disk.
"""
