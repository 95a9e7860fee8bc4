"""The values of the recipe: YAML files, one for each dataclass of the schema."""
