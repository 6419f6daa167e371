"""Recipes: found, composed, resolved and checked, without importing torch."""

from launcher.recipe.load import Loaded, load

__all__ = ["Loaded", "load"]
