"""Tables and plots over runs."""
