"""Recipes: the YAML schema, validated to the last key, and the recipes that ship with aerogel."""
