"""Measure a model's output: how much of it is copied, and how good it is.

    features, networks, registry   images -> vectors, by name
    neighbours, originals          the nearest training image and the nearest other one, exact
    registration, decision         what is a copy
    shares, metrics, fidelity      figures with intervals, beside held-out images
    detection                      how well a score tells memorized prompts from ordinary ones
    embedding, stored              training sets too large for memory
    record                         audit.json: one schema, written and read by the same code

It measures images; it neither samples nor trains, and writes no page.
"""
