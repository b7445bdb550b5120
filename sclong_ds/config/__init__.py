"""The run configuration: sections, rules between them, strict YAML, presets."""
