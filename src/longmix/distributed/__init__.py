"""Work on one sequence divided over processes."""
