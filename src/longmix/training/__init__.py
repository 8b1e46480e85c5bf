"""From a configuration to a trained, logged, resumable run."""
