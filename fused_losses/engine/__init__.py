"""Runs a plan: GEMMs, chunks and autograd, once for every loss and backend."""
