"""YAML files of complete runs, looked up by name: `omnissm DOMAIN fit -c DOMAIN/NAME`."""
