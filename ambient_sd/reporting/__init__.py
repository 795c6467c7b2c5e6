"""Everything that people look at: pages, charts, model cards."""
