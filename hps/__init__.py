"""What the stages share: the typed recipe, the record formats, the chat templates, the manifest and the engine."""
