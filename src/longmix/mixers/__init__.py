"""One file per sequence mixer: projections, gates, ordering, state; an engine does the work."""
