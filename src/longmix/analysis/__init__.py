"""What can be asked of a mixer or model without looking inside it."""
