"""Fitting, on transformers' Trainer and TRL's."""
