"""Losses and tasks on trained models."""
