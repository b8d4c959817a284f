"""State-space backbones for images. No model has been released yet; see CHANGELOG.md."""

__all__: list[str] = []
