"""The run configuration: schema, recipes, flags."""
