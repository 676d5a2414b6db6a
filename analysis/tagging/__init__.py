"""Words, their tags, and the entities that tags say."""
