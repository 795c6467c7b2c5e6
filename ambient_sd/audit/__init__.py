"""Numbers and images about a model's output: how much of it is copied, how good it is, and one page to look at.

    features    images -> vectors: pixels, EfficientNet-Lite0, SSCD
    neighbours  the nearest training images, exact
    metrics     memorized fraction, similarity, Frechet distance, KID: with intervals, beside held-out images
    record      audit.json: one schema, written and read by the same code
    report      one self-contained HTML file

Uses no other wing of the package; it needs images, not models.
"""
