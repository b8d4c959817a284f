"""State-space models of DNA. No model has been released yet; see CHANGELOG.md."""

__all__: list[str] = []
