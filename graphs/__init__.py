"""State-space models on graphs. No model has been released yet; see CHANGELOG.md."""

__all__: list[str] = []
