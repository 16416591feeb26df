"""The errors that reach users: one clear sentence each, what is wrong, where, what would be right."""

from __future__ import annotations


class LatentGuardError(Exception):
    """Base of every error that latentguard raises on purpose."""


class PolicyError(LatentGuardError, ValueError):
    """A policy that cannot be used; the message names file, line and key."""


class LatentsError(LatentGuardError, ValueError):
    """Latents, or a file of latents, that cannot be read with certainty."""


class ModelError(LatentGuardError, ValueError):
    """An encoder that cannot be found, loaded, or used with this policy or space."""
