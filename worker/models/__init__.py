"""Which models a job needs, where they come from, and in which order they are downloaded."""
